"""The task term: a forecast against labels, some of which may be missing."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sdkd_plugin._checks import check_mask, check_shape

TaskLoss = Callable[[Tensor, Tensor], Tensor]
"""Of forecast and labels: the loss of each element."""

TASK_LOSSES: Mapping[str, TaskLoss] = {
    "mse": partial(F.mse_loss, reduction="none"),
    "mae": partial(F.l1_loss, reduction="none"),
}
"""The task losses that have names."""


def observed_mean(
    loss: TaskLoss,
    forecast: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """Mean loss of the elements that are observed, 0 where none is.

    Args:
        loss: of each element; without a mask a scalar will do.
        forecast: the student's.
        y: labels, of the same shape; anything where they are masked out.
        mask: True where observed; of as many axes as ``y``, each of its size or 1.

    Raises:
        ValueError: if the shapes differ, the mask does not fit, or the loss with a mask is not one
            of elements.

    Example:
        >>> y = torch.tensor([[1.0, float("nan")]])
        >>> observed_mean(TASK_LOSSES["mse"], torch.zeros(1, 2), y, torch.tensor([[True, False]]))
        tensor(1.)
    """
    check_shape("y", y.shape, forecast.shape, "the student's forecast")
    if mask is None:
        return loss(forecast, y).mean()
    check_mask(mask, y)
    mask = mask.expand_as(y)
    # What was not observed may be NaN, and NaN times a mask of 0 would still be NaN.
    errors = loss(forecast, torch.where(mask, y, forecast.detach().to(y.dtype)))
    check_shape("task_loss", errors.shape, y.shape, "with a mask it is the loss of elements")
    # A sum of many half-precision numbers would overflow.
    dtype = torch.promote_types(errors.dtype, torch.float32)
    return torch.where(mask, errors, 0).sum(dtype=dtype) / mask.sum().clamp_min(1)
