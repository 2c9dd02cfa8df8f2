"""The frequency-aligned loss: how far a student is from its teacher, band by band.

Here live the loss as a function and as a module. The errors of the bands are in `band_errors`, what
each band counts for in `weighting`, the quadratic form and its gradient in
`sdkd_plugin.spectral.basis`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin.losses.band_errors import band_errors, observed_band_errors
from sdkd_plugin.losses.weighting import AbstractWeighting, BandEvidence, FixedWeighting
from sdkd_plugin.losses.weightings import WeightingName, make_weighting
from sdkd_plugin.spectral import AbstractTransform, Bands


def frequency_aligned_loss(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
    weights: Sequence[float],
) -> Float[Tensor, ""]:
    """Mean over the batch of the weighted band errors: ``<d, g(L) d>`` with ``g = sum_i w_i g_i``.

    With two bands and weights ``(alpha, 1)`` this is the paper's
    ``||Psi_h(s) - Psi_h(t)||^2 + alpha ||Psi_l(s) - Psi_l(t)||^2``, a mean per element. With all
    weights 1 it *is* the MSE.

    Args:
        student: as `band_errors`.
        teacher: as `band_errors`.
        transform: as `band_errors`.
        bands: as `band_errors`.
        weights: of the bands, from low to high.

    Raises:
        ValueError: as `band_errors`, and if there is not one finite weight of at least 0 a band.

    Example:
        >>> import torch
        >>> from sdkd_plugin import GridTransform
        >>> field = torch.randn(4, 3, 8, 8)
        >>> transform, bands = GridTransform((8, 8)), Bands.split(0.25)
        >>> float(frequency_aligned_loss(field, field, transform, bands, (1.0, 2.0)))
        0.0

    Source: arXiv 2507.02939, eq. for L_KD. The paper states neither cutoff nor alpha.
    """
    weighting = FixedWeighting(weights)
    weighting.check(bands.n_bands)
    errors = band_errors(student, teacher, transform, bands).mean(0)
    return (errors * weighting(BandEvidence(errors.detach()))).sum()


class FrequencyTerms(NamedTuple):
    """A frequency-aligned loss and what it is made of.

    Attributes:
        total: the loss, with its gradient.
        errors: mean squared difference in each band, unweighted, of shape ``(n_bands,)``.
        weights: what each band counted for, of shape ``(n_bands,)``.
    """

    total: Tensor
    errors: Tensor
    weights: Tensor


class FrequencyAlignedLoss(nn.Module):
    """The frequency-aligned loss of a domain, with a weighting of its bands.

    Args:
        transform: the domain of the fields.
        bands: how its frequencies group.
        weighting: what each band counts for: a name, numbers or a weighting, as `make_weighting`
            takes them.

    Raises:
        ValueError: if the weighting is unknown or does not fit the bands.

    Example:
        >>> import torch
        >>> from sdkd_plugin import GridTransform
        >>> loss = FrequencyAlignedLoss(GridTransform((8, 8)), Bands.split(0.25), (1.0, 2.0))
        >>> student, teacher = torch.randn(2, 4, 3, 8, 8)
        >>> loss(student, teacher).shape
        torch.Size([])
    """

    def __init__(
        self,
        transform: AbstractTransform,
        bands: Bands,
        weighting: WeightingName | AbstractWeighting | Sequence[float],
    ) -> None:
        super().__init__()
        self.transform = transform
        self.bands = bands
        self.weighting = make_weighting(weighting, bands.n_bands)

    def forward(
        self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """The loss of a batch; see `frequency_aligned_loss`."""
        return self.total(student, teacher)

    def total(
        self, student: Tensor, teacher: Tensor, weights: Float[Tensor, " n_bands"] | None = None
    ) -> Float[Tensor, ""]:
        """As calling the loss, with the given weights of the bands in place of the weighting's."""
        return self.terms(student, teacher, weights=weights).total

    def terms(
        self,
        student: Float[Tensor, "batch ..."],
        teacher: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        weights: Float[Tensor, " n_bands"] | None = None,
        counts: Float[Tensor, " batch"] | None = None,
    ) -> FrequencyTerms:
        """The loss of a batch with its errors and weights a band.

        Args:
            student: as `band_errors`.
            teacher: as `band_errors`.
            y: labels, for a weighting that measures the teacher against them.
            mask: which of them are observed.
            weights: in place of the weighting's.
            counts: what each sample counts for in the total; by default 1. The errors and what the
                weighting sees are those of all samples.

        Raises:
            ValueError: as `band_errors`.
        """
        of_samples = band_errors(student, teacher, self.transform, self.bands)
        errors = of_samples.mean(0)
        if weights is None:
            weights = self.weighting(self._evidence(errors.detach(), teacher.detach(), y, mask))
        counted = errors if counts is None else (counts[:, None] * of_samples).mean(0)
        return FrequencyTerms((counted * weights).sum(), errors.detach(), weights)

    def _evidence(
        self, errors: Tensor, teacher: Tensor, y: Tensor | None, mask: Tensor | None
    ) -> BandEvidence:
        energy = teacher_error = None
        if self.weighting.needs_teacher_energy:
            energy = self.transform.sample_band_energy(teacher, self.bands).mean(0)
            energy = energy / teacher[0].numel()
        if self.weighting.needs_teacher_error and y is not None:
            teacher_error = observed_band_errors(teacher, y, self.transform, self.bands, mask)
        return BandEvidence(errors, energy, teacher_error)
