"""What a teacher is worth to a student, measured on labels that neither was trained on.

How one loss weighs its bands otherwise is in `band_weights`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from sdkd_plugin._checks import check_labels, check_shape, warn_caller
from sdkd_plugin.losses.band_weights import FullPrecision
from sdkd_plugin.spectral import AbstractTransform, Bands

STUDENT, TEACHERS = "student", "teacher"
FADE = 0.1
"""The excess of a teacher's error, over its distance from the student, that takes all weight."""


@dataclass(frozen=True)
class TeacherReport:
    """Teachers, student and baseline on the same labels.

    Attributes:
        errors: mean squared error of each in each band, by name: ``student``, ``teacher`` (the mean
            of several, which is what the student follows), each of several teachers, baselines.
        weights: the share of the band's weight that the teacher keeps, in [0, 1].
    """

    errors: Mapping[str, Tensor]
    weights: Tensor

    @property
    def worse(self) -> bool:
        """Whether the student or a baseline is at least as good as the teacher."""
        teacher = self.errors[TEACHERS].sum()
        others = (e for name, e in self.errors.items() if not name.startswith(TEACHERS))
        return any(bool(each.sum() <= teacher) for each in others)

    def scalars(self) -> dict[str, float]:
        """Errors and weights by name, for a logger: ``teacher_mse``, ``teacher_mse_0`` ..."""
        named: dict[str, float] = {}
        for name, errors in self.errors.items():
            named[f"{name}_mse"] = float(errors.sum())
            named |= {f"{name}_mse_{i}": float(error) for i, error in enumerate(errors)}
        return named | {f"teacher_trust_{i}": float(w) for i, w in enumerate(self.weights)}

    def __str__(self) -> str:
        rows = [("", "MSE", *(f"band {i}" for i in range(len(self.weights))))]
        for name, errors in self.errors.items():
            rows.append((name, *(f"{float(e):.4g}" for e in (errors.sum(), *errors))))
        rows.append(("weight of the teacher", "", *(f"{float(w):.2f}" for w in self.weights)))
        return "\n".join(
            f"{row[0]:22}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows
        )


class TeacherTrust(FullPrecision):
    """The share of its weight that a teacher keeps in each band.

    Formula: with the mean squared errors S of the best student so far and T of the teacher against
    labels, and their mean squared difference D, all of one band,

        trust = clip(1 + 10 (S - T) / D, 0, 1),

    and 1 before any measurement. So a teacher at least as good as the student keeps its whole
    weight, and one that is worse by a tenth of D loses it all: with independent errors, where D is
    S + T, that is a teacher whose error is 1.22 times the student's. Noise of the labels cancels in
    S - T, and does not enter D.

    S, T and D are measured in passes over the same validation data (`add`, then `update`); in each
    band the pass with the least S counts. They are float32 and in ``state_dict()``. Nothing is
    measured in a training step.

    For most of its training a student is worse than a teacher that it will overtake, and follows
    it to its own harm (``benchmarks/weak_teacher.py``). So the first pass is best made with a
    student that was trained alone, as a study does where it has one.

    Example:
        >>> trust = TeacherTrust(2)
        >>> trust.weights
        tensor([1., 1.])

    Source: our own.
    """

    errors: Tensor
    weights: Tensor

    def __init__(self, n_bands: int) -> None:
        super().__init__()
        self.register_buffer("errors", torch.full((3, n_bands), torch.inf))
        self.register_buffer("weights", torch.ones(n_bands))
        self._sums: dict[str, Tensor] = {}
        self._count = 0.0
        self._warned = False

    def add(
        self,
        forecasts: Mapping[str, Float[Tensor, "batch ..."]],
        y: Float[Tensor, "batch ..."],
        mask: Bool[Tensor, "..."] | None,
        transform: AbstractTransform,
        bands: Bands,
    ) -> None:
        """Add a batch to the pass: ``student``, ``teacher`` and others, against labels.

        Raises:
            ValueError: if shapes differ, or a value is NaN or Inf.
        """
        check_labels(y, mask)
        fields = {}
        for name, forecast in forecasts.items():
            check_shape(name, forecast.shape, y.shape, "the labels")
            error = forecast.float() - y.float()
            fields[name] = error if mask is None else torch.where(mask, error, 0)
        fields["difference"] = fields[TEACHERS] - fields[STUDENT]
        for name, field in fields.items():
            energy = transform.sample_band_energy(field, bands).sum(0, dtype=torch.float64)
            self._sums[name] = self._sums.get(name, 0.0) + energy
        self._count += y.numel() if mask is None else float(mask.expand_as(y).sum())

    @property
    def measured(self) -> bool:
        """Whether any process observed a label in this pass. Each process must ask."""
        return float(_summed(self.weights.new_tensor(self._count))) > 0

    def update(self) -> TeacherReport:
        """End a pass: the report, and new weights.

        With several processes the sums of all are taken, and each must call this, after at least
        one `add`.

        Raises:
            ValueError: if no label was observed.
        """
        sums, observed, self._sums, self._count = self._sums, self._count, {}, 0.0
        count = torch.full_like(sums[STUDENT], observed) if sums else torch.zeros(1)
        total = _summed(torch.stack([*sums.values(), count]))
        if not total[-1].any():
            raise ValueError("no label was observed in the pass, expected at least one.")
        means = dict(zip(sums, (total[:-1] / total[-1]).float(), strict=True))
        measured = torch.stack([means[STUDENT], means[TEACHERS], means.pop("difference")])
        better = measured[0].to(self.errors) < self.errors[0]
        self.errors.copy_(torch.where(better, measured.to(self.errors), self.errors))
        student, teacher, difference = self.errors
        ahead = (student - teacher) / difference.clamp_min(torch.finfo(difference.dtype).tiny)
        self.weights.copy_((1 + ahead / FADE).clamp(0, 1))
        report = TeacherReport(means, self.weights.clone())
        if report.worse and not self._warned:
            self._warned = True
            warn_caller(
                "the teacher is not the better one on these labels; it keeps the shown part of its "
                f"weight, which is measured again at each validation.\n{report}"
            )
        return report


def _summed(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
