"""Teachers: private frozen copies of any callable model, and their outputs.

Here live the copies, the call of a model with the inputs it accepts and the checks of what it
returns. What is learned from the outputs is in `loss`, what keeps them in `cache`.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.parallel import DistributedDataParallel

from sdkd_plugin._checks import check_finite, check_shape, shown, warn_caller
from sdkd_plugin.rollouts import Unrolled
from sdkd_plugin.spectral import AbstractTransform, Bands, GridTransform, ProductTransform
from sdkd_plugin.spectral.crop import complete_frequencies
from sdkd_plugin.spectral.transform import working_dtype
from sdkd_plugin.taps import TapReader, tap_path

Resolutions = Literal["equal", "shared"]
Teacher = Callable[..., Tensor]
Module = TypeVar("Module")


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's forecast ``(batch, ...)`` and latents ``(batch, ...)`` by tap."""

    forecast: Tensor
    latents: Mapping[str, Tensor] = field(default_factory=dict)

    def select(self, rows: Int[Tensor, " rows"]) -> "TeacherOutput":
        """The output for some of the samples."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "TeacherOutput":
        """The output on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TeacherOutput":
        latents = {tap: change(latent) for tap, latent in self.latents.items()}
        return TeacherOutput(change(self.forecast), latents)


class FunctionTeacher(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Teacher) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """The function's value."""
        return self.function(x, **inputs)


def frozen_copies(teacher: Teacher | Sequence[Teacher]) -> tuple[nn.Module, ...]:
    """A private copy of each teacher in eval mode without gradients; its weights share memory.

    The originals are not changed. A scripted, traced or exported teacher is copied with its
    weights. DistributedDataParallel is taken off.
    """
    several = isinstance(teacher, nn.ModuleList) or (
        isinstance(teacher, Iterable) and not callable(teacher) and not isinstance(teacher, str)
    )
    given = tuple(cast(Sequence[Teacher], teacher)) if several else (cast(Teacher, teacher),)
    if not given:
        raise ValueError("`teacher` is an empty sequence, expected at least one teacher.")
    return tuple(_frozen_copy(each) for each in given)


def _frozen_copy(teacher: Teacher) -> nn.Module:
    if not callable(teacher) or isinstance(teacher, type):
        raise ValueError(
            f"`teacher` is {shown(teacher)}, expected a module, a function, or a sequence of them: "
            "load a trained model first."
        )
    if not isinstance(teacher, nn.Module):
        return FunctionTeacher(teacher)
    model = teacher.module if isinstance(teacher, DistributedDataParallel) else teacher
    try:
        copied = aliased_copy(model)
    except Exception as error:  # whatever a foreign module's members raise when they are copied
        raise ValueError(
            f"`teacher` {type(model).__name__} cannot be copied ({error}): give the plain module, "
            "or a function that calls it."
        ) from error
    for parameter in copied.parameters():
        parameter.requires_grad = False
    graphs = (module.graph for module in copied.modules() if isinstance(module, GraphModule))
    if any(_trains(node) for graph in graphs for node in graph.nodes):
        raise ValueError(
            f"`teacher` {type(model).__name__} was exported in training mode, expected eval mode: "
            "call `eval()` before `torch.export.export`."
        )
    return copied.eval()


def _trains(node: Node) -> bool:
    """Whether an operator of an exported program drops out or follows a batch's statistics."""
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    given = {argument.name: value for argument, value in zip(arguments, node.args, strict=False)}
    given |= node.kwargs
    return any(given.get(name) for name in ("training", "train", "dropout_p"))


def aliased_copy(module: Module) -> Module:
    """A copy whose weights share the original's memory; ``.to()`` changes only the copy."""
    memo: dict[int, Any] = {}
    if isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule):
        for tensor in (*module.parameters(), *module.buffers()):
            alias = tensor.detach()
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(alias, requires_grad=False) if parameter else alias
    with torch.no_grad():
        return copy.deepcopy(module, memo)


def check_no_shared_weights(teachers: Iterable[nn.Module], student: nn.Module) -> None:
    """Refuse a student whose training would change a teacher."""
    trained = _storages(student.parameters())
    if any(trained & _storages((*each.parameters(), *each.buffers())) for each in teachers):
        raise ValueError(
            "`teacher` and `student` share weights, expected modules with none in common: training "
            "the student would change the teacher; give one a `copy.deepcopy`."
        )


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    # Sparse tensors have no storage of their own. On the meta device every pointer is 0.
    dense = (t for t in tensors if t.layout == torch.strided)
    return {t.untyped_storage().data_ptr() for t in dense} - {0}


class InputNames(NamedTuple):
    """Names of a model's forward parameters after the first, and whether it takes any others."""

    names: frozenset[str]
    any_name: bool

    @classmethod
    def any_of(cls, several: Iterable["InputNames"]) -> "InputNames":
        """What at least one of several models accepts."""
        names, any_name = zip(*several, strict=True)
        return cls(frozenset().union(*names), any(any_name))


class StoredOutputs(ABC):
    """Outputs of teachers that ran before, by sample number; given to a loss in their place.

    Attributes:
        names: of the teachers' classes.
        taps: of each teacher, whose latents are kept.
        inputs: that the teachers accepted.
        views: augmented ones of each sample; view 0 is its inputs as they are.
    """

    def __init__(
        self,
        names: Sequence[str],
        taps: Sequence[Sequence[str]],
        inputs: InputNames,
        views: int,
    ) -> None:
        self.names, self.taps = tuple(names), tuple(tuple(each) for each in taps)
        self.inputs, self.views = inputs, views

    @abstractmethod
    def outputs(
        self, index: Int[Tensor, " batch *view"], x: Float[Tensor, "batch ..."] | None = None
    ) -> tuple[TeacherOutput, ...]:
        """One output a teacher.

        Args:
            index: numbers of the samples; of shape ``(batch, 2)`` with their views.
            x: their inputs, to refuse others than the teachers had; the outputs are on its device.
        """

    @abstractmethod
    def draw_views(
        self, index: Int[Tensor, " batch"], x: Float[Tensor, "batch ..."]
    ) -> tuple[Int[Tensor, "batch 2"], Float[Tensor, "batch ..."]]:
        """The index of a view of each sample, drawn by torch's generator, and its inputs."""


def named_inputs(model: nn.Module) -> InputNames:
    """The inputs that a model accepts, also one that is unrolled, compiled or wrapped by torch."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    forward: Any = model.function if isinstance(model, FunctionTeacher) else model.forward
    schema = getattr(forward, "schema", None)
    if schema is not None:  # scripted or traced: x comes first, or self and x
        first = 1 if isinstance(model, FunctionTeacher) else 2
        return InputNames(frozenset(a.name for a in schema.arguments[first:]), any_name=False)
    try:
        given = list(inspect.signature(forward).parameters.values())[1:]
    except ValueError:  # a function of C has no signature
        given = []
    names = frozenset(p.name for p in given if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    return InputNames(names, any(p.kind is p.VAR_KEYWORD for p in given))


def _wrapped(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        return cast(nn.Module, model.module)
    return model.model if isinstance(model, Unrolled) else getattr(model, "_orig_mod", None)


def accepted_inputs(model: nn.Module | InputNames, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that a model's forward accepts, by name or in its ``**kwargs``.

    In a training step give what `named_inputs` found once.
    """
    names, any_name = model if isinstance(model, InputNames) else named_inputs(model)
    return {name: value for name, value in inputs.items() if any_name or name in names}


def check_taps(model: nn.Module, taps: Iterable[str]) -> None:
    """Refuse taps that do not exist, or that hooks cannot read."""
    unread = torch.jit.ScriptModule | nn.DataParallel | GraphModule
    for tap in taps:
        if isinstance(model, unread) or hasattr(model, "_orig_mod"):
            raise ValueError(
                f"the tap {tap!r} of a {type(model).__name__} cannot be read, expected a plain "
                "module or DistributedDataParallel: tap the model before it is scripted, exported, "
                "compiled or wrapped."
            )
        tap_path(model, tap)


def call_model(
    model: nn.Module, x: Tensor, inputs: Mapping[str, Any], taps: Sequence[str] = ()
) -> TeacherOutput:
    """A model's forecast, which must be a tensor, and the activations of its taps."""
    latents: dict[str, Tensor] = {}
    if taps:
        with TapReader(model, taps) as reader:
            forecast = model(x, **inputs)
        latents = reader.read()
    else:
        forecast = model(x, **inputs)
    if not isinstance(forecast, Tensor):
        raise ValueError(
            f"`{type(model).__name__}` returns a {type(forecast).__name__}, expected one tensor: "
            "give a module that returns the forecast alone."
        )
    return TeacherOutput(forecast, latents)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; then each of its modules in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def checked_forecasts(
    outputs: Sequence[TeacherOutput],
    names: Sequence[str],
    forecast: Tensor,
    transform: AbstractTransform,
    resolutions: Resolutions,
    finite: bool,
) -> list[Tensor]:
    """The teachers' forecasts on the student's grid, after a check of each.

    A forecast of another resolution, if that is allowed, is resampled to the student's. Frequencies
    missing from the teacher's grid are filled with the student's coefficients, so that they add
    nothing to the loss. Messages have the ``names`` of the teachers.
    """
    n, expected = len(outputs), len(names)
    if n != expected:
        raise ValueError(f"`outputs` has {n} entries, expected {expected}: one a teacher.")
    checked = []
    for name, output in zip(names, outputs, strict=True):
        theirs = output.forecast.detach()
        if finite:
            check_finite(f"forecast of {name}", theirs)
            for tap, latent in output.latents.items():
                check_finite(f"latent {tap!r} of {name}", latent)
        if theirs.shape != forecast.shape:
            theirs = _resampled(theirs, forecast.detach(), transform, name, resolutions)
        checked.append(theirs)
    return checked


def _resampled(
    theirs: Tensor, mine: Tensor, transform: AbstractTransform, name: str, resolutions: Resolutions
) -> Tensor:
    axes = len(transform.domain_axes)
    if (
        not isinstance(transform, GridTransform)
        or theirs.ndim != mine.ndim
        or theirs.shape[:-axes] != mine.shape[:-axes]
        or mine.shape[-axes:] != transform.shape
    ):
        check_shape(f"forecast of {name}", theirs.shape, mine.shape, "the student's forecast")
    if resolutions == "equal":
        raise ValueError(
            f"`forecast of {name}` has shape {tuple(theirs.shape)}, expected {tuple(mine.shape)} "
            "(the student's forecast); to distil from another resolution give resolutions='shared'."
        )
    grid = cast(GridTransform, transform).resized(tuple(theirs.shape[-axes:]))
    # Half-precision rounding would be a difference in all bands.
    mine, theirs = mine.to(working_dtype(mine)), theirs.to(working_dtype(theirs))
    return complete_frequencies(theirs, mine, grid, cast(GridTransform, transform))


def warn_of_empty_bands(
    forecasts: Sequence[Tensor], names: Sequence[str], transform: AbstractTransform, bands: Bands
) -> None:
    """Warn of bands in which a teacher's forecast is 0: the loss draws the student to 0 there."""
    for name, forecast in zip(names, forecasts, strict=True):
        energy = transform.sample_band_energy(forecast, bands).sum(0)
        if empty := (energy == 0).nonzero()[:, 0].tolist():
            warn_caller(
                f"the forecast of {name} is 0 in the bands {empty} (0 is the lowest), and the loss "
                "draws the student to 0 there; choose other bands if that is not meant."
            )


def warn_of_other_boundary(student: nn.Module, transform: AbstractTransform) -> None:
    """Warn of a student whose convolutions wrap around where the transform does not, or vice versa.

    Zero padding, torch's default, says nothing of the data.
    """
    space = transform.space if isinstance(transform, ProductTransform) else transform
    modes = {getattr(module, "padding_mode", None) for module in student.modules()}
    wraps, ends = "circular" in modes, bool(modes & {"reflect", "replicate"})
    if not isinstance(space, GridTransform) or wraps == ends:
        return
    if wraps == (space.boundary == "reflect"):
        does = "wraps around" if wraps else "ends at"
        warn_caller(
            f"`student` {does} the edges of the grid and `transform` has boundary="
            f"{space.boundary!r}: for data that wrap around give the student padding='periodic' "
            "and the transform boundary='periodic'; for data that do not, 'reflect' for both."
        )
