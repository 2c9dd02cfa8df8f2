"""The frequency-aligned loss: how far a student is from its teacher, band by band.

Here live the loss as a function and as a module. What each band counts for is in `weighting`;
the quadratic form and its gradient are in `sdkd_plugin.spectral.basis`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_shape
from sdkd_plugin.losses.weighting import AbstractWeighting, BandEvidence, FixedWeighting
from sdkd_plugin.spectral import AbstractTransform, Bands


def band_errors(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
) -> Float[Tensor, "batch n_bands"]:
    """Mean squared difference of two fields in each band; over the bands it sums to their MSE.

    Formula: ``e[b, i] = <d, g_i(L) d> / (elements of a sample)``, d = student - teacher and g_i
    the power weights of band i. One transform of the difference; the gradient is one inverse.

    Args:
        student: forecast or latent, on the transform's domain, the first axis the batch.
        teacher: of the same shape.
        transform: the domain.
        bands: the partition.

    Returns:
        float32, or float64 where either field is; differentiable once in both fields.

    Raises:
        ValueError: if the shapes differ or do not lie on the domain.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> student, teacher = torch.randn(2, 4, 3, 8, 8)
        >>> errors = band_errors(student, teacher, GridTransform((8, 8)), Bands.split(0.25))
        >>> mse = torch.nn.functional.mse_loss(student, teacher)
        >>> torch.allclose(errors.sum(1).mean(), mse)
        True

    Source: arXiv 2507.02939, section 3.3; as a quadratic form in the Laplacian, our own.
    """
    check_shape("student", student.shape, teacher.shape, "the teacher's shape")
    # The difference of two half-precision fields has few digits left unless taken in float32.
    dtype = torch.promote_types(student.dtype, torch.promote_types(teacher.dtype, torch.float32))
    energy = transform.sample_band_energy(student.to(dtype) - teacher.to(dtype), bands)
    return energy / student[0].numel()


def observed_band_errors(
    teacher: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, " n_bands"]:
    """Mean squared error of a forecast in each band against labels, some of which may be missing.

    Where labels are missing, the error is taken to be 0 and that of the others scaled up to the
    whole field. For labels missing at random this is right in total, but it carries errors from
    where they belong to all frequencies alike.

    Args:
        teacher: the forecast.
        y: labels; anything where they are masked out.
        transform: the domain.
        bands: the partition.
        mask: True where observed; of as many axes as ``y``, each of its size or 1.

    Returns:
        means over the batch; NaN where nothing is observed.

    Raises:
        ValueError: as `band_errors`.
    """
    if mask is None:
        return band_errors(teacher, y, transform, bands).mean(0)
    observed = torch.where(mask, y, teacher)
    return band_errors(teacher, observed, transform, bands).mean(0) / mask.float().mean()


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
        weighting: what each band counts for; a sequence of numbers is a `FixedWeighting`.

    Raises:
        ValueError: if the weighting does not fit the bands.

    Example:
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
        weighting: AbstractWeighting | Sequence[float],
    ) -> None:
        super().__init__()
        self.transform = transform
        self.bands = bands
        self.weighting: AbstractWeighting = (
            weighting if isinstance(weighting, AbstractWeighting) else FixedWeighting(weighting)
        )
        self.weighting.check(bands.n_bands)

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
    ) -> FrequencyTerms:
        """The loss of a batch with its errors and weights a band.

        Args:
            student: as `band_errors`.
            teacher: as `band_errors`.
            y: labels, for a weighting that measures the teacher against them.
            mask: which of them are observed.
            weights: in place of the weighting's.

        Raises:
            ValueError: as `band_errors`.
        """
        errors = band_errors(student, teacher, self.transform, self.bands).mean(0)
        if weights is None:
            weights = self.weighting(self._evidence(errors.detach(), teacher.detach(), y, mask))
        return FrequencyTerms((errors * weights).sum(), errors.detach(), weights)

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
