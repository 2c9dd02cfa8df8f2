"""What tsl takes from ``torch_scatter``, on PyTorch's own operations.

Here live `scatter`, `segment_csr`, `gather_csr` and `broadcast`, with the values and gradients of
torch_scatter 2.1.2. tsl calls them inside ``torch.jit.script`` functions, so they are written in
what TorchScript compiles: plain ``Tensor`` annotations, strings instead of ``Literal``, and
``no_type_check``, which keeps jaxtyping's import hook from wrapping them (TorchScript cannot
compile the wrapper). What puts this module in torch_scatter's place is `_sparse_standins`.

Left out, because nothing in tsl calls them: a given ``out``, the product, ``segment_coo`` and
``gather_coo``, and the composite functions.
"""

from typing import no_type_check

import torch
from torch import Tensor

__all__ = ["broadcast", "gather_csr", "scatter", "segment_csr"]


@no_type_check
def broadcast(src: Tensor, other: Tensor, dim: int) -> Tensor:
    """Lay an index along ``dim`` of ``other`` and expand it to the shape of ``other``.

    Args:
        src: the index, of one dimension, or already of leading dimensions of ``other``.
        other: the tensor whose shape is wanted.
        dim: the dimension of ``other`` that a one-dimensional ``src`` runs along.

    Returns:
        A view of ``src`` of the shape of ``other``.

    Example:
        >>> broadcast(torch.tensor([0, 1, 0]), torch.zeros(2, 3), dim=-1).tolist()
        [[0, 1, 0], [0, 1, 0]]
    """
    if dim < 0:
        dim = dim + other.dim()
    shape = list(src.size())
    if src.dim() == 1:
        shape = [1] * dim + shape
    shape = shape + [1] * (other.dim() - len(shape))
    return src.view(shape).expand(other.size())


@no_type_check
def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduce the entries of ``src`` that carry the same index.

    ``out[i] = reduce(src[j] for j with index[j] = i)`` along ``dim``; 0 where there is no such j.
    The maximum and the minimum pass their gradient to the first of equal entries, and skip NaN and
    the infinity that never wins, so that a group wholly masked by it gives 0.

    Args:
        src: the values, of any shape.
        index: int64, of the shape of ``src`` or broadcast to it along ``dim``.
        dim: the dimension that is reduced.
        out: must be None; it holds torch_scatter's place in the order of the arguments, since
            TorchScript knows no keyword-only ones.
        dim_size: its size in the result; by default the highest index plus one.
        reduce: "sum" ("add"), "mean", "min" or "max".

    Returns:
        A tensor of the shape of ``src`` but for ``dim``.

    Raises:
        ValueError: where ``reduce`` is none of these, or ``out`` is given.

    Example:
        >>> scatter(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0, 2, 0]), reduce="max").tolist()
        [2.0, 0.0, 5.0]
    """
    _refuse_out(out)
    if dim < 0:
        dim = dim + src.dim()
    index = broadcast(index, src, dim)
    if dim_size is not None:
        size = dim_size
    elif index.numel() == 0:
        size = 0
    else:
        size = int(index.max()) + 1
    if reduce == "min" or reduce == "max":
        return _first_extreme(src, index, dim, size, reduce == "max")[0]
    return _sum_or_mean(src, index, dim, size, reduce)


@no_type_check
def segment_csr(
    src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum"
) -> Tensor:
    """Reduce consecutive runs of ``src``, bounded by pointers.

    ``out[i] = reduce(src[indptr[i]:indptr[i + 1]])`` along the last dimension of ``indptr``; 0 for
    an empty run.

    Args:
        src: the values, of any shape.
        indptr: int64, ascending; the leading dimensions broadcast against those of ``src``.
        out: must be None, as in `scatter`.
        reduce: "sum" ("add"), "mean", "min" or "max".

    Returns:
        A tensor of the shape of ``src``, but with one entry a run in the reduced dimension.

    Raises:
        ValueError: where ``reduce`` is none of these, or ``out`` is given.

    Example:
        >>> segment_csr(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [6.0, 0.0, 2.0]
    """
    _refuse_out(out)
    dim = indptr.dim() - 1
    runs = indptr.size(dim) - 1
    # One bucket before the first pointer and one behind the last take what no run covers.
    index = _expand_leading(_run_of_position(indptr, src.size(dim)), src)
    if reduce != "min" and reduce != "max":
        return _sum_or_mean(src, index, dim, runs + 2, reduce).narrow(dim, 1, runs)
    extreme, found = _first_extreme(src, index, dim, runs + 2, reduce == "max")
    extreme, found = extreme.narrow(dim, 1, runs), found.narrow(dim, 1, runs)
    # Unlike `scatter`, torch_scatter leaves its start value where a run has only NaN or infinity.
    if src.is_floating_point():
        filled = _expand_leading(indptr.diff(dim=-1) > 0, extreme)
        bound = _greatest_finite(src)
        extreme = extreme.masked_fill(filled & ~found, -bound if reduce == "max" else bound)
    return extreme


@no_type_check
def gather_csr(src: Tensor, indptr: Tensor) -> Tensor:
    """Repeat each entry of ``src`` over its run: the transpose of a summing `segment_csr`.

    ``out[j] = src[i]`` for ``indptr[i] <= j < indptr[i + 1]``.

    Args:
        src: the values, with one entry a run along the last dimension of ``indptr``.
        indptr: int64, ascending from 0; the leading dimensions broadcast against those of ``src``.

    Returns:
        A tensor of the shape of ``src``, but as long as the last pointer in that dimension.

    Example:
        >>> gather_csr(torch.tensor([6.0, 0.0, 2.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [6.0, 6.0, 2.0]
    """
    dim = indptr.dim() - 1
    length = int(indptr.flatten()[-1]) if src.numel() > 0 else 0
    index = _run_of_position(indptr, length) - 1
    return src.gather(dim, _expand_leading(index, src))


@no_type_check
def _refuse_out(out: Tensor | None) -> None:
    if out is not None:
        raise ValueError(
            "`out` is given, expected None: this stand-in of torch_scatter writes into no tensor "
            "(use what it returns, or install torch_scatter)."
        )


@no_type_check
def _sum_or_mean(src: Tensor, index: Tensor, dim: int, size: int, reduce: str) -> Tensor:
    shape = list(src.size())
    shape[dim] = size
    if reduce not in ["sum", "add", "mean"]:
        raise ValueError(
            "`reduce` is '" + reduce + "', expected one of sum, add, mean, min, max "
            "(for others install torch_scatter)."
        )
    total = src.new_zeros(shape).scatter_add(dim, index, src)
    if reduce != "mean":
        return total
    count = src.new_zeros(shape).scatter_add(dim, index, torch.ones_like(src)).clamp(min=1)
    if src.is_floating_point():
        return total / count
    return torch.div(total, count, rounding_mode="floor")


@no_type_check
def _first_extreme(
    src: Tensor, index: Tensor, dim: int, size: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """Each group's extreme, read from its first holder, and whether there was one.

    `Tensor.scatter_reduce` alone would share the gradient among equal entries, and let NaN through.
    """
    shape = list(src.size())
    length = shape[dim]
    shape[dim] = size
    reduction = "amax" if largest else "amin"
    values = src.detach()
    may_win = torch.ones_like(values, dtype=torch.bool)
    if src.is_floating_point():
        bound = _greatest_finite(src)
        may_win = values > -bound if largest else values < bound
        values = values.masked_fill(~may_win, -bound if largest else bound)
    extreme = values.new_zeros(shape).scatter_reduce(
        dim, index, values, reduction, include_self=False
    )
    wins = may_win & (values == extreme.gather(dim, index))
    position = broadcast(torch.arange(length, device=src.device), src, dim)
    first = torch.full(shape, length, device=src.device).scatter_reduce(
        dim, index, position.masked_fill(~wins, length), "amin"
    )
    shape[dim] = 1
    # A row of zeros behind the last answers for the groups that nothing fell into.
    return torch.cat([src, src.new_zeros(shape)], dim).gather(dim, first), first < length


@no_type_check
def _greatest_finite(x: Tensor) -> float:
    # TorchScript knows no `torch.finfo`.
    if x.dtype == torch.float64:
        return 1.7976931348623157e308
    if x.dtype == torch.float16:
        return 65504.0
    if x.dtype == torch.bfloat16:
        return 3.3895313892515355e38
    return 3.4028234663852886e38


@no_type_check
def _run_of_position(indptr: Tensor, length: int) -> Tensor:
    """The run of each position, from 1; 0 before the first pointer."""
    shape = list(indptr.size())
    shape[-1] = length
    position = torch.arange(length, device=indptr.device).expand(shape)
    return torch.searchsorted(indptr.contiguous(), position.contiguous(), right=True)


@no_type_check
def _expand_leading(index: Tensor, other: Tensor) -> Tensor:
    """Expand an index over the dimensions of ``other``, its own last one kept."""
    last = index.dim() - 1
    shape = list(other.size())
    shape[last] = index.size(last)
    return index.view(list(index.size()) + [1] * (other.dim() - index.dim())).expand(shape)
