"""A training step of `GraphAlterNet` against the nodes, beside tsl's GRU-GCN of the same width.

Forward, backward and Adam on a road-like graph (eight nearest neighbours), batches of 8 windows of
12 steps with covariates, 48 channels; all else as by default. Models take turns, so that all meet
the same load; the time is the median of their steps, and ratios are medians over the turns.

Exits with 1 if at 675 nodes a step by landmarks takes more than twice GRU-GCN's or ``auto`` has no
landmarks, or if from there to 2000 its time grows more than 1.3 times faster than the nodes.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _record import RESULTS, environment, write_record
from scipy.spatial import cKDTree
from torch import Tensor, nn

import sdkd_plugin.adapters.tsl  # noqa: F401 - so that tsl can be imported
from sdkd_plugin.models import GraphAlterNet

from tsl.nn.models import GRUGCNModel  # isort: skip

NODES, BATCH, WIDTH, FRAMES = (207, 675, 2000), 8, 48, 12
GRU, EXACT, LANDMARKS = "GRU-GCN (tsl)", "exact", "landmarks"


def graph(n: int) -> tuple[Tensor, Tensor]:
    """Edges to the eight nearest neighbours, and their weights."""
    place = np.random.default_rng(0).random((n, 2))
    distance, near = map(np.asarray, cKDTree(place).query(place, 9))
    edges = np.stack([np.repeat(np.arange(n), 8), near[:, 1:].ravel()])
    weight = np.exp(-((distance[:, 1:].ravel() * n**0.5) ** 2))
    return torch.from_numpy(edges), torch.from_numpy(weight).float()


def models(n: int) -> dict[str, nn.Module]:
    """What is compared on ``n`` nodes."""
    sizes: dict[str, Any] = dict(input_size=1, horizon=FRAMES, exog_size=2, hidden_size=WIDTH)
    ours = partial(GraphAlterNet, n_nodes=n, window=FRAMES, **sizes)
    gru = GRUGCNModel(output_size=1, enc_layers=1, gcn_layers=2, **sizes)
    return {GRU: gru, EXACT: ours(attention="exact"), LANDMARKS: ours(attention="landmarks")}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    model(**inputs).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - start


def measure(n: int, turns: int) -> list[dict[str, Any]]:
    """A row a model."""
    torch.manual_seed(0)
    edges, weight = graph(n)
    inputs = {"x": torch.randn(BATCH, FRAMES, n, 1), "u": torch.randn(BATCH, FRAMES, 2)}
    inputs |= {"edge_index": edges, "edge_weight": weight}
    made = models(n)
    adam = {name: torch.optim.Adam(model.parameters()) for name, model in made.items()}
    run = {name: partial(step, model, adam[name], inputs) for name, model in made.items()}
    times = pd.DataFrame([{name: each() for name, each in run.items()} for _ in range(turns + 1)])
    times = times[1:]  # the first step allocates
    ratio = times.div(times[GRU], axis=0).median()
    by_default = GraphAlterNet(n_nodes=n, window=FRAMES, horizon=FRAMES)
    chosen = LANDMARKS if "landmarks" in repr(by_default) else EXACT
    return [
        {"nodes": n, "model": name, "step_ms": round(1e3 * times[name].median(), 1)}
        | {"of_gru_gcn": round(ratio[name], 2), "auto": name == chosen}
        | {"parameters": sum(p.numel() for p in model.parameters())}
        | {"batch": BATCH, "edges": len(weight), "turns": turns}
        | environment(torch.device("cpu"))
        for name, model in made.items()
    ]


def main() -> None:
    """Measure, write the record, print which bars are missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9, help="steps of each model (default: 9)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = pd.DataFrame([row for n in NODES for row in measure(n, options.turns)])
    columns = ["nodes", "model", "step_ms", "of_gru_gcn", "auto", "parameters"]
    text = f"{__doc__.split('Exits')[0]}\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|\n"
    text += "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows[columns].values.tolist())
    write_record(options.results / "graph_teacher", text, rows)
    print(text)
    own = rows[rows.model == LANDMARKS].set_index("nodes")
    growth = own.step_ms[2000] / own.step_ms[675] / (2000 / 675)
    ratio = own.of_gru_gcn[675]
    bars = {
        f"at most twice GRU-GCN's step at 675 nodes: {ratio}": ratio <= 2,
        "landmarks by default at 675 nodes": bool(own.auto[675]),
        f"time grows at most 1.3 times faster than the nodes: {growth:.2f}": growth <= 1.3,
    }
    sys.exit("\n".join(f"missed: {bar}" for bar, met in bars.items() if not met) or 0)


if __name__ == "__main__":
    main()
