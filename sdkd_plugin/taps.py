"""Taps: the places in a model whose activations can be distilled, and how they are read."""

import weakref
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdkd_plugin._explained import explained


def tap_path(model: nn.Module, name: str) -> str:
    """The module path of a tap: a name from the model's own ``taps``, or any module's path.

    Taps of a model in `DistributedDataParallel` are named as without it.
    """
    inner, prefix = model, ""
    if isinstance(model, DistributedDataParallel):
        inner, prefix = cast(nn.Module, model.module), "module."
    named: dict[str, str] = dict(getattr(inner, "taps", {}))
    paths = [path for path, _ in inner.named_modules() if path]
    if name in named or name in paths:
        return prefix + named.get(name, name)
    if prefix and name.removeprefix(prefix) in paths:
        return name
    near = get_close_matches(name, [*named, *paths], n=5, cutoff=0.3) or paths[:5]
    raise ValueError(
        f"`{type(inner).__name__}` has no tap {name!r}; it names {sorted(named)}, and any module "
        f"path will do, such as {near}."
    )


@explained
class TapReader:
    """Reads the activations of named taps while attached to a model.

    Args:
        model: any module.
        names: of its own ``taps``, or module paths.

    Raises:
        ValueError: if a tap does not exist.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with TapReader(model, ["1"]) as taps:
        ...     _ = model(torch.ones(4, 2))
        >>> taps.read()["1"].shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = model
        self._paths = {name: tap_path(model, name) for name in names}
        self._activations: dict[str, Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "TapReader":
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Start reading, at every call of the model from now on."""
        if self.handles:
            return
        for name, path in self._paths.items():
            module = self._model.get_submodule(path)
            self.handles.append(module.register_forward_hook(self._hook(name, module)))

    def detach(self) -> None:
        """Stop reading. Activations that were read stay."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def read(self) -> dict[str, Tensor]:
        """The activations of the model's last call; the reader forgets them.

        Raises:
            ValueError: if a tap was not reached, or its module's output is no tensor.
        """
        activations, self._activations = self._activations, {}
        for name, path in self._paths.items():
            tap = f"the tap {name!r} (module {path!r})"
            if name not in activations:
                raise ValueError(
                    f"{tap} was not reached in the forward pass of `{type(self._model).__name__}`: "
                    "call the model before its taps are read."
                )
            if not isinstance(activations[name], Tensor):
                kind = type(activations[name]).__name__
                raise ValueError(f"{tap} gives a {kind}, expected a tensor: tap a module inside.")
        return activations

    def _hook(self, name: str, module: nn.Module) -> Any:
        tapped, mine = weakref.ref(module), weakref.ref(self)

        # A copy of the model has the same function among its hooks, and must not write here.
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            reader = mine()
            if reader is not None and module is tapped():
                reader._activations[name] = output

        return keep
