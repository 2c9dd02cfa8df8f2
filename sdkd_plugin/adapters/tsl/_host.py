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
    """Supply ``torch_scatter`` and ``torch_sparse``, each only where it cannot be imported.

    A package that was built for another PyTorch and fails to load counts as absent.

    Returns:
        The names of the packages that are stand-ins.

    Example:
        >>> import torch
        >>> supplied = install_standins()
        >>> from torch_scatter import scatter
        >>> scatter(torch.ones(3), torch.tensor([0, 2, 0])).tolist()
        [2.0, 0.0, 1.0]
    """
    supplied = []
    for name, standin in {"torch_scatter": _torch_scatter, "torch_sparse": _torch_sparse}.items():
        try:
            found = importlib.import_module(name)
        except (ImportError, OSError):  # OSError: a library built for another PyTorch
            found = sys.modules[name] = sys.modules[f"{name}.utils"] = standin
        if found is standin:
            supplied.append(name)
    return tuple(supplied)


STANDINS = install_standins()
"""Packages that tsl imports and that stand-ins replace in this process."""

with warnings.catch_warnings():
    import tsl

__all__ = ["STANDINS", "tsl"]
