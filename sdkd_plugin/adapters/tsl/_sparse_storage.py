"""The entries of the sparse matrix that stands in for ``torch_sparse.SparseTensor``.

Here lives `SparseStorage`: row-sorted (row, col, value) entries and the pointers into them. What
is done with such a matrix lives in `_sparse_tensor`.
"""

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

Sizes = tuple[int | None, int | None]


class SparseStorage:
    """The entries of a sparse matrix, sorted by row and then column, and the pointers into them.

    Args:
        row: row of each entry; or None, where ``rowptr`` is given.
        rowptr: where each row begins, and where the last ends.
        col: column of each entry.
        value: value of each entry, of any trailing shape; None stands for ones.
        sparse_sizes: rows and columns; what is None is as small as the entries allow.
        is_sorted: the caller knows that the entries are sorted.
        trust_data: the caller knows that the indices are in range.

    Raises:
        ValueError: indices are missing, not int64, unequal in number or out of range.
    """

    def __init__(
        self,
        row: Int64[Tensor, " nnz"] | None = None,
        rowptr: Int64[Tensor, " rows_plus_one"] | None = None,
        col: Int64[Tensor, " nnz"] | None = None,
        value: Shaped[Tensor, " nnz *features"] | None = None,
        sparse_sizes: Sizes | None = None,
        is_sorted: bool = False,
        trust_data: bool = False,
    ) -> None:
        if col is None:
            raise ValueError("`col` is None, expected the column of each entry; give `col`.")
        if row is None:
            if rowptr is None:
                raise ValueError("`row` and `rowptr` are None, expected one of them; give `row`.")
            rows = torch.arange(rowptr.numel() - 1, device=col.device)
            row = rows.repeat_interleave(rowptr.diff(), output_size=col.numel())
        given = sparse_sizes or (None, None)
        if rowptr is not None and given[0] is None:
            given = (rowptr.numel() - 1, given[1])
        self._sizes = (
            _size("row", row, given[0], trust_data),
            _size("col", col, given[1], trust_data),
        )
        if row.numel() != col.numel() or (value is not None and len(value) != col.numel()):
            raise ValueError(
                f"`row`, `col` and `value` have {row.numel()}, {col.numel()} and "
                f"{None if value is None else len(value)} entries, expected as many of each."
            )
        if not is_sorted:
            key = row * self._sizes[1] + col
            if bool((key[1:] < key[:-1]).any()):
                order = key.argsort(stable=True)
                row, col, rowptr = row[order], col[order], None
                value = None if value is None else value[order]
        self._row, self._col, self._value = row, col, value
        self._rowptr = rowptr
        self._order: Tensor | None = None

    def sparse_sizes(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._sizes

    def row(self) -> Int64[Tensor, " nnz"]:
        """The row of each entry."""
        return self._row

    def col(self) -> Int64[Tensor, " nnz"]:
        """The column of each entry."""
        return self._col

    def value(self) -> Shaped[Tensor, " nnz *features"] | None:
        """The value of each entry, if there are values."""
        return self._value

    def rowptr(self) -> Int64[Tensor, " rows_plus_one"]:
        """Where each row begins, and where the last ends."""
        if self._rowptr is None:
            self._rowptr = _pointers(self._row, self._sizes[0])
        return self._rowptr

    def rowcount(self) -> Int64[Tensor, " rows"]:
        """The number of entries in each row."""
        return self.rowptr().diff()

    def colptr(self) -> Int64[Tensor, " columns_plus_one"]:
        """Where each column begins among the entries sorted by column, and where the last ends."""
        return _pointers(self._col[self.csr2csc()], self._sizes[1])

    def colcount(self) -> Int64[Tensor, " columns"]:
        """The number of entries in each column."""
        return self.colptr().diff()

    def csr2csc(self) -> Int64[Tensor, " nnz"]:
        """The permutation that sorts the entries by column and then row."""
        if self._order is None:
            self._order = (self._col * self._sizes[0] + self._row).argsort(stable=True)
        return self._order


def _size(argument: str, index: Tensor, given: int | None, trusted: bool) -> int:
    if index.dtype != torch.long or index.dim() != 1:
        raise ValueError(
            f"`{argument}` has {index.dim()} dimensions of {index.dtype}, expected one of "
            "torch.int64; convert it by `.long()`."
        )
    if given is not None and (trusted or index.numel() == 0):
        return given
    least = int(index.max()) + 1 if index.numel() > 0 else 0
    if given is not None and least > given:
        raise ValueError(
            f"`{argument}` holds index {least - 1}, expected below {given}, the size in "
            "`sparse_sizes`; give a larger size or drop these entries."
        )
    return least if given is None else given


def _pointers(index: Tensor, size: int) -> Tensor:
    return torch.searchsorted(index, torch.arange(size + 1, device=index.device))
