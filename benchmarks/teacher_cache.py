"""Training from a `TeacherCache` against plain training, live teachers and a plain memory map.

Appends rows to ``results/teacher_cache.csv`` beside this file, and exits with 1 when one misses
its bar. All is alternated in random order in one process; a row has medians of the repetitions:

- ``step``: an epoch of distillation from the cache, loader included, over the same epoch of an
  equal student with the task loss alone; at most 1.10. Beside it the same by hand, with `mse_loss`
  in place of our loss.
- ``reads``: bytes a second of random batches from the cache over those of ``numpy.memmap``, on the
  same numbers; at least 0.8. Beside it zarr, and the cache's first reads, which verify checksums.
- ``students``: training ten students from the cache, the building of it included, against ten with
  the live teacher: one epoch of each is timed, and epochs and students multiply; at least 5. Beside
  it the ratio of the pair if the teacher ran once and a cached step cost no more than a plain one.
- ``equal``: whether an epoch gives the same weights, bit for bit.

Rows before 2026-11-29 10:44 have a smaller teacher for the U-Net, which allows at most 4.29 for
ten students; its parameters are in the rows since then.

Run it with ``python benchmarks/teacher_cache.py``: six minutes on one core.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import zarr
from _record import RESULTS, append_rows, environment
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sdkd_plugin import (
    DistillationLoss,
    DistillationTerms,
    GraphTransform,
    GridTransform,
    SDKDDistiller,
    precompute,
)
from sdkd_plugin.cache import TeacherCache
from sdkd_plugin.models import GraphMixer, SimVP, UNet
from sdkd_plugin.report import parameter_count
from sdkd_plugin.spectral import AbstractTransform

STUDENTS, EPOCHS = 10, 30


Case = tuple[nn.Module, nn.Module, AbstractTransform, Tensor, int, dict[str, Any]]


def grid() -> Case:
    """SimVP, half as wide as published, and a U-Net on 64 x 64.

    Teacher, student, transform, data, batch size, inputs.
    """
    teacher = SimVP(in_channels=10, out_channels=10, in_frames=10, width=32, latent_width=256)
    student = UNet(in_channels=10, out_channels=10)
    return teacher, student, GridTransform((64, 64)), torch.randn(96, 10, 64, 64), 8, {}


def graph() -> Case:
    """A wide GraphMixer and a small one on a ring of 207 nodes."""
    nodes = torch.arange(207)
    edges = {"edge_index": torch.stack([nodes, nodes.roll(1)])}
    transform = GraphTransform.from_edges(edges["edge_index"], None, 207)
    teacher = GraphMixer(horizon=12, window=12, n_nodes=207, hidden_size=256, n_layers=6)
    student = GraphMixer(horizon=12, window=12, n_nodes=207)
    return teacher, student, transform, torch.randn(1024, 12, 207, 1), 64, edges


def alternated(candidates: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each candidate, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(-1, repetitions):
        for i in torch.randperm(len(candidates)).tolist():
            name, start = list(candidates)[i], time.perf_counter()
            candidates[name]()
            if repetition >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def epoch(
    parameters: Iterator[nn.Parameter],
    step: Callable[..., DistillationTerms],
    loader: DataLoader[Any],
    inputs: dict[str, Any],
) -> None:
    """One epoch, the loader included."""
    optimizer = torch.optim.Adam(parameters, 1e-3)
    for rows, x, y in loader:
        optimizer.zero_grad()
        step(x, y, index=rows, **inputs).total.backward()
        optimizer.step()


def training(name: str, folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Rows of a student."""
    teacher, student, transform, x, size, inputs = {"unet": grid, "graph_mixer": graph}[name]()
    loader = DataLoader(TensorDataset(torch.arange(len(x)), x, x.roll(1, 0)), size, shuffle=True)
    start = time.perf_counter()
    loss = DistillationLoss(teacher, transform)
    cache = precompute(loss, ({"x": part, **inputs} for part in x.split(size)), folder)
    building = time.perf_counter() - start
    known = cache.outputs(torch.arange(size))
    bare = copy.deepcopy(student)
    models = {
        "plain": SDKDDistiller(teacher, copy.deepcopy(student), transform, kd_weight=0.0),
        "cached": SDKDDistiller(cache, copy.deepcopy(student), transform),
        "live": SDKDDistiller(teacher, copy.deepcopy(student), transform),
    }

    def run(which: str) -> Callable[[], None]:
        return lambda: epoch(models[which].parameters(), models[which].step, loader, inputs)

    def by_hand(x: Tensor, y: Tensor, index: Tensor, **inputs: Any) -> DistillationTerms:
        forecast, (stored,) = bare(x, **inputs), cache.outputs(index, x)
        return DistillationTerms(F.mse_loss(forecast, y) + F.mse_loss(forecast, stored.forecast))

    candidates: dict[str, Callable[[], object]] = {which: run(which) for which in models}
    candidates["by hand"] = lambda: epoch(bare.parameters(), by_hand, loader, inputs)
    candidates["teacher"] = lambda: [loss.teacher_outputs(part, **inputs) for part in x.split(size)]
    seconds = alternated(candidates, repetitions)
    ratio = seconds["cached"] / seconds["plain"]
    inputs_of_step = {"x": x[:size], "index": torch.arange(size), **inputs}
    lookup = alternated(
        {
            "cached": lambda: models["cached"].step(**inputs_of_step),
            "known": lambda: models["cached"].step(outputs=known, **inputs_of_step),
        },
        repetitions,
    )
    said = f"; a step without the lookup {lookup['known'] / lookup['cached']:.3f} of one with it"
    live = STUDENTS * EPOCHS * seconds["live"]
    stored = building + STUDENTS * EPOCHS * seconds["cached"]
    pairs = {"live": copy.deepcopy(student), "cached": copy.deepcopy(student)}
    for which, made in pairs.items():
        torch.manual_seed(1)
        model = SDKDDistiller(cache if which == "cached" else teacher, made, transform)
        epoch(model.parameters(), model.step, loader, inputs)
    both = zip(pairs["live"].parameters(), pairs["cached"].parameters(), strict=True)
    equal = all(torch.equal(mine, theirs) for mine, theirs in both)
    epochs = f"plain {seconds['plain']:.3f} s, cached {seconds['cached']:.3f} s an epoch"
    epochs += f"; with mse_loss by hand {seconds['by hand'] / seconds['plain']:.3f}"
    n, once = STUDENTS * EPOCHS, seconds["teacher"]
    free = n * (once + seconds["plain"]) / (once + n * seconds["plain"])
    sizes = " and ".join(f"{parameter_count(model):,}" for model in (teacher, student))
    pair = f"parameters {sizes}; live {live:.0f} s, cached {stored:.0f} s with {building:.1f} s of "
    pair += "building; "
    pair += f"{free:.2f} if distilling were free, the teacher {once:.3f} s an epoch"
    return [
        row("step", name, ratio, 1.10, ratio <= 1.10, epochs + said),
        row("students", name, live / stored, 5, live / stored >= 5, pair),
        row("equal", name, equal, True, equal, "weights after an epoch"),
    ]


def reading(name: str, folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Random batches of a cache, of a plain memory map and of zarr."""
    x, size = {
        "grid": (torch.randn(4096, 10, 64, 64), 32),
        "graph": (torch.randn(65536, 12, 207, 1), 64),
    }[name]
    transform = GridTransform(tuple(x.shape[2:]))
    loss = DistillationLoss(lambda x: x, transform)
    cache = precompute(loss, ({"x": part} for part in x.split(32 * size // 8)), folder / "cache")
    raw = np.memmap(folder / "raw", np.float32, "w+", shape=tuple(x.shape))
    raw[:] = x.numpy()
    chunks = (1, *x.shape[1:])
    shards = (size, *x.shape[1:])
    store = zarr.create_array(
        folder / "zarr", data=x.numpy(), chunks=chunks, shards=shards, compressors=None
    )
    mapped = np.memmap(folder / "raw", np.float32, "r", shape=tuple(x.shape))
    some = list(torch.randperm(len(x)).split(size))
    fresh = TeacherCache(folder / "cache")
    start = time.perf_counter()
    fresh.verify()
    verifying = x.nbytes / (time.perf_counter() - start) / 1e9
    cache.verify()
    seconds = alternated(
        {
            "cache": lambda: each(cache.outputs, some),
            "plain": lambda: each(lambda rows: torch.from_numpy(mapped[rows.numpy()]), some),
            "zarr": lambda: each(lambda rows: store.oindex[rows.numpy()], some[:2]),
        },
        repetitions,
    )
    bytes_read = x[0].nbytes * size * len(some) / 1e9
    rates = {"cache": bytes_read / seconds["cache"], "plain": bytes_read / seconds["plain"]}
    rates["zarr"] = bytes_read * 2 / len(some) / seconds["zarr"]
    ratio = rates["cache"] / rates["plain"]
    said = ", ".join(f"{which} {rate:.2f} GB/s" for which, rate in rates.items())
    said += f"; verifying {verifying:.2f} GB/s, {x.nbytes / 1e9:.2f} GB"
    return [row("reads", name, ratio, 0.8, ratio >= 0.8, said)]


def each(read: Callable[[Tensor], object], some: list[Tensor]) -> None:
    """Read batch after batch and keep none."""
    for rows in some:
        read(rows)


def row(what: str, name: str, value: float, bar: float, passed: bool, said: str) -> dict[str, Any]:
    """A row of the record."""
    measured = {"what": what, "name": name, "value": round(float(value), 3), "bar": float(bar)}
    device = environment(torch.device("cpu"))
    return {**measured, "passed": passed, "measured": said, **device}


def main() -> int:
    """Measure, keep the rows, print what was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {"unet": training, "graph_mixer": training, "grid": reading, "graph": reading}
    parser.add_argument("names", nargs="*", help=f"some of {list(cases)} (default all)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each timing (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "teacher_cache.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in arguments.names or cases:
        with tempfile.TemporaryDirectory() as folder:
            rows += cases[name](name, Path(folder), arguments.repetitions)
    append_rows(arguments.out, rows)
    for made in rows:
        verdict = "passed" if made["passed"] else "MISSED"
        print("{what} {name}: {value} (bar {bar}), {measured}; {}".format(verdict, **made))
    return 0 if all(made["passed"] for made in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
