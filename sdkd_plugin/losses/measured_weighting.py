"""Weightings that measure: the student's lag, or the teacher's own errors, over training.

Here live the weightings with a memory. Those that see a single step only are in `weighting`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdkd_plugin._checks import (
    check_finite,
    check_mask,
    check_positive,
    check_positive_int,
    check_shape,
)
from sdkd_plugin.losses.band_errors import observed_band_errors
from sdkd_plugin.losses.weighting import AbstractWeighting, BandEvidence
from sdkd_plugin.spectral import AbstractTransform, Bands


def lag_weights(
    student_error: Float[Tensor, " n_bands"],
    teacher_energy: Float[Tensor, " n_bands"],
    *,
    bound: float = 4.0,
    floor: float = 0.05,
) -> Float[Tensor, " n_bands"]:
    """Weights that follow how far the student lags in each band.

    Formula: ``w_i = clip(lag_i / mean_j(lag_j), 1 / bound, bound)`` with
    ``lag_i = error_i / max(energy_i, floor * max_j(energy_j))``, the share of the teacher's energy
    that the student misses. Where there is no lag at all, or no energy, all bands count 1.

    Args:
        student_error: squared difference of student and teacher in each band.
        teacher_energy: mean square of the teacher in each band.
        bound: of the weights, above 1.
        floor: the least energy a band is taken to have, as a share of the strongest band's: errors
            of a band that carries nothing are no lag.

    Raises:
        ValueError: if the bound is not above 1 or the floor not in (0, 1].

    Example:
        >>> lag_weights(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
        tensor([0.5000, 1.5000])
    """
    _check_bounds(bound, floor)
    tiny = torch.finfo(student_error.dtype).tiny
    floored = teacher_energy.clamp_min(floor * teacher_energy.max())
    lag = student_error / floored.clamp_min(tiny)
    relative = (lag / lag.mean().clamp_min(tiny)).clamp(1 / bound, bound)
    measured = (teacher_energy.max() > 0) & (lag.mean() > 0)
    return torch.where(measured, relative, torch.ones_like(relative))


def confidence_weights(
    teacher_energy: Float[Tensor, " n_bands"], teacher_error: Float[Tensor, " n_bands"]
) -> Float[Tensor, " n_bands"]:
    """How far the teacher can be believed in each band, in [0, 1].

    Formula: ``w_i = energy_i / (energy_i + error_i)``, the gain of a Wiener filter for a signal
    with that energy under noise with that error. Where both are 0 the teacher is right: 1.

    Args:
        teacher_energy: mean square of the teacher in each band.
        teacher_error: squared difference of teacher and labels in each band.

    Example:
        >>> confidence_weights(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([1.0000, 0.5000, 0.0000])

    Source: the Wiener filter's gain; its use as a band weight is our own.
    """
    total = teacher_energy + teacher_error
    gain = teacher_energy / total.clamp_min(torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, gain, torch.ones_like(gain))


class AdaptiveWeighting(AbstractWeighting):
    """Follows the student's lag: a band counts more, the further the student is behind in it.

    Formula: `lag_weights` of the exponential moving averages of error and energy over training
    steps, ``average <- decay * average + (1 - decay) * value``. Both start at 0 with the same
    bias, which their ratio does not see: the first step counts in full.

    The averages move in training mode only and are in ``state_dict()``. A step with NaN or Inf,
    as mixed precision has them now and then, leaves them as they are. Before any step all bands
    count 1. Nothing here waits for the device.

    Args:
        n_bands: of the partition.
        decay: of the averages in a step, in [0, 1); they reach back about 1 / (1 - decay) steps.
        bound: no band counts more than this or less than its inverse.
        floor: as for `lag_weights`.

    Raises:
        ValueError: if a number is out of its range, or, in forward, if the evidence has no energy.

    Example:
        >>> weighting = AdaptiveWeighting(2)
        >>> weighting(BandEvidence(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])))
        tensor([0.5000, 1.5000])
    """

    error: Tensor
    energy: Tensor

    def __init__(
        self, n_bands: int, *, decay: float = 0.99, bound: float = 4.0, floor: float = 0.05
    ) -> None:
        super().__init__()
        check_positive_int("n_bands", n_bands, minimum=2)
        _check_decay(decay)
        _check_bounds(bound, floor)
        self.decay = decay
        self.bound = bound
        self.floor = floor
        self.register_buffer("error", torch.zeros(n_bands))
        self.register_buffer("energy", torch.zeros(n_bands))

    @property
    def needs_teacher_energy(self) -> bool:
        """In training mode: in eval mode the averages stand still."""
        return self.training

    @property
    def needs_teacher_error(self) -> bool:
        """Never."""
        return False

    def check(self, n_bands: int) -> None:
        """See `AbstractWeighting`."""
        _check_n_bands(len(self.error), n_bands)

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """The weights after this step's evidence."""
        if self.training:
            if evidence.teacher_energy is None:
                raise ValueError(
                    "`evidence.teacher_energy` is None, but an adaptive weighting needs it while "
                    "training."
                )
            _follow(
                (self.error, self.energy),
                (evidence.student_error, evidence.teacher_energy),
                1 - self.decay,
            )
        weights = lag_weights(self.error, self.energy, bound=self.bound, floor=self.floor)
        return weights.to(evidence.student_error)

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"{len(self.error)}, decay={self.decay}, bound={self.bound}, floor={self.floor}"


class ConfidenceWeighting(AbstractWeighting):
    """A band counts as far as the teacher itself is right there, measured on labelled data.

    Formula: `confidence_weights` of averages of the teacher's energy and error. They come from

    - `measure`, over batches of labelled data: plain means over their elements. Prefer data that
      the teacher was not trained on; on its own training data it looks better than it is;
    - training steps whose evidence has a ``teacher_error``: plain means at first, and
      exponential moving averages with ``decay`` once these reach further back. Unlabelled steps
      keep the last estimate, and so does a step with NaN or Inf.

    Before any measurement all bands count 1. The estimate is in ``state_dict()``, moves in training
    mode only, and forward does not wait for the device.

    Args:
        n_bands: of the partition.
        decay: of the averages in a labelled step, in [0, 1); None leaves the estimate to `measure`
            alone.

    Raises:
        ValueError: if a number is out of its range, or, in forward, if the evidence has the
            teacher's error without its energy.

    Example:
        >>> weighting = ConfidenceWeighting(2)
        >>> energy, error = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
        >>> weighting(BandEvidence(error, energy, teacher_error=error))
        tensor([1.0000, 0.5000])
    """

    error: Tensor
    energy: Tensor
    measured: Tensor

    def __init__(self, n_bands: int, *, decay: float | None = 0.99) -> None:
        super().__init__()
        check_positive_int("n_bands", n_bands, minimum=2)
        if decay is not None:
            _check_decay(decay)
        self.decay = decay
        self.register_buffer("error", torch.zeros(n_bands))
        self.register_buffer("energy", torch.zeros(n_bands))
        # What the averages stand for: samples that were measured, or labelled steps.
        self.register_buffer("measured", torch.zeros(()))

    @property
    def needs_teacher_energy(self) -> bool:
        """As `needs_teacher_error`."""
        return self.needs_teacher_error

    @property
    def needs_teacher_error(self) -> bool:
        """Whether the loss shall measure the teacher's error against the labels of this step."""
        return self.training and self.decay is not None

    def check(self, n_bands: int) -> None:
        """See `AbstractWeighting`."""
        _check_n_bands(len(self.error), n_bands)

    def reset(self) -> None:
        """Forget everything measured."""
        for average in (self.error, self.energy, self.measured):
            average.zero_()

    @torch.no_grad()
    def measure(
        self,
        teacher: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."],
        transform: AbstractTransform,
        bands: Bands,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> None:
        """Take a batch of labelled data into the estimate. This waits for the device.

        Where labels are missing, the teacher's error is taken to be 0 and the error of the others
        scaled up to the whole field. For labels missing at random this is right in total, but it
        carries errors from where they belong to all frequencies alike.

        Args:
            teacher: its forecast, on the transform's domain.
            y: the labels, of the same shape; anything where they are masked out.
            transform: the domain.
            bands: the partition.
            mask: True where observed; of as many axes as ``y``, each of its size or 1.

        Raises:
            ValueError: if shapes do not match, nothing is observed, or a value is NaN or Inf.
        """
        self.check(bands.n_bands)
        check_shape("y", y.shape, teacher.shape, "the teacher's forecast")
        check_finite("teacher", teacher)
        share = 1.0
        if mask is not None:
            check_mask(mask, y)
            share = float(mask.float().mean())
            if share == 0:
                raise ValueError("`mask` is False everywhere, expected an observed label.")
            y = torch.where(mask, y, teacher)
        check_finite("y", y)
        error = observed_band_errors(teacher, y, transform, bands, mask)
        energy = transform.sample_band_energy(teacher, bands).mean(0) / teacher[0].numel()
        weight = len(y) * share
        rate = weight / (self.measured + weight)
        _follow((self.error, self.energy), (error, energy), rate)
        self.measured += weight

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """The weights after this step's evidence."""
        error, energy = evidence.teacher_error, evidence.teacher_energy
        if self.training and self.decay is not None and error is not None:
            if energy is None:
                raise ValueError(
                    "`evidence.teacher_energy` is None, but a confidence weighting needs it with "
                    "`teacher_error`."
                )
            rate = (1 / (self.measured + 1)).clamp_min(1 - self.decay)
            self.measured += _follow((self.error, self.energy), (error, energy), rate)
        weights = confidence_weights(self.energy, self.error)
        return weights.to(evidence.student_error)

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"{len(self.error)}, decay={self.decay}"


def _follow(
    averages: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], rate: Tensor | float
) -> Tensor:
    """Move averages towards values, if all of these are finite; whether they were."""
    finite = torch.stack([value.isfinite().all() for value in values]).all()
    for average, value in zip(averages, values, strict=True):
        moved = torch.lerp(average, value.detach().to(average), rate)
        average.copy_(torch.where(finite, moved, average))
    return finite


def _check_bounds(bound: float, floor: float) -> None:
    if not 1 < bound < float("inf"):
        raise ValueError(f"`bound` is {bound}, expected a finite number above 1.")
    check_positive("floor", floor)
    if floor > 1:
        raise ValueError(f"`floor` is {floor}, expected a share in (0, 1].")


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` is {decay}, expected a number in [0, 1).")


def _check_n_bands(own: int, n_bands: int) -> None:
    if own != n_bands:
        raise ValueError(f"`n_bands` of the weighting is {own}, expected {n_bands}, the bands'.")
