"""The frequency-aligned loss: how far a student is from its teacher, band by band.

Here live the errors of the bands and the loss. The weights of the bands are in `band_weights`, the
quadratic form and its gradient in `sdkd_plugin.spectral.basis`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_finite, check_labels, check_shape, check_type
from sdkd_plugin._explained import explained
from sdkd_plugin.losses.amplitude import AMSE
from sdkd_plugin.losses.band_weights import (
    AbstractWeighting,
    BandEvidence,
    ConfidenceWeighting,
    FixedWeighting,
    WeightingName,
    make_weighting,
)
from sdkd_plugin.spectral import AbstractTransform, Bands


def band_errors(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
) -> Float[Tensor, "batch n_bands"]:
    """Mean squared difference of two fields in each band; its sum over the bands is the MSE.

    Formula: ``e[b, i] = <d, g_i(L) d> / (elements of a sample)``, d = student - teacher and g_i
    the power weights of band i: one transform of the difference. It is float32, or float64 if
    either field is, and differentiable in both.

    Args:
        student: forecast or latent on the transform's domain.
        teacher: of the same shape.
        transform: the domain.
        bands: the partition of its frequencies.

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
    if student.shape != teacher.shape:
        check_shape("student", student.shape, teacher.shape, "the teacher's shape")
    # The difference of two half-precision fields has few digits left unless taken in float32.
    dtype = torch.promote_types(student.dtype, torch.promote_types(teacher.dtype, torch.float32))
    energy = transform.sample_band_energy(student.to(dtype) - teacher.to(dtype), bands)
    return energy / (student.numel() // len(student))


def observed_band_errors(
    teacher: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, " n_bands"]:
    """Mean squared error of a forecast in each band, from the labels that are observed.

    The error is set to 0 where a label is missing, and the mean over the batch is divided by the
    observed share; it is NaN if nothing is observed. For labels missing at random the total is
    unbiased; within it, error moves from the bands where it belongs to all others.
    """
    if mask is None:
        return band_errors(teacher, y, transform, bands).mean(0)
    observed = torch.where(mask, y, teacher)
    return band_errors(teacher, observed, transform, bands).mean(0) / mask.float().mean()


@explained
def frequency_aligned_loss(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
    weights: Sequence[float],
) -> Float[Tensor, ""]:
    """Batch mean of the weighted band errors: ``<d, g(L) d>`` with ``g = sum_i w_i g_i``.

    With two bands and weights ``(alpha, 1)`` this is the paper's
    ``||Psi_h(s) - Psi_h(t)||^2 + alpha ||Psi_l(s) - Psi_l(t)||^2``, a mean per element. With all
    weights 1 it *is* the MSE.

    Args:
        student: forecast or latent on the transform's domain.
        teacher: of the same shape.
        transform: the domain.
        bands: the partition of its frequencies.
        weights: of the bands, from low to high, finite and at least 0.

    Raises:
        ValueError: if shapes differ, or there is not one weight a band.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> field = torch.randn(4, 3, 8, 8)
        >>> transform, bands = GridTransform((8, 8)), Bands.split(0.25)
        >>> float(frequency_aligned_loss(field, field, transform, bands, (1.0, 2.0)))
        0.0

    Source: arXiv 2507.02939, eq. for L_KD. The paper states neither cutoff nor alpha.
    """
    return FrequencyAlignedLoss(transform, bands, FixedWeighting(weights))(student, teacher)


class FrequencyTerms(NamedTuple):
    """A frequency-aligned loss with its gradient, the bands' mean squared errors, their weights."""

    total: Float[Tensor, ""]
    errors: Float[Tensor, " n_bands"]
    weights: Float[Tensor, " n_bands"]


@explained
class FrequencyAlignedLoss(nn.Module):
    """The frequency-aligned loss of a domain, with a weighting of its bands.

    Args:
        transform: the domain of the fields.
        bands: the partition of its frequencies.
        weighting: ``fixed``, ``relative``, ``adaptive``, ``confidence``, numbers from the lowest
            band to the highest, or an `AbstractWeighting`.
        amse: counts lost amplitude too; the measured errors stay the mean squared ones.

    Raises:
        ValueError: if the weighting is unknown or does not fit the bands.

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
        weighting: WeightingName | AbstractWeighting | Sequence[float],
        *,
        amse: AMSE | None = None,
    ) -> None:
        super().__init__()
        if amse is not None:
            check_type("amse", amse, AMSE, "or None")
        check_type("transform", transform, AbstractTransform, "such as GridTransform((64, 64))")
        check_type("bands", bands, Bands, "such as Bands.split(0.25)")
        self.transform = transform
        self.bands = bands
        self.weighting = make_weighting(weighting, bands.n_bands)
        self.amse = AMSE(0.0) if amse is None else amse

    @property
    def needs_labels(self) -> bool:
        """Whether labels are used beside the teacher."""
        return self.weighting.needs_teacher_error or self.amse.needs_labels

    def forward(
        self,
        student: Float[Tensor, "batch ..."],
        teacher: Float[Tensor, "batch ..."],
        weights: Float[Tensor, " n_bands"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch, with the weighting's band weights or the given ones."""
        return self.terms(student, teacher, weights=weights).total

    def terms(
        self,
        student: Float[Tensor, "batch ..."],
        teacher: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        weights: Float[Tensor, " n_bands"] | None = None,
        sample_weights: Float[Tensor, " batch"] | None = None,
        trust: Float[Tensor, " n_bands"] | None = None,
    ) -> FrequencyTerms:
        """The loss of a batch with the unweighted errors and the weights of its bands.

        Args:
            student: on the domain.
            teacher: of the same shape.
            y: labels, for a weighting or an amplitude that is measured from them.
            mask: True where a label is observed.
            weights: of the bands, in place of the weighting's.
            sample_weights: of the samples in ``total``, 1 by default. The errors, and what the
                weighting measures, are those of all samples.
            trust: factors of the weights, 1 by default.
        """
        errors = band_errors(student, teacher, self.transform, self.bands)
        mean = errors.mean(0)
        measured = mean.detach()
        if weights is None:
            weighting, energy, error = self.weighting, None, None
            if weighting.training or weighting.needs_in_eval:
                given = teacher.detach()
                if weighting.needs_teacher_energy:
                    energy = self._energy(given)
                if weighting.needs_teacher_error and y is not None:
                    error = observed_band_errors(given, y, self.transform, self.bands, mask)
            weights = weighting(BandEvidence(measured, energy, error))
        if trust is not None:
            weights = weights * trust.to(weights)
        each = errors
        if self.amse.weight:
            fields = student, teacher, self.transform, self.bands
            each = each + self.amse.excess(*fields, y, mask)
        if sample_weights is not None:
            each = sample_weights[:, None] * each
        if each is not errors:
            mean = each.mean(0)
        return FrequencyTerms((mean * weights).sum(), measured, weights)

    @torch.no_grad()
    def measure(
        self,
        teacher: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> None:
        """Measure the teacher's error in each band on labelled data, for `ConfidenceWeighting`.

        Call it once a batch before training, on data that the teacher was not trained on. For
        labels missing at random the error's total is unbiased. It waits for the device.

        Args:
            teacher: its forecast, on the domain.
            y: labels, of the same shape; any value where ``mask`` is False.
            mask: True where observed; as many axes as ``y``, each of its size or 1.

        Raises:
            ValueError: if the weighting is not a `ConfidenceWeighting`, shapes differ, nothing is
                observed, or a value is NaN or Inf.
        """
        weighting = self.weighting
        if not isinstance(weighting, ConfidenceWeighting):
            raise ValueError(
                f"`weighting` is a {type(weighting).__name__}, expected a ConfidenceWeighting: "
                "nothing else is measured beforehand."
            )
        check_shape("y", y.shape, teacher.shape, "the teacher's forecast")
        check_finite("teacher", teacher)
        check_labels(y, mask)
        share = 1.0 if mask is None else float(mask.float().mean())
        if share == 0:
            raise ValueError("`mask` is False everywhere, expected an observed label.")
        error = observed_band_errors(teacher, y, self.transform, self.bands, mask)
        averages, weight = weighting.averages, len(y) * share
        averages.follow(error, self._energy(teacher), weight / (averages.weight + weight), weight)

    def _energy(self, teacher: Tensor) -> Tensor:
        energy = self.transform.sample_band_energy(teacher, self.bands).mean(0)
        return energy / (teacher.numel() // len(teacher))
