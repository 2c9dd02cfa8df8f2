"""Puts pure-PyTorch stand-ins in the place of ``torch_scatter`` and ``torch_sparse``.

tsl imports both without declaring them, and both are built from source for many minutes. Here
lives `install_standins`, to be called before ``import tsl``; what the stand-ins compute lives in
`_torch_scatter`, `_sparse_tensor` and `_torch_sparse`.

torch_geometric looks for the two packages once, while it is imported, and where it finds them
takes paths through their compiled operators. Therefore it is imported here first, and finds
nothing: it keeps to PyTorch's operators, whichever package the user imported first. What it then
lacks to accept tsl's sparse matrices, the isinstance check and the few functions it would call,
it gets by subclassing (`_sparse_tensor`) and by filling its own empty ``torch_sparse`` class.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

# Imported before any stand-in is in place: see above.
from torch_geometric import typing as pyg

from sdkd_plugin.adapters.tsl import _torch_scatter, _torch_sparse

_ACTS_AS = {"torch_scatter": "2.1.2+sdkd", "torch_sparse": "0.6.18+sdkd"}
_PYG_CALLS = ("cat", "fill_diag", "masked_select_nnz", "matmul", "mul", "set_diag", "sum")


def install_standins() -> tuple[str, ...]:
    """Supply ``torch_scatter`` and ``torch_sparse``, each only where it cannot be imported.

    What can be imported is left alone, a compiled package built for another PyTorch and therefore
    failing to load counting as absent. Calling again changes nothing.

    Returns:
        The names of those that are stand-ins, in the order above.

    Example:
        >>> import torch
        >>> supplied = install_standins()
        >>> from torch_scatter import scatter
        >>> scatter(torch.ones(3), torch.tensor([0, 2, 0])).tolist()
        [2.0, 0.0, 1.0]
    """
    supplied = []
    if _is_standin("torch_scatter") or not _can_import("torch_scatter"):
        supplied.append("torch_scatter")
        _install("torch_scatter", _torch_scatter)
        _install("torch_scatter.utils", _torch_scatter)
    if _is_standin("torch_sparse") or not _can_import("torch_sparse"):
        supplied.append("torch_sparse")
        _install("torch_sparse", _torch_sparse)
        if not pyg.WITH_TORCH_SPARSE:
            for name in _PYG_CALLS:
                setattr(pyg.torch_sparse, name, staticmethod(getattr(_torch_sparse, name)))
    return tuple(supplied)


def _is_standin(name: str) -> bool:
    return isinstance(sys.modules.get(name), _Standin)


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a library built for another PyTorch
        return False
    return True


def _install(name: str, source: ModuleType) -> None:
    if _is_standin(name):
        return
    module = _Standin(name, source.__doc__)
    module.__dict__.update({key: getattr(source, key) for key in source.__all__})
    module.__version__ = _ACTS_AS[name.partition(".")[0]]
    # `importlib.util.find_spec` refuses a module without a spec.
    module.__spec__ = ModuleSpec(name, loader=None, origin=source.__file__)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


class _Standin(ModuleType):
    """A module that says what it is where more is asked of it than it has."""

    __version__: str

    def __getattr__(self, name: str) -> object:
        package = self.__name__.partition(".")[0]
        raise AttributeError(
            f"`{self.__name__}.{name}` is not part of sdkd_plugin's stand-in, which has what tsl "
            f"uses; install {package} for all of it."
        )
