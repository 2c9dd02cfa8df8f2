"""The frequency-aligned loss on graphs: three engines in time, memory and error.

Appends a row a graph and engine to ``results/graph_loss.csv`` and draws ``results/graph_loss.png``.
Graphs: random geometric (six nearest neighbours), road-like (a grid without a fifth of its streets)
and scale-free (preferential attachment). Fields have 12 steps; 32 samples up to 8,600 nodes, 1
beyond. The loss is forward and backward, the least of a few calls. For 8,600 nodes and more, exact
is a dense orthonormal basis of that size: computing the true one takes minutes, using it as long.

Exits with 1 when a bar is missed:

- 2,000 nodes: energies of smooth bands within 1 % of exact, on smooth and on rough fields;
- 8,600 nodes: chebyshev is ready within 60 s, and takes at most a tenth of the dense basis' time;
- 10,000 to 1,000,000 nodes: time grows at most 1.15 times faster than edges, within 8 GiB.

``--data FOLDER``, the folder of T-GCN's Los-loop files, compares Laplacians instead: how much of
real signals' energy, but for the mean, each holds at low frequencies.

Run it with ``python benchmarks/graph_loss.py [--device cuda]``: five minutes on one core.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import scipy.fft
import torch
from _record import RESULTS, append_rows, environment
from scipy.spatial import cKDTree
from torch import Tensor

from sdkd_plugin import Bands, GraphTransform, frequency_aligned_loss

BANDS, WEIGHTS = Bands.split(0.25, transition=0.5), (0.5, 1.0)
RANK = 256
ERROR_BAR, PREPARE_BAR, DENSE_BAR, GROWTH_BAR, MEMORY_BAR = 0.01, 60.0, 0.1, 1.15, 8.0
CASES = [(207, "geometric"), *((2000, kind) for kind in ("geometric", "road-like", "scale-free"))]
CASES += [(n, "geometric") for n in (8600, 10_000, 100_000, 1_000_000)]


def graph(kind: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edges, weights, and a smooth signal."""
    rng = np.random.default_rng(0)
    place = rng.random((n, 2))
    if kind == "geometric":
        near = np.asarray(cKDTree(place).query(place, 7)[1])[:, 1:]
        edges = np.stack([np.repeat(np.arange(n), 6), near.ravel()])
    elif kind == "road-like":
        side = int(n**0.5)
        node = np.arange(side * side).reshape(side, side)
        place = np.stack([node.ravel() // side, node.ravel() % side], 1) / side
        streets = [node[:, :-1], node[:-1]], [node[:, 1:], node[1:]]
        edges = np.stack([np.concatenate([part.ravel() for part in ends]) for ends in streets])
        edges = edges[:, rng.random(edges.shape[1]) < 0.8]
    else:
        targets, ends = list(range(3)), []
        for new in range(3, n):
            chosen = rng.choice(targets, 3)
            ends += [(new, int(old)) for old in chosen]
            targets += [new, new, new, *chosen.tolist()]
        edges = np.array(ends).T
        place = np.stack([np.log1p(np.arange(n)) / 8, place[:, 1] / 10], 1)
    smooth = np.cos(4 * place[:, 0]) + np.sin(7 * place[:, 1])
    weight = torch.from_numpy(rng.random(edges.shape[1]) + 0.1)
    return torch.from_numpy(edges), weight, torch.from_numpy(smooth)


def loss_time(transform: GraphTransform, field: Tensor, calls: int) -> float:
    """Milliseconds forward and backward."""
    student, teacher = field.clone().requires_grad_(), torch.zeros_like(field)
    least = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        loss = frequency_aligned_loss(student, teacher, transform, BANDS, WEIGHTS)
        torch.autograd.grad(loss, student)
        if field.is_cuda:
            torch.cuda.synchronize()
        least = min(least, 1e3 * (time.perf_counter() - start))
    return least


def prepared(method: Any, edges: Tensor, weight: Tensor, n: int) -> GraphTransform:
    """A transform; a stand-in where all eigenvectors would take minutes."""
    if method == "exact" and n >= 8600:
        basis = torch.from_numpy(scipy.fft.idct(np.eye(n, dtype=np.float32), axis=0, norm="ortho"))
        return GraphTransform(basis, torch.arange(n) / n)
    return GraphTransform.from_edges(edges, weight, n, method=method, rank=RANK)


def measure(n: int, kind: str, device: torch.device) -> list[dict[str, Any]]:
    """A row an engine."""
    edges, weight, smooth = graph(kind, n)
    n = len(smooth)
    batch = 32 if n <= 8600 else 1
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(batch, 12, n, 1, generator=generator).to(device)
    signals = torch.stack([smooth + 0.1 * field[0, 0, :, 0].cpu(), field[0, 1, :, 0].cpu()])
    signals = signals.float()[:, None, :, None].to(device)
    methods = ["exact"] if n <= 8600 else []
    methods += ["low-rank"] if n <= 8600 and n > RANK else []
    rows, energies = [], {}
    for method in [*methods, "chebyshev"]:
        start = time.perf_counter()
        transform = prepared(method, edges, weight, n).to(device)
        row = {"nodes": n, "edges": edges.shape[1], "kind": kind, "method": method, "batch": batch}
        row["prepare_s"] = round(time.perf_counter() - start, 2)
        try:
            row["loss_ms"] = round(loss_time(transform, field, 3 if n > 2000 else 10), 2)
            energies[method] = transform.sample_band_energy(signals, BANDS)
        except ValueError:  # edges above the frequencies that low-rank keeps
            row["loss_ms"] = ""
        if method in energies and method != "exact" and "exact" in energies and n < 8600:
            true = energies["exact"]
            row["error"] = f"{float(((energies[method] - true) / true).abs().max()):.1e}"
        cuda = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * _resident()
        row["peak_gib"] = round(peak / 2**30, 2)
        rows.append(row | environment(device))
        print({name: row.get(name) for name in (*list(row)[:8], "error")}, flush=True)
    return rows


def _resident() -> int:
    """Kilobytes, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Which bars are met."""
    fast = {(row["nodes"], row["kind"]): row for row in rows if row["method"] == "chebyshev"}
    dense = next(row for row in rows if row["nodes"] == 8600 and row["method"] == "exact")
    own, small, large = (fast[n, "geometric"] for n in (8600, 10_000, 1_000_000))
    growth = (large["loss_ms"] / small["loss_ms"]) / (large["edges"] / small["edges"])
    share = own["loss_ms"] / dense["loss_ms"]
    errors = [float(row["error"]) for row in fast.values() if 1900 < row["nodes"] <= 2000]
    print(f"largest error {max(errors):.4f}, share of dense {share:.3f}, growth {growth:.2f}")
    return {
        f"energies within {ERROR_BAR:.0%}": max(errors) <= ERROR_BAR,
        f"ready within {PREPARE_BAR} s": own["prepare_s"] <= PREPARE_BAR,
        f"at most {DENSE_BAR} of the dense basis": share <= DENSE_BAR,
        f"time grows at most {GROWTH_BAR} times faster than edges": growth <= GROWTH_BAR,
        f"1 M nodes within {MEMORY_BAR} GiB": large["peak_gib"] <= MEMORY_BAR,
    }


def laplacians(folder: Path) -> None:
    """Shares of energy, but for the mean, by Laplacian."""
    weights = torch.from_numpy(np.loadtxt(folder / "los_adj.csv", delimiter=","))
    speed = torch.from_numpy(np.loadtxt(folder / "los_speed.csv", delimiter=",", skiprows=1))
    edges = weights.nonzero().T
    constant = torch.ones(1, 207, 1, dtype=torch.float64)
    for name in ("symmetric", "combinatorial"):
        transform = GraphTransform.from_edges(
            edges, weights[edges[0], edges[1]], 207, normalization=name, dtype=torch.float64
        )
        high = transform.sample_band_energy(constant, Bands.split(0.25))[0, 1] / 207
        for signal, x in (("speeds", speed), ("5-minute changes", speed.diff(dim=0))):
            frequency, energy = transform.spectrum(x[..., None])
            energy = energy.where(frequency > 0, 0) / energy[frequency > 0].sum()
            low = [f"f < {f}: {float(energy[frequency < f].sum()):.3f}" for f in (0.1, 0.25, 0.5)]
            most = [
                f"{q:.0%} of modes: {float(energy[: int(207 * q)].sum()):.3f}" for q in (0.1, 0.25)
            ]
            print(
                f"{name:14} {signal:17} constant above .25: {float(high):.3f}",
                *low,
                *most,
                sep="  ",
            )


def main() -> int:
    """Measure each graph, keep the rows, print what was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--data", type=Path, help="compare Laplacians on this folder's signals")
    parser.add_argument("--out", type=Path, default=RESULTS / "graph_loss.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.data:
        laplacians(arguments.data)
        return 0
    rows = [row for case in CASES for row in measure(*case, torch.device(arguments.device))]
    append_rows(arguments.out, rows)
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for method in ("exact", "low-rank", "chebyshev"):
        own = [
            r for r in rows if r["method"] == method and r["kind"] == "geometric" and r["loss_ms"]
        ]
        per_sample = [row["loss_ms"] / row["batch"] for row in own]
        axes.plot([row["nodes"] for row in own], per_sample, "o-", label=method)
    axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="ms a sample of 12 steps")
    axes.legend()
    figure.savefig(arguments.out.with_suffix(".png"), dpi=100)
    met = verdicts(rows)
    print(*(f"{'passed' if passed else 'MISSED'}: {bar}" for bar, passed in met.items()), sep="\n")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
