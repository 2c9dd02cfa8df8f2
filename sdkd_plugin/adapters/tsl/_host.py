"""Makes tsl importable, with stand-ins for ``torch_scatter`` and ``torch_sparse`` if need be.

tsl imports both packages without declaring them, and both take many minutes to build from source.
"""

import importlib
import sys
import warnings

# torch_geometric looks for the two packages once, on import, and calls their compiled operators
# where it finds them. Imported first it finds no stand-in and keeps to PyTorch's operators.
import torch_geometric.typing  # noqa: F401

from sdkd_plugin.adapters.tsl import _torch_scatter, _torch_sparse


def install_standins() -> tuple[str, ...]:
    """Supply ``torch_scatter`` and ``torch_sparse`` where they cannot be imported; their names."""
    standins = {"torch_scatter": _torch_scatter, "torch_sparse": _torch_sparse}
    for name, standin in standins.items():
        try:
            importlib.import_module(name)
        except (ImportError, OSError):  # OSError: a library built for another PyTorch
            sys.modules[name] = sys.modules[f"{name}.utils"] = standin
    return tuple(name for name, standin in standins.items() if sys.modules[name] is standin)


STANDINS = install_standins()
"""Packages that tsl imports and that stand-ins replace in this process."""

with warnings.catch_warnings():
    import tsl

__all__ = ["STANDINS", "tsl"]
