"""On-policy distillation: a teacher is asked about states that the student itself has reached.

A forecast from forecasts meets inputs that no data set has; labels for them do not exist, a
teacher's answers do. Roll-outs that gradients pass through are in `rollouts`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import (
    check_choice,
    check_finite,
    check_positive_int,
    check_shape,
    check_type,
    check_within,
    checked_generator,
    shown,
)
from sdkd_plugin._explained import explained
from sdkd_plugin.augmentation import Augmentation, AugmentationName, make_augmentation
from sdkd_plugin.rollouts import advanced
from sdkd_plugin.teachers import evaluated

StudentAugmentation = AugmentationName | Literal["on-policy"] | Augmentation


@explained
class OnPolicy:
    """An augmentation that moves inputs along the student's own roll-out.

    The student is rolled out in eval mode and without gradient for a number of steps that is drawn
    for each batch, uniformly from 0 to ``max_steps``; student and teacher are compared on the state
    that it has reached. Forecasts and inputs have the same units, and further inputs stay as they
    are.

    A teacher's answer about a diverged state is worth nothing. So a sample whose next state is NaN
    or beyond ``bound`` times the training states, in its largest magnitude or its root mean square,
    stays in the last state that is not, and is counted.

    With a teacher as ``model`` inputs move along the teacher's roll-out; `states` returns all that
    it meets there, inputs without labels.

    Args:
        model: the student, of one step; or a teacher.
        max_steps: the longest roll-out.
        states: training inputs, whose largest sizes the bound is for; each batch's own by default.
        bound: above 1, for true states are inside.
        generator: of the random numbers, on the CPU; torch's global one by default.

    Attributes:
        seen: samples so far.
        diverged: those of them that were stopped at the bound, a tensor.

    Raises:
        ValueError: if ``max_steps`` is not a positive integer, or the bound is not above 1.

    Example:
        >>> double = nn.Conv1d(1, 1, 1, bias=False)
        >>> _ = nn.init.constant_(double.weight, 2.0)
        >>> policy = OnPolicy(double, 9, bound=5.0, generator=torch.Generator().manual_seed(0))
        >>> policy(torch.ones(1, 1, 1)).item(), int(policy.diverged)
        (4.0, 1)

    Source: dataset aggregation, Ross et al. 2011, arXiv 1011.0686; for language models Agarwal et
    al. 2024, arXiv 2306.13649; without gradient through time, List et al. 2024, arXiv 2402.12971.
    """

    def __init__(
        self,
        model: nn.Module,
        max_steps: int = 4,
        *,
        states: Float[Tensor, "samples ..."] | None = None,
        bound: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_positive_int("max_steps", max_steps)
        check_within("bound", bound, "(1, inf)")
        check_type("model", model, nn.Module, "whose forecasts are its next inputs")
        if states is not None and (states.ndim < 2 or not states.numel()):
            raise ValueError(f"`states` is {shown(states)}, expected a batch of samples.")
        self.model, self.max_steps = model, max_steps
        self.bound, self.generator = bound, checked_generator(generator)
        self.limit = None if states is None else _sizes(states).amax(0)
        self.seen, self.diverged = 0, torch.zeros((), dtype=torch.long)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "batch frames ..."], **inputs: Any) -> Tensor:
        """The states that the student reaches from a batch of inputs."""
        steps = int(torch.randint(self.max_steps + 1, (), generator=self.generator))
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for moved, still in self._roll_out(x, steps, inputs):
            x, inside = moved, still
        self.seen += len(x)
        self.diverged = self.diverged.to(x.device) + (~inside).sum()
        return x

    @torch.no_grad()
    def states(self, x: Float[Tensor, "batch frames ..."], **inputs: Any) -> Tensor:
        """All states of the roll-outs from ``x``, ``(max_steps * batch, frames, ...)``.

        The batch of the first step comes first. A roll-out that diverges repeats its last state.
        """
        return torch.cat([state for state, _ in self._roll_out(x, self.max_steps, inputs)])

    def _roll_out(
        self, x: Tensor, steps: int, inputs: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch after each step, and which of its samples have not diverged."""
        limit = self.bound * (_sizes(x).amax(0) if self.limit is None else self.limit.to(x.device))
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        with evaluated(self.model):
            for _ in range(steps):
                forecast = self.model(x, **inputs)
                check_shape("model(x)", forecast.shape[2:], x.shape[2:], "the grid of x")
                state = advanced(x, forecast)
                inside = inside & (_sizes(state) <= limit).all(1)
                x = torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), state, x)
                yield x, inside


def augmentation_for(
    student: nn.Module, augmentation: StudentAugmentation | None
) -> Augmentation | None:
    """The augmentation of a name for a student, with its defaults; a callable as it is."""
    if augmentation is None or callable(augmentation):
        return augmentation
    check_choice("augmentation", augmentation, (*get_args(AugmentationName), "on-policy"))
    if augmentation == "on-policy":
        return OnPolicy(student)
    return make_augmentation(augmentation)


def augmented(
    augmentation: Augmentation, x: Tensor, inputs: Mapping[str, Any], *, finite: bool
) -> Tensor:
    """Augmented inputs, checked; the student's further ``inputs`` are for `OnPolicy` alone."""
    moved = augmentation(x, **inputs) if isinstance(augmentation, OnPolicy) else augmentation(x)
    check_type("augmentation(x)", moved, Tensor, "it returns moved inputs")
    check_shape("augmentation(x)", moved.shape, x.shape, "it keeps the shape")
    if finite:
        check_finite("augmentation(x)", moved)
    return moved


def _sizes(x: Tensor) -> Float[Tensor, "batch 2"]:
    """Largest magnitude and root mean square of each sample."""
    flat = x.flatten(1).float()
    return torch.stack([flat.abs().amax(1), flat.square().mean(1).sqrt()], 1)
