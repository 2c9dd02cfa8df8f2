"""Squared differences of two fields, band by band.

Here live the errors alone; what each band counts for is in `weighting`, the loss in `frequency`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sdkd_plugin._checks import check_shape
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
