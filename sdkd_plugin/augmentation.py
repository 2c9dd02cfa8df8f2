"""Function matching: inputs that nobody measured, shown to teacher and student alike.

Here live augmentations of inputs. An augmentation is any callable that returns a tensor of the
shape it was given; the label of an augmented input is unknown, so only the teacher speaks of it.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_finite, check_positive, check_shape

Augmentation = Callable[[Tensor], Tensor]
AugmentationName = Literal["mixup", "noise"]


class Mixup:
    """Mixes each sample with another one of the batch.

    Formula: ``x_b <- a_b x_b + (1 - a_b) x_p(b)`` with a random permutation p and a_b uniform in
    [0, 1], drawn for each sample.

    Args:
        generator: of the random numbers, on the CPU; torch's global one by default, as dropout
            draws.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> mixed = Mixup(torch.Generator().manual_seed(0))(x)
        >>> bool(((mixed >= 0) & (mixed <= 1)).all())
        True

    Source: Zhang et al. 2018, mixup; for function matching with a share drawn from the whole of
    [0, 1], Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent".
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __call__(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The mixed batch."""
        share = torch.rand(len(x), generator=self.generator).to(x)
        share = share.reshape(-1, *[1] * (x.ndim - 1))
        partner = torch.randperm(len(x), generator=self.generator).to(x.device)
        return torch.lerp(x[partner], x, share)


class GaussianNoise:
    """Adds white noise.

    Args:
        deviation: of the noise, in units of the inputs' own standard deviation over the batch.
        generator: as for `Mixup`.

    Raises:
        ValueError: if the deviation is not positive.

    Example:
        >>> GaussianNoise(0.1)(torch.zeros(2, 3))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """

    def __init__(self, deviation: float = 0.1, generator: torch.Generator | None = None) -> None:
        check_positive("deviation", deviation)
        self.deviation = deviation
        self.generator = generator

    def __call__(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The noisy batch."""
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        return x + self.deviation * x.std() * noise


def make_augmentation(augmentation: AugmentationName | Augmentation) -> Augmentation:
    """The augmentation of a name, with its defaults; a callable comes back as it is.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> type(make_augmentation("mixup")).__name__
        'Mixup'
    """
    if callable(augmentation):
        return augmentation
    check_choice("augmentation", augmentation, get_args(AugmentationName))
    return Mixup() if augmentation == "mixup" else GaussianNoise()


def augment(augmentation: Augmentation, x: Tensor, *, finite: bool) -> Tensor:
    """An augmented batch, after a check of it.

    Args:
        augmentation: any callable.
        x: inputs.
        finite: whether NaN and Inf are looked for, which waits for a GPU.

    Raises:
        ValueError: if the augmentation does not keep the shape, or makes NaN or Inf.
    """
    augmented = augmentation(x)
    check_shape("augmentation(x)", augmented.shape, x.shape, "an augmentation keeps the shape")
    if finite:
        check_finite("augmentation(x)", augmented)
    return augmented
