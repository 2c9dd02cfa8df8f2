"""Comparing teachers with their student on labelled data, which weighs the teachers.

What the comparison makes of them is in `losses.trust`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin._explained import explained
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.losses.trust import STUDENT, TEACHERS, TeacherReport, TeacherTrust
from sdkd_plugin.teachers import (
    TeacherOutput,
    accepted_inputs,
    call_model,
    checked_forecasts,
    evaluated,
    named_inputs,
)

Baselines = Mapping[str, Callable[[Tensor], Tensor]]


@explained
def measure_teachers(
    loss: DistillationLoss,
    student: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    baselines: Baselines = MappingProxyType({}),
) -> TeacherReport:
    """Compare teachers, student and baselines on labelled data, and weigh the teachers.

    Call it before training to see whether there is something to learn, best with a student that was
    trained alone, and at every validation: the best student so far counts. Use the same labels each
    time, which no teacher was trained on: on its own training data its errors are too small. It
    warns, once a loss, if a teacher is not the better one.

    Args:
        loss: its `trust` is updated.
        student: run in eval mode, without gradient.
        batches: ``{"x": ..., "y": ...}``, a ``mask`` of the labels, further inputs of the models,
            and the samples' ``index`` where the teachers' outputs are stored.
        baselines: further forecasts of ``x`` for the report, such as persistence.

    Raises:
        ValueError: if no label is observed, shapes differ, or a forecast is NaN or Inf.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> teacher, x = nn.Conv2d(1, 1, 3, padding=1), torch.randn(4, 1, 8, 8)
        >>> loss = DistillationLoss(teacher, GridTransform((8, 8)))
        >>> batch = {"x": x, "y": teacher(x).detach()}
        >>> measure_teachers(loss, nn.Conv2d(1, 1, 1), [batch]).weights
        tensor([1., 1.])
    """
    named = named_inputs(student)
    trust = loss.trust or TeacherTrust(loss.bands.n_bands)
    with evaluated(student), torch.no_grad():
        for batch in batches:
            x, y, mask = batch["x"], batch["y"], batch.get("mask")
            inputs = {k: v for k, v in batch.items() if k not in ("x", "y", "mask", "index")}
            forecast = call_model(student, x, accepted_inputs(named, inputs)).forecast
            known = {name: baseline(x) for name, baseline in baselines.items()}
            outputs = loss.outputs(batch.get("index"), x, inputs)
            judge(loss, trust, forecast, outputs, y, mask, known)
    return trust.update()


@torch.no_grad()
def judge(
    loss: DistillationLoss,
    trust: TeacherTrust,
    forecast: Float[Tensor, "batch ..."],
    outputs: Sequence[TeacherOutput],
    y: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "..."] | None = None,
    baselines: Mapping[str, Float[Tensor, "batch ..."]] = MappingProxyType({}),
) -> None:
    """Add a batch to a pass of ``trust``, for a student's forecast and the teachers' outputs."""
    given = forecast, loss.transform, loss.resolutions, loss.check_finite
    teachers = checked_forecasts(outputs, loss.names, *given)
    mean = teachers[0] if len(teachers) == 1 else torch.stack(teachers).mean(0)
    forecasts = {STUDENT: forecast, TEACHERS: mean, **baselines}
    if len(teachers) > 1:
        forecasts |= dict(zip(loss.names, teachers, strict=True))
    trust.add(forecasts, y, mask, loss.transform, loss.bands)
