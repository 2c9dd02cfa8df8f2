"""Derivative matching: student and teacher answer alike to a small change of their inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_positive, check_shape, check_within, checked_generator
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral import AbstractTransform, Bands


@explained
@dataclass
class DerivativeMatching:
    """The squared difference of the derivatives of student and teacher in a random direction.

    Formula: ``weight * mean(((s(x + h v) - s(x)) - (t(x + h v) - t(x)))^2) / h^2`` with directions
    v of root mean square 1, white within one band, which is drawn for each batch, all with the same
    probability. So the error growth of a roll-out is matched at each scale. It costs one more
    forecast of either. Dropout would differ between the two forecasts: turn it off.

    Args:
        weight: beside the other terms; an error of a derivative has the units of a gain.
        size: h, from 1e-6 to 1e3, in units of the standard deviation of ``x`` over the batch.
        generator: of the random numbers, on the CPU; torch's global one by default.

    Raises:
        ValueError: if a number is out of its range.

    Source: Czarnecki et al. 2017, Sobolev training, arXiv 1706.04859; as finite differences and
    with directions by band, our own.
    """

    weight: float = 1.0
    size: float = 0.01
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)
        check_within("size", self.size, "[1e-6, 1e3]")
        checked_generator(self.generator)

    def __call__(
        self,
        student: Callable[[Tensor], Tensor],
        teacher: Callable[[Tensor], Tensor],
        x: Float[Tensor, "batch ..."],
        forecast: Float[Tensor, "batch ..."],
        target: Float[Tensor, "batch ..."],
        transform: AbstractTransform,
        bands: Bands,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        ``forecast`` and ``target`` are those of student and teacher for ``x``, of one shape; ``x``
        lies on the domain. The teacher runs without gradient.
        """
        check_shape("target", target.shape, forecast.shape, "the student's forecast")
        h = self.size * x.std(correction=0).clamp_min(torch.finfo(x.dtype).eps)
        moved = x + h * random_directions(x, transform, bands, self.generator)
        with torch.no_grad():
            theirs = teacher(moved) - target
        return self.weight * ((student(moved) - forecast - theirs) / h).square().mean()


def random_directions(
    x: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch ..."]:
    """White noise of a band drawn at random, each sample with root mean square 1, shaped as ``x``.

    In an empty band it is 0.
    """
    band = int(torch.randint(bands.n_bands, (), generator=generator))
    noise = torch.randn(x.shape, generator=generator).to(x)
    noise = transform.filter(noise, lambda frequency: bands(frequency)[band].sqrt())
    size = noise.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (x.ndim - 1))
    # An empty band's noise is the transform's round-off.
    return torch.where(size > 1e-5, noise / size.clamp_min(1e-5), 0)
