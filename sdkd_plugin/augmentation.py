"""Function matching: augmented inputs on which student and teacher are compared, without labels.

An augmentation is any callable that returns a tensor of the shape of its argument.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_positive, checked_generator
from sdkd_plugin._explained import explained

Augmentation = Callable[[Tensor], Tensor]
AugmentationName = Literal["mixup", "noise"]


@explained
class Mixup:
    """Mixes each sample with another one of the batch.

    Formula: ``x_b <- a_b x_b + (1 - a_b) x_p(b)`` with a random permutation p and a_b uniform in
    [0, 1], drawn for each sample.

    Args:
        generator: of the random numbers, on the CPU; torch's global one by default.

    Example:
        >>> Mixup(torch.Generator().manual_seed(0))(torch.ones(2, 1)).tolist()
        [[1.0], [1.0]]

    Source: Zhang et al. 2018, mixup; with shares from [0, 1] for function matching: Beyer et al.
    2022, "Knowledge distillation: a good teacher is patient and consistent".
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = checked_generator(generator)

    @explained
    def __call__(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The mixed batch."""
        share = torch.rand(len(x), *[1] * (x.ndim - 1), generator=self.generator).to(x)
        partner = torch.randperm(len(x), generator=self.generator).to(x.device)
        return torch.lerp(x[partner], x, share)


@explained
class GaussianNoise:
    """Adds white noise.

    Args:
        deviation: of the noise, in units of the inputs' standard deviation over the batch.
        generator: of the random numbers, on the CPU; torch's global one by default.

    Raises:
        ValueError: if the deviation is not positive.

    Example:
        >>> GaussianNoise(0.1)(torch.zeros(3))
        tensor([0., 0., 0.])
    """

    def __init__(self, deviation: float = 0.1, generator: torch.Generator | None = None) -> None:
        check_positive("deviation", deviation)
        self.deviation = deviation
        self.generator = checked_generator(generator)

    @explained
    def __call__(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The noisy batch."""
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        return x + self.deviation * x.std(correction=0) * noise


def make_augmentation(augmentation: AugmentationName | Augmentation) -> Augmentation:
    """The augmentation of a name, with its defaults; a callable is returned as it is."""
    if callable(augmentation):
        return augmentation
    check_choice("augmentation", augmentation, get_args(AugmentationName))
    return Mixup() if augmentation == "mixup" else GaussianNoise()
