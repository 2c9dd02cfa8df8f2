"""Models by name, and building one that a file describes without trusting the file.

Here are the names of the models in this package; the adapters add those of their hosts, and no
other class is ever made.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdkd_plugin import models
from sdkd_plugin._checks import check_choice, shown
from sdkd_plugin.models.graph_alternet import AxisAttention

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Lookup = Callable[[str], Callable[..., nn.Module]]
_HOSTS: dict[str, Lookup] = {}


def register_host(prefix: str, lookup: Lookup) -> None:
    """Add the models of a host library, as ``prefix.name``; ``lookup`` refuses unknown names."""
    _HOSTS[prefix] = lookup


def model_class(name: str) -> Callable[..., nn.Module]:
    """The class of a name, such as ``UNet``, ``neuralop.fno`` or ``tsl.GRUGCNModel``.

    Raises:
        ValueError: if there is none, or its host's adapter has not been imported.

    Example:
        >>> model_class("UNet").__name__
        'UNet'
    """
    prefix, dot, rest = name.partition(".") if isinstance(name, str) else ("", "", "")
    if dot and prefix in _HOSTS:
        return _HOSTS[prefix](rest)
    if dot and prefix in ("neuralop", "tsl"):
        raise ValueError(
            f"`model` is {shown(name)}, which is of a host library: import "
            f"sdkd_plugin.adapters.{prefix} first."
        )
    check_choice("model", name, [*models.__all__, *(f"{host}.*" for host in _HOSTS)])
    return getattr(models, name)


def make_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A new model of a name.

    Raises:
        ValueError: if there is no such model, or it does not take the arguments.

    Example:
        >>> make_model("UNet", {"in_channels": 2, "out_channels": 1}).in_channels
        2
    """
    kind = model_class(name)
    parameters = inspect.signature(kind).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        for argument in arguments:
            check_choice(f"an argument of {name}", argument, parameters)
    try:
        return kind(**arguments)
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"`arguments` are {shown(dict(arguments))}, which {name} refuses: {error}."
        ) from error


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a model by name; neuraloperator adds what is no tensor."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def shapes(model: nn.Module) -> Shapes:
    """Types and shapes of a model's weights and buffers."""
    return {name: (each.dtype, tuple(each.shape)) for name, each in tensors(model).items()}


def make_to_fit(name: str, arguments: Mapping[str, Any], declared: Shapes) -> nn.Module:
    """A new model whose weights have the types and shapes that a file declares.

    It is made without memory first, and only as long as it asks for no more than the file holds:
    arguments that ask for huge or endless models are refused at once.

    Raises:
        ValueError: as `make_model`, or if the weights are others.
    """
    largest = max((math.prod(shape) for _, shape in declared.values()), default=0)
    _check_numbers(name, arguments, max(1024, largest))
    try:
        with _Bounded(name, 4 * largest + 2**20, 1000 + 200 * len(declared)), torch.device("meta"):
            found = shapes(_fitted(make_model(name, arguments), declared))
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"`arguments` of {name} make no model ({error}).") from error
    if found != declared:
        differ = sorted(k for k in {*found, *declared} if found.get(k) != declared.get(k))
        raise ValueError(
            f"`arguments` of {name} make other weights than the file holds, at {differ[:3]}: "
            f"{[found.get(k) for k in differ[:3]]}, in the file "
            f"{[declared.get(k) for k in differ[:3]]}."
        )
    return _fitted(make_model(name, arguments), declared)


def _fitted(model: nn.Module, declared: Shapes) -> nn.Module:
    """The model with the kind of attention that the file is of, if the arguments leave it open."""
    for path, module in model.named_modules():
        if isinstance(module, AxisAttention):
            _, shape = declared.get(f"{path}.landmarks", (None, None))
            module.fit_to(shape)
    return model


def _check_numbers(name: str, value: Any, most: int) -> None:
    """Refuse sizes that no model with such weights has."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            _check_numbers(name, each, most)
    elif isinstance(value, int) and abs(value) > most:
        raise ValueError(
            f"`arguments` of {name} have the number {shown(value)}, expected none above {most}, "
            "by the size of the weights in the file."
        )


class _Bounded(TorchDispatchMode):
    """Refuses, in this thread, tensors above a size, and more operations than a number."""

    def __init__(self, name: str, elements: int, operations: int) -> None:
        super().__init__()
        self.name, self.elements, self.operations = name, elements, operations

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.operations -= 1
        # Before the call: some classes allocate memory even when they are made without.
        size = args[0] if args else ()
        is_shape = isinstance(size, list | tuple) and all(isinstance(n, int) for n in size)
        asked = math.prod(size) if is_shape else 0
        if self.operations < 0 or asked > self.elements:
            raise ValueError(
                f"`arguments` of {self.name} ask for a far larger model than the file's weights."
            )
        return function(*args, **(kwargs or {}))
