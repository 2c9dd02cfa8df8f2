"""What tsl imports from ``torch_sparse``: names for its isinstance checks, and clear errors.

tsl's models reach none of it where the graph is an ``edge_index``.
"""

from typing import Any, NoReturn

__version__ = "0.6.18+sdkd"


def _refuse(*_: Any, **__: Any) -> NoReturn:
    remedy = "install it, or give the graph as (edge_index, edge_weight)."
    raise ImportError(f"a graph in a SparseTensor needs the package torch_sparse: {remedy}")


class SparseTensor:
    """A class without instances: making one raises an ImportError with the package to install."""

    __init__ = _refuse
    from_edge_index = from_dense = from_scipy = staticmethod(_refuse)


cat = fill_diag = matmul = remove_diag = set_diag = _refuse


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"`torch_sparse.{name}` is not part of sdkd_plugin's stand-in: install torch_sparse."
    )
