"""The task term: a forecast against labels, some of which may be missing.

Every squared error of the package that knows of missing labels comes from `sample_errors`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_shape

TaskLossName = Literal["mse", "mae", "relative_l2"]
TaskLoss = Callable[[Tensor, Tensor], Tensor]
"""Of forecast and labels: the loss of each element, or of each sample."""


def relative_l2(
    forecast: Float[Tensor, "batch ..."], y: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """``||forecast - y||_2 / (||y||_2 + 1e-8)`` of each sample, as neuraloperator's ``LpLoss``."""
    norm = partial(torch.linalg.vector_norm, dim=1)
    return norm((forecast - y).flatten(1)) / (norm(y.flatten(1)) + 1e-8)


TASK_LOSSES: Mapping[str, TaskLoss] = {
    "mse": partial(F.mse_loss, reduction="none"),
    "mae": partial(F.l1_loss, reduction="none"),
    "relative_l2": relative_l2,
}


def make_task_loss(loss: TaskLossName | TaskLoss) -> TaskLoss:
    """The task loss of a name; a function is returned as it is."""
    if isinstance(loss, type):
        raise ValueError(f"`task_loss` is the class {loss.__name__}, expected one made of it.")
    if callable(loss):
        return loss
    check_choice("task_loss", loss, TASK_LOSSES)
    return TASK_LOSSES[loss]


def masked_error(
    forecast: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "..."] | None = None,
    loss: TaskLossName | TaskLoss = "mse",
) -> Float[Tensor, ""]:
    """Mean loss over the observed labels; 0 if no label is observed.

    Where a label is missing, forecast and label are both set to 0 before the loss is computed.
    A loss of each sample, such as `relative_l2`, is averaged over the samples with a label.

    Args:
        forecast: the student's.
        y: labels, of the same shape; any value, NaN included, where ``mask`` is False.
        mask: True where observed; as many axes as ``y``, each of its size or 1.
        loss: ``mse``, ``mae``, ``relative_l2``, or a function that returns the loss of each
            element (the shape of ``y``) or of each sample (shape ``(batch,)``).

    Raises:
        ValueError: if the shapes differ, the name is unknown, or the function returns another
            shape. A scalar is refused: whether it is a mean or a sum over the batch is unknown.

    Example:
        >>> y = torch.tensor([[1.0, float("nan")]])
        >>> masked_error(torch.zeros(1, 2), y, torch.tensor([[True, False]]))
        tensor(1.)
    """
    check_shape("y", y.shape, forecast.shape, "the student's forecast")
    function = make_task_loss(loss)
    if mask is not None:
        mask = mask.expand_as(y)
        # A missing label may be NaN, and the gradient of NaN times 0 is NaN.
        forecast, y = torch.where(mask, forecast, 0), torch.where(mask, y, 0)
    errors = function(forecast, y)
    if errors.shape not in (y.shape, y.shape[:1]):
        raise ValueError(
            f"`task_loss` returns a tensor of shape {tuple(errors.shape)}, expected "
            f"{tuple(y.shape)} (a loss of each element) or {tuple(y.shape[:1])} (of each sample): "
            "call torch's losses with reduction='none'."
        )
    if mask is None:
        return errors.mean()
    kept = mask if errors.shape == y.shape else mask.flatten(1).any(1)
    # A sum of many half-precision numbers would overflow.
    dtype = torch.promote_types(errors.dtype, torch.float32)
    return torch.where(kept, errors, 0).sum(dtype=dtype) / kept.sum().clamp_min(1)


def sample_errors(
    forecast: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Mean squared error of each sample over its observed labels, and which samples have any.

    The errors are at least float32, without gradient, and 0 for a sample without labels.
    """
    check_shape("y", y.shape, forecast.shape, "the forecast")
    observed = torch.ones_like(y, dtype=torch.bool) if mask is None else mask.expand_as(y)
    dtype = torch.promote_types(forecast.dtype, torch.float32)
    squares = torch.where(observed, forecast.detach().to(dtype) - y, 0).square()
    count = observed.flatten(1).sum(1)
    return squares.flatten(1).sum(1) / count.clamp_min(1), count > 0
