"""What each frequency band counts for.

Here live the weightings of `FrequencyAlignedLoss`. A weighting sees numbers a band, never fields.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_positive


class BandEvidence(NamedTuple):
    """What is known about each band in one step, as means per element, without gradients.

    Attributes:
        student_error: squared difference of student and teacher.
        teacher_energy: mean square of the teacher's field, or None where no weighting asks.
        teacher_error: squared difference of teacher and labels, or None where no weighting asks
            or nothing is labelled.
    """

    student_error: Tensor
    teacher_energy: Tensor | None = None
    teacher_error: Tensor | None = None


class AbstractWeighting(nn.Module, ABC):
    """Turns the evidence of one step into a weight for each band."""

    @property
    @abstractmethod
    def needs_teacher_energy(self) -> bool:
        """Whether the loss shall measure the teacher's energy, at the cost of one transform."""

    @property
    @abstractmethod
    def needs_teacher_error(self) -> bool:
        """Whether the loss shall measure the teacher against labels, where there are any."""

    @abstractmethod
    def check(self, n_bands: int) -> None:
        """Refuse a partition that this weighting does not fit.

        Raises:
            ValueError: naming the weighting's own number of bands and the partition's.
        """

    @abstractmethod
    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """Weights of at least 0, from the lowest band to the highest."""


class FixedWeighting(AbstractWeighting):
    """The same weights in every step: with two bands, ``(alpha, 1)`` is the paper's form.

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
        self.register_buffer("weights", torch.tensor(values, dtype=torch.float64), persistent=False)

    @property
    def needs_teacher_energy(self) -> bool:
        """Never."""
        return False

    @property
    def needs_teacher_error(self) -> bool:
        """Never."""
        return False

    def check(self, n_bands: int) -> None:
        """See `AbstractWeighting`."""
        if len(self.weights) != n_bands:
            raise ValueError(
                f"`weights` has {len(self.weights)} values, expected {n_bands}: one for each "
                "band, from low to high."
            )

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """The weights."""
        return self.weights.to(evidence.student_error)


class RelativeWeighting(AbstractWeighting):
    """Each band divided by the teacher's energy there, so that all bands count alike.

    Formula: ``w_i = mean_j(E_j) / max(E_i, floor * max_j(E_j))``, E the teacher's energy in this
    step. Where errors are in proportion to energies, the loss has the size of the MSE.

    Args:
        floor: the least energy a band is taken to have, as a share of the strongest band's. It
            bounds the weights by ``1 / floor``, also where a band carries nothing.

    Raises:
        ValueError: if the floor is not in (0, 1].

    Example:
        >>> weighting = RelativeWeighting(floor=0.1)
        >>> weighting(BandEvidence(torch.zeros(2), torch.tensor([8.0, 2.0])))
        tensor([0.6250, 2.5000])
    """

    def __init__(self, floor: float = 0.05) -> None:
        super().__init__()
        check_positive("floor", floor)
        if floor > 1:
            raise ValueError(f"`floor` is {floor}, expected a share in (0, 1].")
        self.floor = floor

    @property
    def needs_teacher_energy(self) -> bool:
        """Always."""
        return True

    @property
    def needs_teacher_error(self) -> bool:
        """Never."""
        return False

    def check(self, n_bands: int) -> None:
        """Fits every partition."""

    def forward(self, evidence: BandEvidence) -> Float[Tensor, " n_bands"]:
        """See the class."""
        energy = evidence.teacher_energy
        if energy is None:
            raise ValueError(
                "`evidence.teacher_energy` is None, but a relative weighting needs it."
            )
        floored = energy.clamp_min(self.floor * energy.max())
        # A teacher that is zero everywhere has no scale to divide by.
        return torch.where(energy.max() > 0, energy.mean() / floored, torch.ones_like(energy))

    def extra_repr(self) -> str:
        """The floor, for ``print``."""
        return f"floor={self.floor}"
