"""What a model says of a batch: calling it with what it takes, reading its taps.

Here live the teachers' answers and how they are asked for. What is done with them: `distiller`.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from sdkd_plugin._checks import check_finite, check_shape
from sdkd_plugin.spectral import AbstractTransform, Bands, GridTransform
from sdkd_plugin.spectral.crop import complete_frequencies
from sdkd_plugin.spectral.transform import working_dtype
from sdkd_plugin.taps import TapReader

Resolutions = Literal["equal", "shared"]


class TeacherAnswer(NamedTuple):
    """What a teacher says of a batch: its forecast, and the latents of the tapped places."""

    forecast: Tensor
    latents: Mapping[str, Tensor]


def ask(
    model: nn.Module, x: Tensor, inputs: Mapping[str, Any], taps: Sequence[str]
) -> TeacherAnswer:
    """A model's forecast of a batch and the activations of its taps.

    Args:
        model: called as ``model(x, **inputs)`` with those inputs that its forward accepts.
        x: inputs, the first axis the batch.
        inputs: by name.
        taps: as `TapReader` takes them.

    Raises:
        ValueError: if a tap does not exist or was not reached, or the forecast is no tensor.
    """
    with TapReader(model, taps) as reader:
        forecast = model(x, **accepted_inputs(model, inputs))
    if not isinstance(forecast, Tensor):
        raise ValueError(
            f"`{type(model).__name__}` forecasts a {type(forecast).__name__}, expected one tensor: "
            "give a module that returns the forecast alone."
        )
    return TeacherAnswer(forecast, reader.read())


def check_answers(
    answers: Sequence[TeacherAnswer],
    teachers: Sequence[nn.Module],
    forecast: Tensor,
    transform: AbstractTransform,
    *,
    resolutions: Resolutions,
    finite: bool,
) -> list[TeacherAnswer]:
    """The teachers' answers on the student's grid, after a check of each.

    Where other resolutions are allowed, a forecast of one comes back at the student's with the
    frequencies that both have; for the others the student's own stand, so that they count for
    nothing in the loss. What judges a teacher by labels or energies sees the student's there.

    Args:
        answers: one a teacher.
        teachers: for their names.
        forecast: the student's.
        transform: the domain of the student's forecast.
        resolutions: whether a teacher's grid may have another resolution.
        finite: whether NaN and Inf are looked for, which waits for a GPU.

    Raises:
        ValueError: naming the teacher, if an answer is missing, has another shape than the
            student's forecast (but for the resolution, where that is allowed), or is NaN or Inf.
    """
    if len(answers) != len(teachers):
        raise ValueError(
            f"`answers` has {len(answers)} answers, expected {len(teachers)}: one for each teacher."
        )
    checked = []
    for i, (teacher, answer) in enumerate(zip(teachers, answers, strict=True)):
        name = f"teacher {i} ({type(teacher).__name__})"
        theirs = answer.forecast.detach()
        if finite:
            check_finite(f"forecast of {name}", theirs)
            for tap, latent in answer.latents.items():
                check_finite(f"latent {tap!r} of {name}", latent)
        if isinstance(transform, GridTransform) and _differs_in_resolution(
            theirs, forecast, transform
        ):
            if resolutions == "equal":
                raise ValueError(
                    f"`forecast of {name}` has shape {tuple(theirs.shape)}, expected "
                    f"{tuple(forecast.shape)} (the student's forecast); if its resolution is meant "
                    "to be another, give the distiller resolutions='shared'."
                )
            grid = transform.resized(tuple(theirs.shape[axis] for axis in transform.domain_axes))
            mine = forecast.detach()
            # Half-precision rounding would be a difference in all bands.
            mine, theirs = mine.to(working_dtype(mine)), theirs.to(working_dtype(theirs))
            theirs = complete_frequencies(theirs, mine, grid, transform)
        else:
            check_shape(
                f"forecast of {name}", theirs.shape, forecast.shape, "the student's forecast"
            )
        checked.append(TeacherAnswer(theirs, answer.latents))
    return checked


def warn_of_empty_bands(
    answers: Sequence[TeacherAnswer],
    teachers: Sequence[nn.Module],
    transform: AbstractTransform,
    bands: Bands,
) -> None:
    """Say in which bands a teacher's forecasts are nothing at all: there the student is drawn to 0.

    Args:
        answers: one a teacher, as `check_answers` gives them.
        teachers: for their names.
        transform: the domain of the forecasts.
        bands: of its frequencies.
    """
    for i, (teacher, answer) in enumerate(zip(teachers, answers, strict=True)):
        energy = transform.sample_band_energy(answer.forecast, bands).sum(0)
        if empty := (energy == 0).nonzero()[:, 0].tolist():
            warnings.warn(
                f"the forecast of teacher {i} ({type(teacher).__name__}) is 0 in the bands "
                f"{empty} (0 is the lowest): there the student is drawn to 0; choose other bands "
                "if that is not meant.",
                stacklevel=2,
            )


def _differs_in_resolution(theirs: Tensor, mine: Tensor, transform: GridTransform) -> bool:
    """Whether two fields have the same axes, and the sizes of the grid's alone differ."""
    axes = len(transform.shape)
    return (
        theirs.ndim == mine.ndim
        and theirs.shape[:-axes] == mine.shape[:-axes]
        and theirs.shape[-axes:] != mine.shape[-axes:]
        and mine.shape[-axes:] == transform.shape
    )


def forward_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of a model's forward, without its first."""
    return list(inspect.signature(model.forward).parameters)[1:]


def accepted_inputs(
    model: nn.Module, inputs: Mapping[str, Any], *, named_only: bool = False
) -> dict[str, Any]:
    """Those of the named inputs that a model's forward takes, by name or in its ``**kwargs``.

    With ``named_only`` what a model would take into its ``**kwargs`` is left out.

    Example:
        >>> accepted_inputs(nn.Bilinear(2, 2, 1), {"input2": 1, "edge_index": 2})
        {'input2': 1}
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if not named_only and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(inputs)
    names = {p.name for p in parameters}
    return {name: value for name, value in inputs.items() if name in names}
