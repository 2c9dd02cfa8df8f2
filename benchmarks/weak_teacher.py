"""What a teacher that is no better costs, what a good one brings, with trust and without.

Turbulence at two viscosities and a week of traffic. The weak teacher is a network like the student
whose training is stopped early: of six lengths, the one whose validation error comes nearest to
1.25 times that of the student alone. It teaches a student that has all labels. The good teacher is
a large network; it teaches a student that has a twelfth of the labels, because with all of them
there is little to gain, at ten times the weight of the few labels. Other options are the defaults,
of plain-MSE distillation.

    python benchmarks/weak_teacher.py --data FOLDER   # with the Los-loop files; two cores, an hour

Rows and weights are kept in ``--out``, and the same command goes on where it was stopped. Exits
with 1 if by default a weak teacher costs more than 1 %, or a good one's gain falls by over a tenth.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from _record import RESULTS, write_record
from torch import nn

from sdkd_plugin.models import GraphAlterNet, GraphMixer, STAlterNet, UNet
from sdkd_plugin.report import command_line_errors, format_table, paired_change
from sdkd_plugin.report.tables import Change
from sdkd_plugin.study import Arm, Task, navier_stokes_task, study, traffic_task

ALONE, TRUSTED, BLIND = "student alone", "distilled (default)", "distilled, trust=False"
WEAK, GOOD = "weak teacher, all labels", "good teacher, a twelfth of the labels"
WORSE, LENGTHS = 1.25, (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)
TASKS = ["ns_0.001", "ns_0.0001", "traffic"]
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class System:
    """A task, the models by their part, and how they are trained."""

    task: Task
    student: Make
    weak: Make
    good: Make
    steps: int
    lr: float
    batch_size: int


def turbulence(viscosity: float) -> System:
    """Ten frames in, the next ten out."""
    solver: dict[str, Any] = {
        "viscosity": viscosity,
        "resolution": 16,
        "solver_resolution": 64,
        "batch_size": 50,
    }
    task = replace(navier_stokes_task(sizes=(240, 120, 100), **solver), labels_first=True)
    frames: dict[str, Any] = {"in_channels": 10, "out_channels": 10, "coordinates": True}
    student, weak = partial(UNet, width=8, **frames), partial(UNet, width=10, **frames)
    good = partial(STAlterNet, width=16, depth=3, **frames)
    task = replace(task, name=f"ns_{viscosity:g}")
    return System(task, student, weak, good, steps=3000, lr=3e-3, batch_size=8)


def traffic(folder: Path) -> System:
    """An hour in, the next hour out."""
    task = replace(traffic_task(folder), name="traffic", measure="mae")
    sizes: dict[str, Any] = {"input_size": 1, "exog_size": 2, "window": 12, "horizon": 12}
    sizes |= {"n_nodes": task.train.x.shape[2]}
    student, weak = partial(GraphMixer, **sizes), partial(GraphMixer, hidden_size=40, **sizes)
    good = partial(GraphAlterNet, patch_size=12, **sizes)
    return System(task, student, weak, good, steps=1000, lr=5e-3, batch_size=32)


def run_system(system: System, options: argparse.Namespace) -> pd.DataFrame:
    """The rows of students and teachers; the setting is the teacher's part."""
    task, measure = system.task, system.task.measure
    common: dict[str, Any] = {
        "lr": system.lr,
        "batch_size": system.batch_size,
        "jobs": options.jobs,
    }
    train = partial(study, task, validations=20, folder=options.out / task.name, **common)
    learn = partial(train, student=system.student, steps=system.steps, seeds=options.seeds)

    def arms(labels: float) -> list[Arm]:
        plain: dict[str, Any] = {"weighting": (1.0,) * task.bands.n_bands, "labels": labels}
        plain |= {"kd_weight": 1.0 if labels == 1 else 10.0}
        alone = Arm(ALONE, labels=labels, kd_weight=0)
        return [alone, Arm(TRUSTED, **plain), Arm(BLIND, trust=False, **plain)]

    teach: dict[str, Any] = {"arms": [Arm("teacher", kd_weight=0)], "seeds": 1}
    alone = learn(arms=arms(1.0)[:1]).rows
    aim = WORSE * alone[alone.model == ALONE].validation.mean()
    early = [
        train(student=system.weak, steps=max(20, round(share * system.steps)), **teach)
        for share in LENGTHS
    ]
    weak = min(early, key=lambda r: abs(r.rows.validation.dropna().item() - aim))
    good = train(student=system.good, steps=2 * system.steps, **{**teach, "lr": 2e-3})
    parts = []
    for name, teacher, labels in ((WEAK, weak, 1.0), (GOOD, good, 1 / 12)):
        rows = learn(teacher=teacher.models("teacher"), arms=arms(labels)).rows
        parts.append(rows[rows.model.isin(["teacher", ALONE, TRUSTED, BLIND])].assign(setting=name))
    return pd.concat(parts).assign(measure=measure)


def compared(rows: pd.DataFrame, setting: str, of: str, against: str) -> Change:
    """The measure of two arms of a setting."""
    groups = {"of": {"model": of}, "against": {"model": against}}
    return paired_change(rows[rows.setting == setting], column=rows.measure.iloc[0], **groups)


def verdict(name: str, rows: pd.DataFrame) -> dict[str, tuple[bool, str]]:
    """Whether the two bars are met, and the figures."""
    hurt, blind = (compared(rows, WEAK, arm, ALONE) for arm in (TRUSTED, BLIND))
    gain, most = (compared(rows, GOOD, arm, ALONE) for arm in (TRUSTED, BLIND))
    return {
        f"{name}: a weak teacher costs at most 1 %": (
            hurt.relative <= 0.01,
            f"{hurt}; with trust=False {blind}",
        ),
        f"{name}: a good teacher's gain is kept to within a tenth": (
            gain.relative <= 0.9 * most.relative,
            f"{gain}; with trust=False {most}",
        ),
    }


def run(options: argparse.Namespace) -> bool:
    """Train what is missing, write and print the record; whether all bars are met."""
    made = {
        "ns_0.001": partial(turbulence, 1e-3),
        "ns_0.0001": partial(turbulence, 1e-4),
        "traffic": partial(traffic, options.data),
    }
    kept, found = list[pd.DataFrame](), dict[str, tuple[bool, str]]()
    parts = [f"# A weak teacher, a good one\n\n{__doc__.split(chr(10) * 2)[1]}\n"]
    parts.append(f"Of these tasks: {', '.join(options.tasks)}.\n")
    for system in (made[name]() for name in options.tasks):
        name, measure = system.task.name, system.task.measure
        rows = run_system(system, options)
        columns = {measure: (measure.upper(), ".3g"), "validation": ("validation", ".3g")}
        shown = columns | {"parameters": ("parameters", ",.0f"), "steps": ("steps", ",.0f")}
        table = format_table(rows, index=["setting", "model"], columns=shown)
        parts.append(f"## {name}\n\n{system.task.source}. {options.seeds} seeds.\n\n{table}\n")
        kept.append(rows)
        found |= verdict(name, rows)
        lines = [f"- {'met' if ok else 'MISSED'}: {bar}: {x}" for bar, (ok, x) in found.items()]
        text = "\n".join([*parts, "## Bars\n", *lines]) + "\n"
        write_record(options.results / "weak_teacher", text, pd.concat(kept))
        print(f"{table}\n", *lines, sep="\n", flush=True)
    return all(ok for ok, _ in found.values())


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the Los-loop files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/weak_teacher"), help="%(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    with command_line_errors(parser.prog):
        if options.data is None and "traffic" in options.tasks:
            raise ValueError("--tasks traffic needs --data, a folder with the Los-loop files.")
        met = run(options)
    sys.exit(not met)


if __name__ == "__main__":
    main()
