"""Records what torch_scatter and torch_sparse answer, for test_tsl_standins.py to hold against.

Run by hand where the two packages are built, for example in a folder outside the environment:

    pip install --no-build-isolation --no-deps --target REAL torch_scatter torch_sparse
    PYTHONPATH=REAL python tests/record_tsl_sparse.py

Here live the cases, as inputs of the operations in tsl_sparse_operations.py; the record holds
their inputs, outputs and gradients as JSON.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tsl_sparse_operations import N_NODES, NO_FEATURES, OPERATIONS, WINDOW, Tensors

RECORD = Path(__file__).parent / "recorded" / "tsl_sparse.json"
INF, NAN = float("inf"), float("nan")

# The cases --------------------------------------------------------------------------------------


def cases() -> list[tuple[str, Tensors]]:
    """Each operation with inputs that cover empty groups, ties, NaN, infinities and no values."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # Few digits keep the record small, and make ties.
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 4).round() / 4

    src = draw(2, 6, 3)
    holes = src.clone()
    holes[0, 1, 0], holes[0, :2, 1], holes[1, 3:, 2] = NAN, -INF, INF
    holes[1, 2, :] = torch.finfo(torch.float64).min
    index = torch.tensor([3, 0, 3, 1, 0, 3])
    full = torch.randint(0, 5, (2, 6, 3), generator=generator)
    runs = torch.tensor([[0, 2, 2, 5, 6]])
    each = torch.tensor([[0, 1, 3, 3, 6], [0, 0, 4, 5, 6]])
    out: list[tuple[str, Tensors]] = []
    for name in OPERATIONS:
        if name.startswith("scatter_"):
            out += [(name, {"src": x, "index": i}) for x in (src, holes) for i in (index, full)]
            out += [(name, {"src": src[:, :0], "index": index[:0]})] if "6" in name else []
            out += [(name, {"src": src.float(), "index": index})]
        if name.startswith("segment_"):
            sources = (src, holes)
            if "min" in name or "max" in name:
                sources = (holes,) if "masked" in name else (src,)
            out += [(name, {"src": x, "indptr": i}) for x in sources for i in (runs, each)]
    for pointers in (runs, each):
        out.append(("gather", {"src": draw(2, 4, 3), "indptr": pointers}))
    out.append(("broadcast", {"src": src, "index": index}))

    edges = {"row": torch.tensor([3, 0, 0, 1, 3, 2]), "col": torch.tensor([1, 1, 0, 2, 3, 0])}
    valued = {**edges, "value": draw(6)}
    features = {**edges, "value": draw(6, 2)}
    for name in OPERATIONS:
        if name.startswith("matrix_"):
            out += [(name, valued), (name, edges)]
            out += [(name, features)] if name not in NO_FEATURES else []
        if name.startswith("other_"):
            of = {"other_set_value": 6, "other_set_value_csc": 6}.get(name, 4)
            out.append((name, {**valued, "other": draw(of)}))
            if "diag" not in name:
                out.append((name, {**edges, "other": draw(of)}))
        if name.startswith("matmul_"):
            for x in (draw(4, 2), draw(3, 4, 2), draw(2, 2, 4, 1)):
                out += [(name, {**valued, "other": x}), (name, {**edges, "other": x})]
    dense = draw(4, 3)
    dense[1] = 0.0
    out += [("from_dense", {"mat": dense}), ("from_dense", {"mat": draw(3, 2, 2).relu()})]
    index_pair = torch.stack([edges["row"], edges["col"]])
    out.append(("from_edge_index", {"index": index_pair, "weight": draw(6)}))
    out.append(("from_rowptr", {"rowptr": torch.tensor([0, 2, 2, 3]), "col": edges["col"][:3]}))
    out.append(("from_scipy", valued))
    out += [("tsl_softmax_index", {"src": x, "index": index}) for x in (src, holes)]
    out += [("tsl_softmax_ptr", {"src": x, "index": runs[0]}) for x in (src, holes)]
    graph = {"index": index_pair, "weight": draw(6).abs() + 0.25}
    for name in OPERATIONS:
        if name.startswith("tsl_") and "softmax" not in name:
            out.append((name, graph))
    signals = {
        "x": draw(1, WINDOW, N_NODES, 1),
        "u": draw(1, WINDOW, 2),
        "mask": draw(1, WINDOW, N_NODES, 1) > -0.5,
        **graph,
    }
    out += [(name, signals) for name in OPERATIONS if name.startswith("model ")]
    return out


def evaluate(operation: str, inputs: Tensors, ts: ModuleType, sp: ModuleType) -> Tensors:
    """The outputs of one case, and the gradient of a weighted sum of them in every input."""
    leaves = {
        key: x.clone().requires_grad_() if x.is_floating_point() else x for key, x in inputs.items()
    }
    outputs = flatten(OPERATIONS[operation](ts, sp, **leaves))
    total = sum(
        ((x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum())
        for x in outputs.values()
        if x.requires_grad
    )
    result = {f"out_{key}": x.detach() for key, x in outputs.items()}
    if isinstance(total, Tensor):
        wanted = {key: x for key, x in leaves.items() if x.requires_grad}
        slopes = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        result |= {f"grad_{k}": g for k, g in zip(wanted, slopes, strict=True) if g is not None}
    return result


def flatten(output: Any, prefix: str = "") -> Tensors:
    """Tensors, matrices and plain numbers in any nesting, as named tensors."""
    if isinstance(output, Tensor):
        return {prefix or "0": output}
    if isinstance(output, list | tuple):
        return {k: x for i, o in enumerate(output) for k, x in flatten(o, f"{prefix}{i}").items()}
    if hasattr(output, "coo"):
        return flatten([*output.coo(), *output.sizes()], f"{prefix}m")
    return {} if output is None else {prefix: torch.tensor(output)}


# The record -------------------------------------------------------------------------------------


def encode(tensors: Tensors) -> dict[str, Any]:
    """Tensors as JSON: type, shape and numbers."""
    return {
        k: [str(x.dtype).removeprefix("torch."), list(x.shape), x.flatten().tolist()]
        for k, x in tensors.items()
    }


def decode(record: dict[str, Any]) -> Tensors:
    """The inverse of `encode`."""
    return {
        k: torch.tensor(numbers, dtype=getattr(torch, dtype)).view(shape)
        for k, (dtype, shape, numbers) in record.items()
    }


def main() -> None:
    """Write the record from the packages that are importable, which must be the real ones."""
    import torch_scatter
    import torch_sparse

    if "sdkd" in torch_scatter.__version__ + torch_sparse.__version__:
        sys.exit(
            "torch_scatter and torch_sparse are stand-ins here; put the real ones on the path."
        )
    recorded = []
    for operation, inputs in cases():
        result = evaluate(operation, inputs, torch_scatter, torch_sparse)
        recorded.append([operation, encode(inputs), encode(result)])
    versions = {m.__name__: m.__version__ for m in (torch, torch_scatter, torch_sparse)}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in recorded)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(f'{{"versions":{json.dumps(versions)},\n"cases":[\n{lines}\n]}}\n')
    print(f"{len(recorded)} cases in {RECORD} ({RECORD.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
