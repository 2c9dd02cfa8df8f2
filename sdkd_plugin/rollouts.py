"""Roll-outs: a model that goes on from its own forecasts, step by step.

Frames lie along axis 1, as channels of a grid or as time steps of a graph. An input has the newest
frames: a forecast is appended to it and as many of the oldest frames are dropped.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_positive_int


def advanced(x: Tensor, forecast: Tensor) -> Tensor:
    """The next inputs: the forecast is appended, and the oldest frames are dropped."""
    return torch.cat([x, forecast], 1)[:, -x.shape[1] :]


def rollout(
    model: Callable[..., Tensor],
    x: Float[Tensor, "batch frames ..."],
    steps: int,
    *,
    through_time: bool = True,
    **inputs: Any,
) -> Float[Tensor, "batch steps ..."]:
    """A model's forecasts, each made from the one before.

    Args:
        model: called ``steps`` times.
        x: inputs of the first call, with at least as many frames as a forecast.
        steps: calls.
        through_time: whether gradients pass from a step to the steps before it; without, each step
            is trained for its input as it came.
        **inputs: of every call; they do not move on in time.

    Returns:
        forecasts of all steps, ``(batch, steps, *shape of a forecast's sample)``.

    Raises:
        ValueError: if ``steps`` is not a positive integer.

    Example:
        >>> rollout(lambda x: 2 * x, torch.ones(1, 1), 3)
        tensor([[[2.],
                 [4.],
                 [8.]]])
    """
    check_positive_int("steps", steps)
    forecasts = [model(x, **inputs)]
    while len(forecasts) < steps:
        last = forecasts[-1] if through_time else forecasts[-1].detach()
        x = advanced(x, last)
        forecasts.append(model(x, **inputs))
    return torch.stack(forecasts, 1)


class Unrolled(nn.Module):
    """A model whose forecast is its roll-out, to be compared with labels or a teacher's roll-out.

    ``SDKDDistiller(Unrolled(teacher, 3), Unrolled(student, 3), ...)`` trains the student for three
    steps in a row; the labels have three times the frames.

    Args:
        model: of one step.
        steps: as of `rollout`, with ``through_time``.

    Raises:
        ValueError: if ``steps`` is not a positive integer.

    Example:
        >>> Unrolled(nn.Conv1d(1, 1, 3, padding=1), 4)(torch.randn(2, 1, 8)).shape
        torch.Size([2, 4, 8])

    Source: without gradient through time: List et al. 2024, arXiv 2402.12971.
    """

    def __init__(self, model: nn.Module, steps: int, *, through_time: bool = True) -> None:
        super().__init__()
        check_positive_int("steps", steps)
        self.model, self.steps, self.through_time = model, steps, through_time

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """The forecasts of all steps, one behind the other along axis 1."""
        through_time = self.through_time
        return rollout(self.model, x, self.steps, through_time=through_time, **inputs).flatten(1, 2)

    def extra_repr(self) -> str:
        """The options, for ``print`` and fingerprints."""
        return f"steps={self.steps}, through_time={self.through_time}"
