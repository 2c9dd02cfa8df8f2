"""Taps: the places in a model whose activations can be distilled.

Here live looking a tap up by name and reading its activation; what is compared is in `losses`.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


def tap_path(model: nn.Module, name: str) -> str:
    """The module path of a tap: a name from the model's own ``taps``, or any module's path.

    Raises:
        ValueError: if there is no such tap; the message lists the model's taps and near paths.

    Example:
        >>> tap_path(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1")
        '1'
    """
    named: dict[str, str] = dict(getattr(model, "taps", {}))
    if name in named:
        return named[name]
    paths = [path for path, _ in model.named_modules() if path]
    if name in paths:
        return name
    near = get_close_matches(name, [*named, *paths], n=5, cutoff=0.3) or paths[:5]
    raise ValueError(
        f"`{type(model).__name__}` has no tap {name!r}; it names {sorted(named)}, and any module "
        f"path will do, such as {near}."
    )


class TapReader:
    """Reads the activations of named taps while attached to a model.

    Args:
        model: any module.
        names: taps, as `tap_path` finds them.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def attach(self) -> None:
        """Start reading, at every call of the model from now on."""
        if self.handles:
            return
        for name, path in self._paths.items():
            module = self._model.get_submodule(path)
            self.handles.append(module.register_forward_hook(self._hook(name)))

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
            if name not in activations:
                raise ValueError(
                    f"the tap {name!r} (module {path!r}) was not reached in the forward pass of "
                    f"`{type(self._model).__name__}`: call the model before its taps are read."
                )
            if not isinstance(activations[name], Tensor):
                raise ValueError(
                    f"the tap {name!r} (module {path!r}) gives a "
                    f"{type(activations[name]).__name__}, expected a tensor: tap a module inside."
                )
        return activations

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._activations[name] = output

        return keep
