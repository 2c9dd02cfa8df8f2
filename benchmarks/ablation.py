"""What each part of the method is worth: weightings, latents, aggregations, options.

Each row changes one thing against plain-MSE distillation, or against its base; the last puts parts
together. The systems are turbulence at two viscosities and convection, computed here, and a week of
traffic, read from ``--data``. Rows and weights are kept in ``--out`` as they come, and the same
command goes on where it was stopped; the rows and the table of all systems go to ``results/``. On a
CPU a row does not depend on ``--jobs``.

    python benchmarks/ablation.py --data FOLDER             # two cores, about an hour
    python benchmarks/ablation.py --preset full --device cuda --jobs 1 --data FOLDER
    python benchmarks/ablation.py --help

There is no bar: a part that is worth nothing is a result.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from _record import RESULTS, write_record
from torch import nn

from sdkd_plugin import LatentPair, ProductTransform
from sdkd_plugin.losses.latents import FeatureLossName
from sdkd_plugin.models import GraphAlterNet, GraphMixer, SimVP, STAlterNet, UNet
from sdkd_plugin.report import check_folder, choose_device, command_line_errors
from sdkd_plugin.study import (
    Arm,
    Result,
    Task,
    navier_stokes_task,
    rayleigh_benard_task,
    study,
    traffic_task,
)

Make = Callable[..., nn.Module]
Options = dict[str, Any]
ALONE, PLAIN = "student alone", "plain-MSE distillation"
LATENT_WEIGHT = 0.1
FRAMES = {"in_channels": 10, "out_channels": 10}
EQUAL, LOW, HIGH = (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)
QUARTER, ALL, BOTH = (0.25,), (1.0,), (0.25, 1.0)


def latent(loss: FeatureLossName = "frequency") -> tuple[LatentPair, ...]:
    """One pair of taps."""
    return (LatentPair(weight=LATENT_WEIGHT, loss=loss),)


BRANCHES = (
    LatentPair("latent", "latent_high", LATENT_WEIGHT, weighting=HIGH),
    LatentPair("latent", "latent_low", LATENT_WEIGHT, weighting=LOW),
)
MEAN, ONE_LATENT = "two teachers: mean (AVER-MKD)", "latent: frequency-aligned"
# By the name that --rows takes: the row's name, the shares of labels it is run with, and what it
# changes. The hyper-parameters were chosen once, before any row was scored, and tuned for no row.
ROWS: dict[str, tuple[str, Sequence[float], Options]] = {
    "alone": (ALONE, BOTH, {"kd_weight": 0}),
    "plain": (PLAIN, BOTH, {}),
    # A weighting also changes the teacher's total weight: this row tells the two apart.
    "twice": ("plain-MSE, twice the teacher's weight", QUARTER, {"kd_weight": 2.0}),
    "fixed": ("weighting: fixed (1, 2)", BOTH, {"weighting": "fixed"}),
    "relative": ("weighting: relative", QUARTER, {"weighting": "relative"}),
    "adaptive": ("weighting: adaptive", QUARTER, {"weighting": "adaptive"}),
    "confidence": ("weighting: confidence", QUARTER, {"weighting": "confidence"}),
    "latent": (ONE_LATENT, QUARTER, {"latents": latent()}),
    "latent_bands": ("latent: both branches", QUARTER, {"latents": BRANCHES, "base": ONE_LATENT}),
    "fitnets": ("latent: FitNets", QUARTER, {"latents": latent("fitnets")}),
    "attention": ("latent: attention transfer", QUARTER, {"latents": latent("attention")}),
    "boundary": ("latent: activation boundaries", QUARTER, {"latents": latent("boundary")}),
    "mean": (MEAN, QUARTER, {"teachers": 2}),
    "aekd": ("two teachers: AEKD", QUARTER, {"teachers": 2, "aggregation": "aekd", "base": MEAN}),
    "camkd": (
        "two teachers: CAMKD",
        QUARTER,
        {"teachers": 2, "aggregation": "camkd", "base": MEAN},
    ),
    "time": ("bands along time: fixed (1, 2)", BOTH, {"weighting": "fixed", "over": "time"}),
    # It concerns labelled samples only.
    "bounded": ("teacher-bounded, margin 0", BOTH, {"teacher_bound": 0.0}),
    "matching": ("function matching: mixup", QUARTER, {"augmentation": "mixup"}),
    "sdkd": ("SDKD: fixed, latent", QUARTER, {"weighting": "fixed", "latents": latent()}),
}


@dataclass(frozen=True)
class System:
    """One system: data, models, and how they are trained."""

    task: Callable[..., Task]
    teachers: dict[str, Make]
    student: Make
    teaching: Options
    learning: Options
    kd_weight: float


def grid_system(task: Callable[..., Task], *, full: bool, padding: str) -> System:
    """Turbulence or convection, ten frames in and the next ten out."""
    shared: Options = {**FRAMES, "coordinates": True, "padding": padding}
    wide, deep, latent_width = (64, 4, 256) if full else (16, 3, 64)
    narrow = 16 if full else 8
    return System(
        partial(task, sizes=(960, 120, 120) if full else (120, 30, 50)),
        {
            "teacher 1: STAlterNet": partial(STAlterNet, width=wide, depth=deep, **shared),
            "teacher 2: SimVP": partial(SimVP, width=narrow, latent_width=latent_width, **shared),
        },
        partial(UNet, width=narrow, **shared),
        {"steps": 20_000 if full else 800, "lr": 1e-3 if full else 2e-3, "batch_size": 10},
        # On a CPU many small batches teach more in the same time than a few large ones.
        {"steps": 10_000 if full else 800, "lr": 3e-3, "batch_size": 10 if full else 4},
        kd_weight=10.0,
    )


def systems(full: bool) -> dict[str, System]:
    """By the name that --systems takes."""
    n = 2 if full else 1
    grid: Options = {"resolution": 32 * n, "solver_resolution": 256 if full else 64}
    # The smaller number is what the smaller solver's grid resolves.
    convection: Options = {"rayleigh": 1e6 if full else 1e5, "resolution": (32 * n, 24 * n)}
    convection["solver_resolution"] = (64 * n, 32 * n)
    sizes: Options = {} if full else {"patch_size": 12, "hops": 2}
    graph: Options = {"input_size": 1, "exog_size": 2, "window": 12, "horizon": 12}
    flows = {
        f"ns_{name}": partial(navier_stokes_task, viscosity=float(name), batch_size=20, **grid)
        for name in ("1e-3", "1e-5")
    }
    made = {k: grid_system(task, full=full, padding="periodic") for k, task in flows.items()}
    layer = partial(rayleigh_benard_task, **convection)
    made["rayleigh_benard"] = grid_system(layer, full=full, padding="reflect")
    made["traffic"] = System(
        traffic_task,
        {
            "teacher 1: GraphAlterNet": partial(GraphAlterNet, **graph, **sizes),
            "teacher 2: GraphMixer": partial(
                GraphMixer, **graph, hidden_size=96, emb_size=16, n_layers=3
            ),
        },
        partial(GraphMixer, **graph),
        {"steps": 4_000 if full else 600, "lr": 4e-3, "batch_size": 32},
        {"steps": 4_000 if full else 500, "lr": 5e-3, "batch_size": 32},
        kd_weight=1.0,
    )
    return made


def arms(rows: Sequence[str], kd_weight: float, task: Task) -> list[Arm]:
    """The arms of some rows, first those with a share of the labels."""
    made = []
    for share in (*QUARTER, *ALL):
        for key in rows:
            name, shares, changes = ROWS[key]
            if share in shares:
                options: Options = {"teachers": 1, "weighting": EQUAL, **changes}
                options["kd_weight"] = kd_weight * changes.get("kd_weight", 1.0)
                if over := options.pop("over", None):
                    frames = task.train.y.shape[1]
                    options["transform"] = ProductTransform(task.transform, frames, over=over)
                made.append(Arm(name, labels=share, **options))
    return made


def run_system(name: str, system: System, options: argparse.Namespace) -> Result:
    """Train teachers and students in the folder of the system, and compare."""
    models = {**system.teachers, ALONE: system.student}
    if name == "traffic":
        task = system.task(options.data)
        models = {k: partial(m, n_nodes=task.train.x.shape[2]) for k, m in models.items()}
    else:
        task = system.task(device=options.device)
    task = replace(task, name=name, measure="mae" if name == "traffic" else "relative_l2")
    student = models.pop(ALONE)
    common: Options = {"folder": options.out / options.preset / name, "device": options.device}
    common |= {"jobs": options.jobs, "validations": 10}
    teachers = [Arm(name, model=make, kd_weight=0) for name, make in models.items()]
    taught = study(task, arms=teachers, seeds=1, **system.teaching, **common)
    return study(
        task,
        student=student,
        teacher={name: taught.models(name)[0] for name in models},
        arms=arms(options.rows, system.kd_weight, task),
        seeds=options.seeds,
        **system.learning,
        **common,
    )


PROTOCOL = f"""\
# Ablation

Each row changes one thing against plain-MSE distillation, or against the base that the table names:
AEKD and CAMKD change the aggregation of two teachers against their mean; both branches (each guides
its band, at twice the weight in all) are tapped instead of one latent. The last row puts parts
together. All students of a system take equally many optimisation steps; function matching makes two
forecasts in each and mixes readings without their time of day. With 25% of the labels the teachers
forecast all training inputs; the student alone uses the labelled ones only. On traffic nearly every
reading without a label is an input of another window, so that setting is artificial there. The
hyper-parameters were set once, before any row was scored: fixed band weights 1 and 2,
{LATENT_WEIGHT:g} for each pair of latents, the defaults of this package elsewhere. Among so many
tests about one in twenty has p < 0.05 by chance."""


def run_ablation(options: argparse.Namespace) -> None:
    """All systems; the table is written anew after each."""
    if min(options.seeds, options.jobs) < 1:
        raise ValueError("--seeds and --jobs are expected to be at least 1.")
    for folder in (options.out, options.results):
        check_folder(folder)
    options.device = str(choose_device(options.device))
    every = systems(options.preset == "full")
    names = options.systems or list(every)
    if options.data is None and "traffic" in names:
        if options.systems:
            raise ValueError("--systems traffic needs --data, a folder with the Los-loop files.")
        names.remove("traffic")
        print("Traffic is left out: no folder was given with --data.")
    parts, rows = [PROTOCOL], []
    for name in names:
        try:
            result = run_system(name, every[name], options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        parts += [f"## {name}", result.report()]
        rows.append(result.rows)
        record = options.results / f"ablation_{options.preset}"
        write_record(record, "\n\n".join(parts).rstrip() + "\n", pd.concat(rows))
        print(f"{result.report()}\nTable and rows so far: {record}.md, .csv", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["quick", "full"], default="quick")
    parser.add_argument("--systems", nargs="+", choices=list(systems(False)), help="default: all")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--data", type=Path, help="folder with the Los-loop files, for traffic")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="rows and weights")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of table and CSV")
    with command_line_errors(parser.prog):
        run_ablation(parser.parse_args())


if __name__ == "__main__":
    main()
