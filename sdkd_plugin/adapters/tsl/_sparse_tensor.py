"""The sparse matrix that stands in for ``torch_sparse.SparseTensor``.

Here lives `SparseTensor`, with the methods that tsl 0.9.5 and torch_geometric's message passing,
collation and ``gcn_norm`` call on one, and the values and gradients of torch_sparse 0.6.18. The
entries are kept by `_sparse_storage`; the functions beside it (`cat`, `set_diag` and so on) live
in `_torch_sparse`; what puts them in torch_sparse's place is `_sparse_standins`.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor
from torch_geometric import typing as pyg

from sdkd_plugin.adapters.tsl._sparse_storage import Sizes, SparseStorage
from sdkd_plugin.adapters.tsl._torch_scatter import scatter, segment_csr

# torch_geometric without torch_sparse keeps an empty class of this name for its isinstance checks:
# a subclass of it passes them, in whichever order the two packages were imported.
_Base: Any = object if pyg.WITH_TORCH_SPARSE else pyg.SparseTensor

Entries = tuple[Tensor, Tensor, Tensor | None]


class SparseTensor(_Base):
    """A sparse matrix of shape ``(rows, columns)``, or ``(rows, columns, *features)``.

    tsl and torch_geometric hold adjacencies transposed in it: entry (i, j) is the edge from j to i.

    Args:
        row, rowptr, col, value, sparse_sizes, is_sorted, trust_data: as in `SparseStorage`.

    Raises:
        ValueError: indices are missing, not int64, unequal in number or out of range.

    Example:
        >>> a = SparseTensor(row=torch.tensor([1, 0]), col=torch.tensor([0, 2]))
        >>> (a @ torch.tensor([[1.0], [2.0], [4.0]])).tolist()
        [[4.0], [1.0]]
    """

    storage: SparseStorage = None  # type: ignore[assignment]  # hides the base class's property

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
        self.storage = SparseStorage(row, rowptr, col, value, sparse_sizes, is_sorted, trust_data)

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Int64[Tensor, "2 nnz"],
        edge_attr: Shaped[Tensor, " nnz *features"] | None = None,
        sparse_sizes: Sizes | None = None,
        is_sorted: bool = False,
        trust_data: bool = False,
    ) -> "SparseTensor":
        """A matrix with ``edge_index[0]`` as rows and ``edge_index[1]`` as columns."""
        row, col = edge_index[0], edge_index[1]
        return cls(row, None, col, edge_attr, sparse_sizes, is_sorted, trust_data)

    @classmethod
    def from_dense(
        cls, mat: Shaped[Tensor, "rows columns *features"], has_value: bool = True
    ) -> "SparseTensor":
        """The entries of a dense matrix that are not zero (of which some feature is not)."""
        nonzero = mat != 0
        row, col = (nonzero.flatten(2).any(-1) if mat.dim() > 2 else nonzero).nonzero().unbind(1)
        sizes = (mat.size(0), mat.size(1))
        return cls(row, None, col, mat[row, col] if has_value else None, sizes, True, True)

    @classmethod
    def from_scipy(cls, mat: Any, has_value: bool = True) -> "SparseTensor":
        """A copy of a scipy sparse matrix, duplicate entries added up."""
        mat = mat.tocsr().tocoo()
        row, col = (torch.tensor(index, dtype=torch.long) for index in (mat.row, mat.col))
        value = torch.tensor(mat.data) if has_value else None
        return cls(row, None, col, value, (mat.shape[0], mat.shape[1]))

    def _replace(self, value: Tensor | None) -> "SparseTensor":
        s = self.storage
        out = SparseTensor(s.row(), s.rowptr(), s.col(), value, self.sparse_sizes(), True, True)
        out.storage._order = s._order
        return out

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "SparseTensor":
        """Apply ``fn`` to all three tensors: a copy, another device, pinned memory."""
        row, col, value = self.coo()
        value = None if value is None else fn(value)
        return SparseTensor(fn(row), None, fn(col), value, self.sparse_sizes(), True, True)

    def coo(self) -> Entries:
        """Rows, columns and values of the entries."""
        return self.storage.row(), self.storage.col(), self.storage.value()

    def csr(self) -> Entries:
        """Row pointers, columns and values of the entries."""
        return self.storage.rowptr(), self.storage.col(), self.storage.value()

    def csc(self) -> Entries:
        """Column pointers, rows and values of the entries sorted by column."""
        order, value = self.storage.csr2csc(), self.storage.value()
        value = None if value is None else value[order]
        return self.storage.colptr(), self.storage.row()[order], value

    def sparse_sizes(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.storage.sparse_sizes()

    def sparse_size(self, dim: int) -> int:
        """Rows (0) or columns (1)."""
        return self.sparse_sizes()[dim]

    def sizes(self) -> list[int]:
        """Rows, columns and the trailing dimensions of the values."""
        value = self.storage.value()
        return [*self.sparse_sizes(), *(() if value is None else value.shape[1:])]

    def size(self, dim: int) -> int:
        """One of `sizes`."""
        return self.sizes()[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.sizes())

    def nnz(self) -> int:
        """The number of entries, explicit zeros included."""
        return self.storage.col().numel()

    def numel(self) -> int:
        """The number of stored numbers."""
        value = self.storage.value()
        return self.nnz() if value is None else value.numel()

    def device(self) -> torch.device:
        """Where the entries are."""
        return self.storage.col().device

    def is_cuda(self) -> bool:
        """Whether the entries are on a CUDA device."""
        return self.device().type == "cuda"

    def dtype(self) -> torch.dtype:
        """The type of the values; float32 where there are none."""
        value = self.storage.value()
        return torch.float32 if value is None else value.dtype

    def has_value(self) -> bool:
        """Whether there are values."""
        return self.storage.value() is not None

    def requires_grad(self) -> bool:
        """Whether the values take part in automatic differentiation."""
        value = self.storage.value()
        return value is not None and value.requires_grad

    def set_value(
        self, value: Shaped[Tensor, " nnz *features"] | None, layout: str | None = None
    ) -> "SparseTensor":
        """The same entries with other values, which ``layout="csc"`` gives sorted by column."""
        if value is not None and layout == "csc":
            value = value[self.storage.csr2csc().argsort()]
        return self._replace(value)

    def fill_value(
        self, fill_value: float | int, dtype: torch.dtype | None = None
    ) -> "SparseTensor":
        """The same entries, one value for all."""
        value = torch.full((self.nnz(),), fill_value, dtype=dtype, device=self.device())
        return self._replace(value)

    def detach(self) -> "SparseTensor":
        """The same matrix outside automatic differentiation."""
        value = self.storage.value()
        return self._replace(None if value is None else value.detach())

    def clone(self) -> "SparseTensor":
        """A copy that shares no memory."""
        return self._map(torch.clone)

    def to(self, *args: Any, **kwargs: Any) -> "SparseTensor":
        """Move the entries, and cast the values, as `torch.Tensor.to`."""
        value = self.storage.value()
        # Without values the type is nobody's; an empty tensor still says which device was meant.
        probe = torch.empty(0, device=self.device()) if value is None else value
        moved = probe.to(*args, **kwargs)
        if moved is probe:
            return self
        out = self
        if moved.device != self.device():
            lazily = bool(kwargs.get("non_blocking", False))
            out = self._replace(None)._map(lambda x: x.to(moved.device, non_blocking=lazily))
        return out if value is None else out._replace(moved)

    def cpu(self) -> "SparseTensor":
        """The same matrix on the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> "SparseTensor":
        """The same matrix on a CUDA device."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def pin_memory(self) -> "SparseTensor":
        """The same matrix in pinned memory."""
        return self._map(lambda x: x.pin_memory())

    def share_memory_(self) -> "SparseTensor":
        """Move the entries to shared memory, for data loader workers."""
        for x in self.coo():
            if x is not None:
                x.share_memory_()
        return self

    def _value_or_ones(self, dtype: torch.dtype | None) -> Tensor:
        value = self.storage.value()
        if value is None:
            value = torch.ones(self.nnz(), dtype=dtype, device=self.device())
        return value

    def to_dense(
        self, dtype: torch.dtype | None = None
    ) -> Shaped[Tensor, "rows columns *features"]:
        """The dense matrix; ``dtype`` counts where there are no values."""
        row, col, _ = self.coo()
        value = self._value_or_ones(dtype)
        return value.new_zeros(self.sizes()).index_put((row, col), value)

    def to_torch_sparse_coo_tensor(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix in PyTorch's own COO layout."""
        row, col, _ = self.coo()
        value = self._value_or_ones(dtype)
        index = torch.stack([row, col])
        return torch.sparse_coo_tensor(index, value, self.sizes(), check_invariants=False)

    def to_torch_sparse_csr_tensor(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix in PyTorch's own CSR layout."""
        rowptr, col, _ = self.csr()
        value = self._value_or_ones(dtype)
        return torch.sparse_csr_tensor(rowptr, col, value, self.sizes(), check_invariants=False)

    def t(self) -> "SparseTensor":
        """The transpose."""
        order = self.storage.csr2csc()
        row, col, value = self.coo()
        sizes = (self.sparse_size(1), self.sparse_size(0))
        value = None if value is None else value[order]
        return SparseTensor(col[order], None, row[order], value, sizes, True, True)

    def index_select(self, dim: int, idx: Int64[Tensor, " selected"]) -> "SparseTensor":
        """The rows (0) or columns (1) in ``idx``, in that order; a feature from dimension 2 on."""
        dim = dim + self.dim() if dim < 0 else dim
        if dim > 1:
            return self._replace(self._features("index_select", dim).index_select(dim - 1, idx))
        if dim == 1:
            return self.t().index_select(0, idx).t()
        begin, count = self.storage.rowptr()[idx], self.storage.rowcount()[idx]
        row = torch.arange(idx.numel(), device=idx.device).repeat_interleave(count)
        # Entry j of the result is entry (j - where its row begins there) of its row here.
        shift = (begin - (count.cumsum(0) - count)).repeat_interleave(count)
        entry = torch.arange(row.numel(), device=idx.device) + shift
        value = self.storage.value()
        value = None if value is None else value[entry]
        sizes = (idx.numel(), self.sparse_size(1))
        return SparseTensor(row, None, self.storage.col()[entry], value, sizes, True, True)

    def narrow(self, dim: int, start: int, length: int) -> "SparseTensor":
        """``length`` rows (0) or columns (1) from ``start`` on; features from dimension 2 on."""
        start = start + self.size(dim) if start < 0 else start
        return self.index_select(dim, torch.arange(start, start + length, device=self.device()))

    def __getitem__(self, index: Any) -> "SparseTensor":
        out = self
        for dim, item in enumerate(index if isinstance(index, tuple) else (index,)):
            if isinstance(item, int):  # keeps the dimension, as torch_sparse does
                picked: Any = range(self.size(dim))[item : item + 1 or None]
            elif isinstance(item, slice):
                picked = range(self.size(dim))[item]
            elif isinstance(item, list | np.ndarray | Tensor):
                picked = item
            else:
                raise ValueError(
                    f"`index` has {item!r} at place {dim}, expected an integer, a slice or a "
                    "one-dimensional list, array or tensor."
                )
            picked = torch.as_tensor(picked, device=self.device())
            picked = picked.nonzero().flatten() if picked.dtype == torch.bool else picked
            out = out.index_select(dim, picked.long())
        return out

    def _features(self, method: str, dim: int) -> Tensor:
        value = self.storage.value()
        if value is None or dim >= self.dim():
            raise ValueError(f"`dim` of {method} is {dim}, expected less than {self.dim()}.")
        return value

    def sum(self, dim: int | None = None) -> Tensor:
        """The sum of all entries, of each column (0), of each row (1), or over a feature."""
        dim = dim + self.dim() if dim is not None and dim < 0 else dim
        if dim is not None and dim > 1:
            return self._features("sum", dim).sum(dim - 1)
        value = self._value_or_ones(None)
        if dim is None:
            return value.sum()
        if dim == 0:
            return scatter(value, self.storage.col(), 0, dim_size=self.sparse_size(1))
        return segment_csr(value, self.storage.rowptr())

    def mul(self, other: Shaped[Tensor, "rows columns *features"]) -> "SparseTensor":
        """Scale every row by a column vector, or every column by a row vector.

        Raises:
            ValueError: ``other`` is neither of shape (rows, 1, ...) nor (1, columns, ...).
        """
        rows, columns = self.sparse_sizes()
        row, col, value = self.coo()
        if other.size(0) == rows and other.size(1) == 1:
            factor = other.squeeze(1)[row]
        elif other.size(0) == 1 and other.size(1) == columns:
            factor = other.squeeze(0)[col]
        else:
            raise ValueError(
                f"`other` has shape {tuple(other.shape)}, expected ({rows}, 1, ...) to scale rows "
                f"or (1, {columns}, ...) to scale columns."
            )
        return self._replace(factor if value is None else factor.to(value.dtype) * value)

    def __mul__(self, other: Any) -> "SparseTensor":
        return self.mul(other) if isinstance(other, Tensor) else NotImplemented

    __rmul__ = __mul__

    def matmul(self, other: Any, reduce: str = "sum") -> Any:
        """The product with a dense ``(..., columns, channels)`` or a sparse matrix.

        Args:
            other: the dense tensor, or a `SparseTensor`.
            reduce: "sum" ("add"), "mean", "min" or "max": what becomes of the products in a row.
                The mean divides by the number of entries. Sparse products are always summed.

        Returns:
            A tensor of shape ``(..., rows, channels)``, or a `SparseTensor`.

        Raises:
            ValueError: the values have features, or the reduction is not one of these.
        """
        for matrix in (self, other):
            if isinstance(matrix, SparseTensor) and matrix.dim() != 2:
                raise ValueError(
                    f"a matrix has sizes {matrix.sizes()}, expected two; give it one number an "
                    "entry by `set_value`."
                )
        if isinstance(other, SparseTensor):
            return self._sparse_matmul(other, reduce)
        row, col, value = self.coo()
        product = other.index_select(-2, col)
        if value is not None:
            product = value.to(other.dtype).unsqueeze(-1) * product
        if reduce not in ("sum", "add", "mean"):
            return scatter(product, row, -2, dim_size=self.sparse_size(0), reduce=reduce)
        shape = (*product.shape[:-2], self.sparse_size(0), product.shape[-1])
        # Twice as fast as `scatter`, whose index has to be expanded.
        total = product.new_zeros(shape).index_add(-2, row, product)
        if reduce == "mean":
            total = total / self.storage.rowcount().clamp(min=1).unsqueeze(-1)
        return total

    __matmul__ = matmul

    def _sparse_matmul(self, other: "SparseTensor", reduce: str) -> "SparseTensor":
        if reduce not in ("sum", "add"):
            raise ValueError(f"`reduce` is {reduce!r}, expected 'sum' between sparse matrices.")
        product = torch.sparse.mm(
            self.to_torch_sparse_coo_tensor(), other.to_torch_sparse_coo_tensor()
        ).coalesce()
        row, col = product.indices()
        # torch_sparse lets no gradient through here, and results must not depend on which is used.
        has_value = self.has_value() or other.has_value()
        value = product.values().detach() if has_value else None
        sizes = (self.sparse_size(0), other.sparse_size(1))
        return SparseTensor(row, None, col, value, sizes, True, True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseTensor) or self.sizes() != other.sizes():
            return False
        if self.has_value() != other.has_value():
            return False
        pairs = zip(self.coo(), other.coo(), strict=True)
        return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # compared by its entries, which may change

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sizes={self.sizes()}, nnz={self.nnz()}, {self.dtype()})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"`SparseTensor.{name}` is not part of this stand-in, which has what tsl and "
            "torch_geometric's message passing call; install torch_sparse for all of it."
        )
