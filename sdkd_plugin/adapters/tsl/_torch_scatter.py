"""What tsl takes from ``torch_scatter``, on PyTorch's own operations; see there for the arguments.

TorchScript compiles it for tsl, and knows no wrappers of type checkers (hence ``no_type_check``).
"""

from typing import NoReturn, no_type_check

import torch
from torch import Tensor

__version__ = "2.1.2+sdkd"


@no_type_check
def broadcast(src: Tensor, other: Tensor, dim: int) -> Tensor:
    """View an index along ``dim`` of ``other``, expanded to the shape of ``other``."""
    if dim < 0:
        dim = dim + other.dim()
    if src.dim() == 1:
        src = src.view([1] * dim + [-1] + [1] * (other.dim() - dim - 1))
    return src.expand(other.size())


@no_type_check
def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduce the entries of ``src`` with the same index; 0 where there is none.

    The maximum of a group of -inf only (masked entries of a softmax) is 0, as in torch_scatter.
    """
    if out is not None or reduce not in ["sum", "add", "mean", "min", "max"]:
        raise ValueError(
            "`reduce` is '" + reduce + "', expected sum, add, mean, min or max, and `out` None; "
            "for more install torch_scatter."
        )
    index = broadcast(index, src, dim)
    shape = list(src.size())
    shape[dim] = (
        (int(index.max()) + 1 if index.numel() > 0 else 0) if dim_size is None else dim_size
    )
    zeros = src.new_zeros(shape)
    if reduce == "sum" or reduce == "add":
        return zeros.scatter_add(dim, index, src)
    if reduce == "mean":
        return zeros.scatter_reduce(dim, index, src, "mean", include_self=False)
    extreme = zeros.scatter_reduce(dim, index, src, "a" + reduce, include_self=False)
    return extreme.masked_fill(extreme == float("-inf" if reduce == "max" else "inf"), 0)


@no_type_check
def segment_csr(
    src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum"
) -> Tensor:
    """Reduce the runs ``src[indptr[i]:indptr[i + 1]]`` along the last dimension of ``indptr``."""
    lengths = _lengths(indptr)
    index = torch.arange(lengths.numel(), device=src.device).repeat_interleave(lengths)
    return scatter(src, index, indptr.dim() - 1, out, lengths.numel(), reduce)


@no_type_check
def gather_csr(src: Tensor, indptr: Tensor) -> Tensor:
    """Repeat each entry of ``src`` over its run: the transpose of a summing `segment_csr`."""
    return src.repeat_interleave(_lengths(indptr), indptr.dim() - 1)


@no_type_check
def _lengths(indptr: Tensor) -> Tensor:
    if indptr.numel() != indptr.size(-1):
        raise ValueError("`indptr` has pointers of its own for other rows: install torch_scatter.")
    return indptr.flatten().diff()


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"`torch_scatter.{name}` is not part of sdkd_plugin's stand-in: install torch_scatter."
    )
