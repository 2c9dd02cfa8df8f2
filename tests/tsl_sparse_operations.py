"""What tsl asks of torch_scatter and torch_sparse, as functions of the two modules and tensors.

Here live the operations and the smallest instance of every model of tsl; record_tsl_sparse.py
gives them inputs and records what the real packages answer, test_tsl_standins.py compares.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Operation = Callable[..., Any]

# Operations on torch_scatter's functions --------------------------------------------------------


def _scatter(reduce: str, dim: int, dim_size: int | None = None) -> Operation:
    def run(ts: ModuleType, sp: ModuleType, src: Tensor, index: Tensor) -> Tensor:
        return ts.scatter(src, index, dim, dim_size=dim_size, reduce=reduce)

    return run


def _segment(reduce: str) -> Operation:
    def run(ts: ModuleType, sp: ModuleType, src: Tensor, indptr: Tensor) -> Tensor:
        return ts.segment_csr(src, indptr, reduce=reduce)

    return run


def _segment_masked(reduce: str) -> Operation:
    # Where a run has nothing but NaN and infinities, torch_scatter passes the gradient to an entry
    # left over from another run: there are outputs to compare, but no gradients.
    def run(ts: ModuleType, sp: ModuleType, src: Tensor, indptr: Tensor) -> Tensor:
        return ts.segment_csr(src.detach(), indptr, reduce=reduce)

    return run


# Operations on torch_sparse's matrix ------------------------------------------------------------


def _on_matrix(fn: Callable[..., Any], sizes: tuple[int | None, int | None]) -> Operation:
    """``fn`` of a matrix made of `row`, `col` and, where given, `value`, and of what is left."""

    def run(
        ts: ModuleType,
        sp: ModuleType,
        row: Tensor,
        col: Tensor,
        value: Tensor | None = None,
        **others: Tensor,
    ) -> Any:
        a = sp.SparseTensor(row=row, col=col, value=value, sparse_sizes=sizes)
        return fn(sp, a, **others)

    return run


ON_MATRIX: dict[str, Callable[..., Any]] = {
    "itself": lambda sp, a: a,
    "csr": lambda sp, a: a.csr(),
    "csc": lambda sp, a: a.csc(),
    "counts": lambda sp, a: (a.storage.rowcount(), a.storage.colcount(), a.storage.csr2csc()),
    "numbers": lambda sp, a: [
        a.nnz(), a.numel(), a.dim(), *a.sizes(), *a.sparse_sizes(), a.size(1),
        a.has_value(), a.is_cuda(), a.requires_grad(),
    ],
    "t": lambda sp, a: a.t(),
    "to_dense": lambda sp, a: a.to_dense(),
    "to_coo": lambda sp, a: a.to_torch_sparse_coo_tensor().to_dense(),
    "to_float64": lambda sp, a: a.to(torch.float64),
    "detach": lambda sp, a: a.detach(),
    "clone": lambda sp, a: a.clone(),
    "fill_value": lambda sp, a: a.fill_value(0.5),
    "set_value_none": lambda sp, a: a.set_value(None, layout="coo"),
    "sum": lambda sp, a: a.sum(),
    "sum_0": lambda sp, a: sp.sum(a, 0),
    "sum_1": lambda sp, a: a.sum(dim=1),
    "sum_last": lambda sp, a: a.sum(dim=-1),
    "square": lambda sp, a: (a @ a).to_dense(),
    "cat_0": lambda sp, a: sp.cat([a, a], dim=0),
    "cat_1": lambda sp, a: sp.cat([a, a.t()], dim=1),
    "cat_diag": lambda sp, a: sp.cat([a, a, a], dim=(0, 1)),
    "remove_diag": lambda sp, a: sp.remove_diag(a),
    "remove_diag_1": lambda sp, a: sp.remove_diag(a, k=1),
    "set_diag": lambda sp, a: sp.set_diag(a),
    "set_diag_1": lambda sp, a: sp.set_diag(a, k=1),
    "fill_diag": lambda sp, a: sp.fill_diag(a, 2.0),
    "fill_diag_-1": lambda sp, a: sp.fill_diag(a, 3.0, k=-1),
    "index_list": lambda sp, a: a[[2, 0, 2], :],
    "index_both": lambda sp, a: a[torch.tensor([3, 1]), torch.tensor([1, 3, 0])],
    "index_mask": lambda sp, a: a[torch.tensor([True, False, True, True])],
    "index_int": lambda sp, a: a[1],
    "index_slice": lambda sp, a: a[1:3, 1:],
    "narrow": lambda sp, a: a.narrow(0, 1, 2).narrow(1, 0, 3),
    "masked_select_nnz": lambda sp, a: sp.masked_select_nnz(a, a.coo()[0] != 1, layout="coo"),
}  # fmt: skip

WITH_OTHER: dict[str, Callable[..., Any]] = {
    "mul_rows": lambda sp, a, other: sp.mul(a, other.view(-1, 1)),
    "mul_columns": lambda sp, a, other: sp.mul(a, other.view(1, -1)),
    "rmul_rows": lambda sp, a, other: other.view(-1, 1) * a,
}
WITH_VALUES: dict[str, Callable[..., Any]] = {
    "set_value": lambda sp, a, other: a.set_value(other, layout="coo"),
    "set_value_csc": lambda sp, a, other: a.set_value(other, layout="csc"),
}
WITH_DIAGONAL: dict[str, Callable[..., Any]] = {
    "set_diag_values": lambda sp, a, other: sp.set_diag(a, other),
}
# torch_sparse refuses features here.
NO_FEATURES = ("matrix_square", "matrix_to_coo", "matrix_set_diag", "matrix_set_diag_1")


def _matmul(reduce: str) -> Callable[..., Any]:
    return lambda sp, a, other: sp.matmul(a, other, reduce=reduce)


def _from_dense(ts: ModuleType, sp: ModuleType, mat: Tensor) -> Any:
    return sp.SparseTensor.from_dense(mat)


def _from_edge_index(ts: ModuleType, sp: ModuleType, index: Tensor, weight: Tensor) -> Any:
    return sp.SparseTensor.from_edge_index(index, weight)


def _from_rowptr(ts: ModuleType, sp: ModuleType, rowptr: Tensor, col: Tensor) -> Any:
    return sp.SparseTensor(rowptr=rowptr, col=col).coo()


def _from_scipy(ts: ModuleType, sp: ModuleType, row: Tensor, col: Tensor, value: Tensor) -> Any:
    entries = (value.detach().numpy(), (row.numpy(), col.numpy()))
    return sp.SparseTensor.from_scipy(scipy.sparse.coo_matrix(entries, (4, 4)))


# Operations of tsl itself, which call the two modules -------------------------------------------


def _softmax(ptr: bool) -> Operation:
    def run(ts: ModuleType, sp: ModuleType, src: Tensor, index: Tensor) -> Tensor:
        from tsl.nn.functional import sparse_softmax

        return (
            sparse_softmax(src, ptr=index, dim=1)
            if ptr
            else sparse_softmax(src, index=index, num_nodes=5, dim=1)
        )

    return run


def _connectivity(name: str, *arguments: Any, sparse: bool = True, **options: Any) -> Operation:
    """A function of tsl.ops.connectivity, of a matrix or of (edge_index, edge_weight)."""

    def run(ts: ModuleType, sp: ModuleType, index: Tensor, weight: Tensor | None = None) -> Any:
        from torch_sparse import SparseTensor
        from tsl.ops import connectivity

        fn = getattr(connectivity, name)
        if sparse:
            matrix = SparseTensor.from_edge_index(index, weight, (4, 4)).t()
            return fn(matrix, *arguments, **options)
        return fn(index, weight, *arguments, **options)

    return run


def _reduce_graph(ts: ModuleType, sp: ModuleType, index: Tensor, weight: Tensor) -> Any:
    from torch_sparse import SparseTensor
    from tsl.ops.connectivity import reduce_graph

    matrix = SparseTensor.from_edge_index(index, weight, (4, 4)).t()
    return reduce_graph([2, 0, 1], matrix)


def _convert(source: str, target: str) -> Operation:
    def run(ts: ModuleType, sp: ModuleType, index: Tensor, weight: Tensor) -> Any:
        from tsl.ops.connectivity import convert_torch_connectivity as convert

        matrix = convert((index, weight), source, "edge_index", num_nodes=4)
        return convert(matrix, target, source, num_nodes=4)

    return run


def _diff_conv_gso(ts: ModuleType, sp: ModuleType, index: Tensor, weight: Tensor) -> Any:
    from tsl.nn.layers.graph_convs.diff_conv import diff_conv_gso

    return diff_conv_gso(index, weight, k=2, num_nodes=4, add_backward=False).to_dense()


N_NODES, WINDOW, HORIZON = 4, 6, 3
_SMALL = {"input_size": 1, "output_size": 1, "horizon": HORIZON, "exog_size": 2}
_SPATIAL = {"hidden_size": 4, "n_nodes": N_NODES}

# Every model of tsl 0.9.5, at its smallest; a letter behind the name tells variants apart.
MODELS: dict[str, dict[str, Any]] = {
    "AGCRNModel": {**_SMALL, **_SPATIAL},
    "ARModel": {**_SMALL, "temporal_order": 3},
    "BiRNNImputerModel": {"input_size": 1, "hidden_size": 4, "exog_size": 2},
    "DCRNNModel": {**_SMALL, "hidden_size": 4, "ff_size": 4},
    "EvolveGCNModel H": {**_SMALL, "hidden_size": 3, "n_layers": 1, "norm": "gcn",
                         "root_weight": True, "cached": False, "variant": "H"},
    "EvolveGCNModel O": {**_SMALL, "hidden_size": 3, "n_layers": 1, "norm": "asym",
                         "root_weight": True, "cached": False, "variant": "O"},
    "FCRNNModel": {**_SMALL, **_SPATIAL},
    "GRINModel": {"input_size": 1, "ff_size": 4, "exog_size": 2, "embedding_size": 3, **_SPATIAL},
    "GRUGCNModel mean": {**_SMALL, "hidden_size": 4, "enc_layers": 1, "gcn_layers": 2},
    "GRUGCNModel gcn": {**_SMALL, "hidden_size": 4, "enc_layers": 1, "gcn_layers": 1,
                        "norm": "gcn"},
    "GatedGraphNetworkModel": {**_SMALL, **_SPATIAL, "input_window_size": WINDOW,
                               "full_graph": False},
    "GraphWaveNetModel": {**_SMALL, **_SPATIAL, "ff_size": 4, "n_layers": 2},
    "RNNEncGCNDecModel": {**_SMALL, "hidden_size": 4, "rnn_layers": 1, "gcn_layers": 1,
                          "rnn_dropout": 0.0, "gcn_dropout": 0.0},
    "RNNImputerModel": {"input_size": 1, "hidden_size": 4, "exog_size": 2},
    "RNNModel": {**_SMALL, "hidden_size": 4},
    "SPINHierarchicalModel": {"input_size": 1, "h_size": 4, "z_size": 4, "n_nodes": N_NODES,
                              "exog_size": 2, "n_layers": 2, "eta": 1},
    "SPINModel": {"input_size": 1, "exog_size": 2, "n_layers": 2, "eta": 1, **_SPATIAL},
    "STCNModel": {**_SMALL, "hidden_size": 4, "ff_size": 4, "n_layers": 2,
                  "temporal_kernel_size": 2, "spatial_kernel_size": 2},
    "STIDModel": {"input_size": 1, "horizon": HORIZON, "n_nodes": N_NODES, "window": WINDOW,
                  "hidden_size": 4, "n_exog_emb": [3, 5]},
    "TCNModel": {**_SMALL, "hidden_size": 4, "n_layers": 2},
    "TransformerModel": {**_SMALL, "hidden_size": 4},
    "VARModel": {**_SMALL, "temporal_order": 3, "n_nodes": N_NODES},
}  # fmt: skip
# Those that also take the graph as a SparseTensor, with the real packages as well.
TAKE_MATRIX = (
    "DCRNNModel", "EvolveGCNModel H", "EvolveGCNModel O", "GRINModel", "GRUGCNModel mean",
    "GRUGCNModel gcn", "GatedGraphNetworkModel", "GraphWaveNetModel", "SPINModel", "STCNModel",
)  # fmt: skip


def build_model(name: str) -> torch.nn.Module:
    """A model of tsl in float64, its weights set without a random generator."""
    from tsl.nn import models

    model = getattr(models, name.split()[0])(**MODELS[name]).double().eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(1.0, p.numel() + 1) * (1.7 + i)).view(p.shape) / 2)
    return model


def call_model(model: torch.nn.Module, name: str, given: Tensors, sparse: bool) -> Any:
    """The model of what it takes among x, u, mask and the graph."""
    from torch_sparse import SparseTensor

    u = given["u"]
    if name == "STIDModel":  # its covariates are places in a table
        u = (u > 0).long()
    if name == "GRINModel":  # takes them node by node only
        u = u.unsqueeze(2).expand(-1, -1, N_NODES, -1)
    index, weight = given["index"], given["weight"]
    options = {"x": given["x"], "u": u, "mask": given["mask"]}
    if sparse:
        options["edge_index"] = SparseTensor.from_edge_index(index, weight, (N_NODES, N_NODES)).t()
    else:
        options |= {"edge_index": index, "edge_weight": weight}
    taken = inspect.signature(model.forward).parameters
    return model(**{key: x for key, x in options.items() if key in taken})


def _model(name: str, sparse: bool) -> Operation:
    def run(ts: ModuleType, sp: ModuleType, **inputs: Tensor) -> Any:
        return call_model(build_model(name), name, inputs, sparse)

    return run


OPERATIONS: dict[str, Operation] = {
    **{
        f"scatter_{reduce}{'' if size is None else size}": _scatter(reduce, dim, size)
        for reduce in ("sum", "add", "mean", "min", "max")
        for dim, size in ((-2, None), (1, 6))
    },
    **{f"segment_{reduce}": _segment(reduce) for reduce in ("sum", "add", "mean", "min", "max")},
    **{f"segment_{reduce}_masked": _segment_masked(reduce) for reduce in ("min", "max")},
    "gather": lambda ts, sp, src, indptr: ts.gather_csr(src, indptr),
    "broadcast": lambda ts, sp, src, index: getattr(ts, "utils", ts).broadcast(index, src, 1),
    **{f"matrix_{name}": _on_matrix(fn, (4, 4)) for name, fn in ON_MATRIX.items()},
    **{
        f"other_{name}": _on_matrix(fn, (4, 4))
        for name, fn in {**WITH_OTHER, **WITH_VALUES, **WITH_DIAGONAL}.items()
    },
    **{
        f"matmul_{reduce}": _on_matrix(_matmul(reduce), (5, 4))
        for reduce in ("sum", "add", "mean", "min", "max")
    },
    "matrix_sizes_unknown": _on_matrix(ON_MATRIX["itself"], (None, None)),
    "from_dense": _from_dense,
    "from_edge_index": _from_edge_index,
    "from_rowptr": _from_rowptr,
    "from_scipy": _from_scipy,
    "tsl_softmax_index": _softmax(ptr=False),
    "tsl_softmax_ptr": _softmax(ptr=True),
    "tsl_transpose": _connectivity("transpose"),
    "tsl_transpose_edges": _connectivity("transpose", sparse=False),
    "tsl_reduce_graph": _reduce_graph,
    **{
        f"tsl_normalize_{norm}": _connectivity("normalize_connectivity", None, norm, 4)
        for norm in ("sym", "gcn", "asym", "mean", "none")
    },
    **{
        f"tsl_normalize_{norm}_edges": _connectivity(
            "normalize_connectivity", norm, 4, sparse=False
        )
        for norm in ("sym", "gcn", "asym", "none")
    },
    "tsl_asymmetric_norm_loops": _connectivity("asymmetric_norm", dim=1, add_self_loops=True),
    "tsl_diff_conv_gso": _diff_conv_gso,
    **{
        f"tsl_convert_{source}_{target}": _convert(source, target)
        for source in ("dense", "sparse", "edge_index")
        for target in ("dense", "sparse", "edge_index")
    },
    **{f"model {name}": _model(name, sparse=False) for name in MODELS},
    **{f"model {name} sparse": _model(name, sparse=True) for name in TAKE_MATRIX},
}
