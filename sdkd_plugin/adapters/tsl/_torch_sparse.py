"""What tsl and torch_geometric take from ``torch_sparse``, on PyTorch's own operations.

Here live the functions, with the values and gradients of torch_sparse 0.6.18; the matrix they work
on lives in `_sparse_tensor`, and what puts both in torch_sparse's place in `_sparse_standins`.
Left out is what neither host calls on tsl's way: sampling, partitioning, random walks, additions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from sdkd_plugin.adapters.tsl._sparse_storage import SparseStorage
from sdkd_plugin.adapters.tsl._sparse_tensor import SparseTensor

__all__ = [
    "SparseStorage",
    "SparseTensor",
    "cat",
    "fill_diag",
    "masked_select_nnz",
    "matmul",
    "mul",
    "remove_diag",
    "set_diag",
    "sum",
    "t",
]


def matmul(
    src: SparseTensor, other: Tensor | SparseTensor, reduce: str = "sum"
) -> Tensor | SparseTensor:
    """The product of a sparse matrix with a dense or sparse one: `SparseTensor.matmul`."""
    return src.matmul(other, reduce)


def mul(src: SparseTensor, other: Tensor) -> SparseTensor:
    """The matrix with its rows or columns scaled: `SparseTensor.mul`."""
    return src.mul(other)


def sum(src: SparseTensor, dim: int | None = None) -> Tensor:
    """The sum of all entries, or of each row or column: `SparseTensor.sum`."""
    return src.sum(dim)


def t(src: SparseTensor) -> SparseTensor:
    """The transpose: `SparseTensor.t`."""
    return src.t()


def cat(tensors: Sequence[SparseTensor], dim: int | Sequence[int]) -> SparseTensor:
    """Stack matrices below each other (0), beside each other (1) or diagonally (0, 1).

    Args:
        tensors: the matrices. Where one has no values, neither has the result.
        dim: 0, 1, both of them, or a feature dimension, along which only the values are joined.

    Returns:
        The joined matrix; the size that is not joined is the largest of the matrices'.

    Raises:
        ValueError: there is no matrix, or no such dimension.

    Example:
        >>> eye = SparseTensor(row=torch.tensor([0]), col=torch.tensor([0]))
        >>> cat([eye, eye], dim=(0, 1)).to_dense().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if len(tensors) == 0:
        raise ValueError("`tensors` is empty, expected at least one matrix.")
    values = [x.storage.value() for x in tensors]
    given = [value for value in values if value is not None]
    dims = {dim + tensors[0].dim() if dim < 0 else dim} if isinstance(dim, int) else set(dim)
    if not dims <= {0, 1} or not dims:
        (axis, *rest) = sorted(dims) or [-1]
        if rest or not 1 < axis < tensors[0].dim() or len(given) != len(tensors):
            raise ValueError(
                f"`dim` is {dim}, expected 0, 1, (0, 1) or a dimension of the values of all "
                f"matrices, the first of which has sizes {tensors[0].sizes()}."
            )
        return tensors[0].set_value(torch.cat(given, axis - 1))
    rows, cols, height, width = [], [], 0, 0
    for x in tensors:
        rows.append(x.storage.row() + height if 0 in dims else x.storage.row())
        cols.append(x.storage.col() + width if 1 in dims else x.storage.col())
        height = height + x.sparse_size(0) if 0 in dims else max(height, x.sparse_size(0))
        width = width + x.sparse_size(1) if 1 in dims else max(width, x.sparse_size(1))
    return SparseTensor(
        row=torch.cat(rows),
        col=torch.cat(cols),
        value=torch.cat(given) if len(given) == len(tensors) else None,
        sparse_sizes=(height, width),
        is_sorted=0 in dims,
        trust_data=True,
    )


def remove_diag(src: SparseTensor, k: int = 0) -> SparseTensor:
    """Drop the entries of the ``k``-th diagonal, those at (i, i + k)."""
    row, col, _ = src.coo()
    return masked_select_nnz(src, col - row != k)


def set_diag(
    src: SparseTensor, values: Shaped[Tensor, "..."] | None = None, k: int = 0
) -> SparseTensor:
    """Replace the ``k``-th diagonal as a whole.

    Args:
        src: the matrix.
        values: its new entries, or what expands to them; None stands for ones. A matrix without
            values stays without.
        k: the diagonal, above the main one where positive.

    Returns:
        The matrix with an entry at every place of the diagonal.

    Example:
        >>> a = SparseTensor(row=torch.tensor([0]), col=torch.tensor([1]), sparse_sizes=(2, 2))
        >>> set_diag(a).to_dense().tolist()
        [[1.0, 1.0], [0.0, 1.0]]
    """
    row, col, value = remove_diag(src, k).coo()
    length = _diag_length(src, k)
    along = torch.arange(length, device=row.device)
    if value is not None:
        shape = (length, *value.shape[1:])
        diagonal = value.new_ones(shape) if values is None else values.to(value.dtype).expand(shape)
        value = torch.cat([value, diagonal])
    return SparseTensor(
        row=torch.cat([row, along + max(-k, 0)]),
        col=torch.cat([col, along + max(k, 0)]),
        value=value,
        sparse_sizes=src.sparse_sizes(),
        trust_data=True,
    )


def fill_diag(src: SparseTensor, fill_value: float | int, k: int = 0) -> SparseTensor:
    """Set every entry of the ``k``-th diagonal to one value, as `set_diag`."""
    value = src.storage.value()
    return set_diag(src, None if value is None else value.new_tensor(fill_value), k)


def masked_select_nnz(
    src: SparseTensor, mask: Bool[Tensor, " nnz"], layout: str | None = None
) -> SparseTensor:
    """Keep the entries that the mask names, which ``layout="csc"`` gives sorted by column."""
    if layout == "csc":
        mask = mask[src.storage.csr2csc().argsort()]
    row, col, value = src.coo()
    return SparseTensor(
        row=row[mask],
        col=col[mask],
        value=None if value is None else value[mask],
        sparse_sizes=src.sparse_sizes(),
        is_sorted=True,
        trust_data=True,
    )


def _diag_length(src: SparseTensor, k: int) -> int:
    rows, columns = src.sparse_sizes()
    return max(min(rows + min(k, 0), columns - max(k, 0)), 0)
