"""Weights of the frequency bands: fixed, or measured from the teacher, the student and labels.

A weighting maps a few numbers a band to one weight a band; it never sees fields.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_positive_int, check_within
from sdkd_plugin._explained import explained

WeightingName = Literal["fixed", "relative", "adaptive", "confidence"]


class BandEvidence(NamedTuple):
    """Measurements of each band in one step, means per element, without gradient.

    Attributes:
        student_error: squared difference of student and teacher.
        teacher_energy: mean square of the teacher's field, or None if no weighting needs it.
        teacher_error: squared difference of teacher and labels, or None if no weighting needs it
            or the batch is unlabelled.
    """

    student_error: Tensor
    teacher_energy: Tensor | None = None
    teacher_error: Tensor | None = None


class AbstractWeighting(nn.Module, ABC):
    """Computes a weight for each band from the evidence of one step.

    Attributes:
        needs_teacher_energy: whether the loss measures the teacher's energy: one more transform.
        needs_teacher_error: whether it measures the teacher's error against labels.
        needs_in_eval: whether it measures them in eval mode too, or in training mode only.
        n_bands: of the partitions that the weighting fits; None if it fits every partition.
    """

    needs_teacher_energy: bool = False
    needs_teacher_error: bool = False
    needs_in_eval: bool = True
    n_bands: int | None = None

    @abstractmethod
    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """Weights of at least 0, from the lowest band to the highest."""


class FullPrecision(nn.Module):
    """Moves its buffers to another device, but to no other dtype: `half` must not round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self


@explained
class FixedWeighting(FullPrecision, AbstractWeighting):
    """The same weights in every step; with two bands, ``(alpha, 1)`` is the paper's form.

    Args:
        weights: one a band, from low to high, finite, at least 0, not all 0.

    Raises:
        ValueError: if a weight is negative or not finite, or all are 0.

    Example:
        >>> FixedWeighting((0.5, 1.0))(BandEvidence(torch.zeros(2)))
        tensor([0.5000, 1.0000])

    Source: arXiv 2507.02939; the paper does not state its alpha.
    """

    weights: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        values = tuple(float(w) for w in weights)
        if not all(0 <= w < float("inf") for w in values) or not any(values):
            raise ValueError(
                f"`weights` is {values}, expected finite numbers of at least 0, not all 0."
            )
        self.n_bands = len(values)
        self.register_buffer("weights", torch.tensor(values, dtype=torch.float64), persistent=False)

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """The weights."""
        return self.weights.to(evidence.student_error)


@explained
class RelativeWeighting(AbstractWeighting):
    """Weights each band by the inverse of the teacher's energy there.

    Formula: ``w_i = mean_j(E_j) / max(E_i, floor * max_j(E_j))``, 1 if all E are 0. If errors are
    proportional to energies, the weighted loss has the size of the MSE.

    Args:
        floor: the least energy of a band, as a share of the largest, in (0, 1]. Weights are at most
            ``1 / floor``.

    Raises:
        ValueError: if the floor is not in (0, 1].

    Example:
        >>> RelativeWeighting(floor=0.1)(BandEvidence(torch.zeros(2), torch.tensor([8.0, 2.0])))
        tensor([0.6250, 2.5000])
    """

    needs_teacher_energy = True

    def __init__(self, floor: float = 0.05) -> None:
        super().__init__()
        check_within("floor", floor, "(0, 1]")
        self.floor = floor

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """The weights of this step."""
        energy = _energy(evidence)
        weights = energy.mean() / energy.clamp_min(self.floor * energy.max())
        return torch.where(energy.max() > 0, weights, torch.ones_like(weights))


class BandAverages(FullPrecision):
    """Running means of an error and an energy in each band, in float32 whatever the model's dtype.

    ``weight`` is the number of samples or steps in the means. A step with NaN or Inf, as mixed
    precision has them now and then, changes nothing.
    """

    error: Tensor
    energy: Tensor
    weight: Tensor

    def __init__(self, n_bands: int) -> None:
        super().__init__()
        check_positive_int("n_bands", n_bands, minimum=2)
        self.register_buffer("error", torch.zeros(n_bands))
        self.register_buffer("energy", torch.zeros(n_bands))
        self.register_buffer("weight", torch.zeros(()))

    def follow(
        self, error: Tensor, energy: Tensor, rate: Tensor | float, weight: float = 1.0
    ) -> None:
        """Move the means towards new values by ``rate``, and add to the weight."""
        finite = error.isfinite().all() & energy.isfinite().all()
        for mean, value in ((self.error, error), (self.energy, energy)):
            moved = torch.lerp(mean, value.detach().to(mean), rate)
            mean.copy_(torch.where(finite, moved, mean))
        self.weight += finite * weight


@explained
class AdaptiveWeighting(AbstractWeighting):
    """Weights a band the more, the larger the student's relative error in it is.

    Formula: ``w_i = clip(lag_i / mean_j(lag_j), 1 / max_weight, max_weight)`` with
    ``lag_i = error_i / max(energy_i, floor * max_j(energy_j))``. All weights are 1 if there is no
    error or no energy, as before the first step.

    Error and energy are exponential moving averages over training steps,
    ``average <- decay * average + (1 - decay) * value``. Both start at 0, and their ratio has no
    bias from that. They move in training mode only and are in ``state_dict()``. Nothing waits for
    the device.

    Args:
        n_bands: of the partition.
        decay: of the averages in a step, in [0, 1); they reach back about 1 / (1 - decay) steps.
        max_weight: above 1, at most 1e9; no weight is above it or below its inverse.
        floor: the least energy of a band, as a share of the largest, in (0, 1].

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> weighting = AdaptiveWeighting(2)
        >>> weighting(BandEvidence(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])))
        tensor([0.5000, 1.5000])
    """

    needs_teacher_energy = True
    needs_in_eval = False

    def __init__(
        self, n_bands: int, *, decay: float = 0.99, max_weight: float = 4.0, floor: float = 0.05
    ) -> None:
        super().__init__()
        check_within("decay", decay, "[0, 1)")
        check_within("max_weight", max_weight, "(1, 1e9]")
        check_within("floor", floor, "(0, 1]")
        self.n_bands = n_bands
        self.decay = decay
        self.max_weight = max_weight
        self.floor = floor
        self.averages = BandAverages(n_bands)

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """The weights after this step's evidence."""
        if self.training:
            self.averages.follow(evidence.student_error, _energy(evidence), 1 - self.decay)
        error, energy = self.averages.error, self.averages.energy
        tiny = torch.finfo(error.dtype).tiny
        lag = error / energy.clamp_min(self.floor * energy.max()).clamp_min(tiny)
        weights = lag / lag.mean().clamp_min(tiny)
        weights = weights.clamp(1 / self.max_weight, self.max_weight)
        measured = (energy.max() > 0) & (lag.mean() > 0)
        weights = torch.where(measured, weights, torch.ones_like(weights))
        return weights.to(evidence.student_error)

    def extra_repr(self) -> str:
        """The options."""
        return f"decay={self.decay}, max_weight={self.max_weight}, floor={self.floor}"


@explained
class ConfidenceWeighting(AbstractWeighting):
    """Weights each band by the teacher's signal share there.

    Formula: ``w_i = energy_i / (energy_i + error_i)``, 1 if both are 0, as before any measurement,
    with the teacher's mean square and its mean squared error against labels: the Wiener filter's
    gain. Its use as a band weight is our own.

    Energy and error come from `FrequencyAlignedLoss.measure`, a plain mean over labelled batches,
    or from labelled training steps: plain means at first, exponential moving averages with
    ``decay`` once these reach further back. Unlabelled steps keep the last estimate. Prefer labels
    that the teacher was not trained on: on its own training data its errors are too small. The
    estimate moves in training mode only and is in ``state_dict()``. Nothing waits for the device.

    Args:
        n_bands: of the partition.
        decay: of the averages in a labelled step, in [0, 1); None leaves it to ``measure``.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> weighting = ConfidenceWeighting(2)
        >>> energy, error = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
        >>> weighting(BandEvidence(error, energy, teacher_error=error))
        tensor([1.0000, 0.5000])
    """

    needs_in_eval = False

    def __init__(self, n_bands: int, *, decay: float | None = 0.99) -> None:
        super().__init__()
        if decay is not None:
            check_within("decay", decay, "[0, 1)")
        self.n_bands = n_bands
        self.decay = decay
        self.needs_teacher_energy = self.needs_teacher_error = decay is not None
        self.averages = BandAverages(n_bands)

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """The weights after this step's evidence."""
        averages, error = self.averages, evidence.teacher_error
        if self.training and self.decay is not None and error is not None:
            rate = (1 / (averages.weight + 1)).clamp_min(1 - self.decay)
            averages.follow(error, _energy(evidence), rate)
        total = averages.energy + averages.error
        gain = averages.energy / total.clamp_min(torch.finfo(total.dtype).tiny)
        return torch.where(total > 0, gain, torch.ones_like(gain)).to(evidence.student_error)


def make_weighting(
    weighting: WeightingName | AbstractWeighting | Sequence[float], n_bands: int
) -> AbstractWeighting:
    """The weighting of a name, as `DistillationLoss` names them, or of numbers; others as given.

    Raises:
        ValueError: if the name is unknown, or the weighting does not fit the bands.
    """
    made: AbstractWeighting
    if isinstance(weighting, AbstractWeighting):
        made = weighting
    elif isinstance(weighting, Iterable) and not isinstance(weighting, str):
        made = FixedWeighting(weighting)
    else:
        check_choice("weighting", weighting, get_args(WeightingName))
        if weighting == "fixed":
            made = FixedWeighting((1.0, *[2.0] * (n_bands - 1)))
        elif weighting == "relative":
            made = RelativeWeighting()
        elif weighting == "adaptive":
            made = AdaptiveWeighting(n_bands)
        else:
            made = ConfidenceWeighting(n_bands)
    if made.n_bands not in (None, n_bands):
        raise ValueError(
            f"`weights` has {made.n_bands} values, expected {n_bands}: one for each band, from low "
            f"to high; make the {type(made).__name__} for {n_bands} bands."
        )
    return made


def _energy(evidence: BandEvidence) -> Tensor:
    if evidence.teacher_energy is None:
        raise ValueError("`evidence.teacher_energy` is None, but this weighting needs it.")
    return evidence.teacher_energy
