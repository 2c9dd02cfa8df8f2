"""Teacher-bounded regression: which samples still have something to learn from the teacher.

Here lives the choice of samples; what is learned from them is the frequency-aligned loss.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def bounded_samples(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    margin: float,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, " batch"]:
    """1 for samples whose student is not better than the teacher by the margin, 0 for others.

    Formula: ``|student - y|^2 + margin > |teacher - y|^2``, means over the observed elements of a
    sample. A sample without an observed label counts.

    Args:
        student: forecast.
        teacher: forecast, of the same shape.
        y: labels, of the same shape; anything where they are masked out.
        margin: in units of the squared error, at least 0.
        mask: True where observed; of as many axes as ``y``, each of its size or 1.

    Returns:
        without gradient, float32 or float64.

    Example:
        >>> y = torch.zeros(2, 1)
        >>> bounded_samples(torch.tensor([[1.0], [3.0]]), torch.full((2, 1), 2.0), y, 0.5)
        tensor([0., 1.])

    Source: Chen et al. 2017, "Learning efficient object detection models with knowledge
    distillation", eq. 4, there for the four numbers of a box, which then follow the label; here
    they follow the teacher.
    """
    observed = torch.ones_like(y, dtype=torch.bool) if mask is None else mask.expand_as(y)
    dtype = torch.promote_types(student.dtype, torch.float32)
    number = observed.flatten(1).sum(1)
    mine, theirs = (
        torch.where(observed, field.detach().to(dtype) - y, 0).square().flatten(1).sum(1)
        for field in (student, teacher)
    )
    follows = (number == 0) | (mine + margin * number > theirs)
    return follows.to(dtype)
