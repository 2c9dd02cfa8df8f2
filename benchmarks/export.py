"""Exported students against eager teachers on two CPU threads: latency and accuracy by width.

Turbulence as in ``examples/ns_2d.py`` and traffic as in ``examples/metr_la.py``, with short
trainings of one seed: a teacher, then students of four widths, alone and distilled, all with the
same steps. Every student is exported to ONNX and timed in turns with its teacher.

    python benchmarks/export.py --data FOLDER  # with the Los-loop files; without, simulated traffic

Writes ``results/export.md``, ``.csv`` and ``.png``, and exits with 1 if the exported student of the
example's width forecasts one sample less than 10 times as fast as the eager teacher.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from _record import RESULTS, write_record
from torch import nn

from sdkd_plugin.data import simulate_traffic
from sdkd_plugin.models import GraphAlterNet, GraphMixer, STAlterNet, UNet
from sdkd_plugin.report import command_line_errors, format_table
from sdkd_plugin.report.figures import accuracy_latency
from sdkd_plugin.report.speed import measure_speed
from sdkd_plugin.study import Arm, Result, Task, navier_stokes_task, study, traffic_task

ALONE, SDKD = "student alone", "SDKD"
THREADS, BAR = 2, 10.0


class Plan(NamedTuple):
    """A problem: its models, and how they are trained."""

    task: Task
    teacher: Callable[[], nn.Module]
    student: Callable[..., nn.Module]
    width: str
    widths: Sequence[int]
    example: int
    recipes: Sequence[dict[str, Any]]
    teaching: dict[str, Any]
    labels: float = 1.0


def turbulence() -> Plan:
    """As ``examples/ns_2d.py``, with fewer steps."""
    solver: dict[str, Any] = {"viscosity": 1e-3, "resolution": 16, "solver_resolution": 32}
    task = navier_stokes_task(sizes=(480, 40, 60), batch_size=50, **solver)
    frames: dict[str, Any] = {"in_channels": 10, "out_channels": 10, "coordinates": True}
    teacher, student = partial(STAlterNet, width=16, depth=3, **frames), partial(UNet, **frames)
    recipes = [{"steps": 600, "lr": lr, "batch_size": 8} for lr in (2e-3, 3e-3)]
    teaching = {"kd_weight": 10.0}
    return Plan(task, teacher, student, "width", (4, 6, 8, 12), 8, recipes, teaching, 40 / 480)


def traffic(data: Path | None) -> Plan:
    """As ``examples/metr_la.py``, with fewer steps."""
    task = traffic_task(data or simulate_traffic(n_sensors=200, days=7))
    sizes: dict[str, Any] = {
        "horizon": 12,
        "window": 12,
        "n_nodes": task.train.x.shape[2],
        "exog_size": 2,
    }
    teacher, student = partial(GraphAlterNet, patch_size=12, **sizes), partial(GraphMixer, **sizes)
    common = {"batch_size": 32, "validations": 10, "weight_decay": 1e-3, "clip": 5.0}
    recipes = [{"steps": n, "lr": lr, **common} for n, lr in ((440, 4e-3), (660, 5e-3))]
    return Plan(task, teacher, student, "hidden_size", (8, 16, 32, 64), 32, recipes, {})


def trained(plan: Plan, folder: Path) -> tuple[nn.Module, Result]:
    """The teacher, and the students that it taught beside those alone."""
    common: dict[str, Any] = {"seeds": 1, "folder": folder}
    alone = Arm("teacher", kd_weight=0)
    first = study(plan.task, student=plan.teacher, arms=[alone], **plan.recipes[0], **common)
    (teacher,) = first.models("teacher")
    ways: dict[str, dict[str, Any]] = {ALONE: {"kd_weight": 0}, SDKD: plan.teaching}
    arms = [
        Arm(f"{way}, {width}", model=make, labels=plan.labels, **options)
        for width in plan.widths
        for make in [partial(plan.student, **{plan.width: width})]
        for way, options in ways.items()
    ]
    return teacher, study(plan.task, teacher=teacher, arms=arms, **plan.recipes[1], **common)


def timed(plan: Plan, folder: Path, seconds: float) -> tuple[pd.DataFrame, bool]:
    """Rows of a problem, with the error of each arm, and whether the bar is met."""
    task, (teacher, result) = plan.task, trained(plan, folder)

    def inputs(size: int) -> dict[str, Any]:
        (batch,) = task.batches(task.train.select(slice(size)), size=size)
        return batch

    # The time of a student does not depend on how it was trained.
    students = {str(width): result.models(f"{SDKD}, {width}")[0] for width in plan.widths}
    options: dict[str, Any] = {"forms": ["onnx"], "batch_sizes": (1, 8), "seconds": seconds}
    found = measure_speed({"teacher": teacher, **students}, inputs, threads=THREADS, **options)
    errors = result.rows.set_index("model")[task.measure]
    rows = found.rows.assign(problem=task.name, source=task.source, measure=task.measure)
    for way in (ALONE, SDKD):
        names = {name: f"{way}, {name}" for name in students} | {"teacher": "teacher"}
        rows[way] = rows.model.map(names).map(errors)
    measured = rows[(rows.model == str(plan.example)) & (rows.form == "onnx")]
    return rows, bool(measured.set_index("batch_size").times_faster[1] >= BAR)


def points(rows: pd.DataFrame) -> pd.DataFrame:
    """For the figure: exported students alone and distilled, and the eager teacher."""
    one = (
        rows[rows.batch_size == 1].assign(deviation=0.0).rename(columns={"p50_ms": "milliseconds"})
    )
    teacher = one[(one.model == "teacher") & (one.form == "eager")]
    parts = [teacher.assign(series="teacher, eager", error=teacher[SDKD], reference=True)]
    students = one[(one.model != "teacher") & (one.form == "onnx")]
    for way in (ALONE, SDKD):
        parts.append(students.assign(series=f"{way}, ONNX", error=students[way], reference=False))
    return pd.concat(parts)


def main() -> None:
    """Train what is missing, time, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the Los-loop files")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a time (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/export"), help="%(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with command_line_errors(parser.prog):
        plans = [turbulence(), traffic(options.data)]
        timings = {p.task.name: timed(p, options.out, options.seconds) for p in plans}
        rows = pd.concat([each for each, _ in timings.values()])
        styles = {
            "p50_ms": ".3f",
            "p95_ms": ".3f",
            "times_faster": ".1f",
            "samples_per_second": ",.0f",
        }
        styles |= {
            "parameters": ",.0f",
            "flops": ".3g",
            "memory_mb": ".1f",
            ALONE: ".4g",
            SDKD: ".4g",
        }
        columns = {name: (name.replace("_", " "), style) for name, style in styles.items()}
        index = ["problem", "model", "form", "batch_size"]
        steps = {p.task.name: [recipe["steps"] for recipe in p.recipes] for p in plans}
        text = (
            f"{THREADS} CPU threads, {rows.hardware.iloc[0]}. A model is the teacher or a "
            "student's width. The last columns are its error (MSE of turbulence, MAE of traffic) "
            f"alone and distilled, one seed; steps of teacher and students: {steps}. Times faster: "
            f"than the eager teacher at that batch size. Traffic: {rows.source.iloc[-1]}.\n\n"
            f"{format_table(rows, index=index, columns=columns)}\n"
        )
        write_record(options.results / "export", text, rows)
        panels = {name: points(each) for name, (each, _) in timings.items()}
        accuracy_latency(panels, "error").savefig(options.results / "export.png", dpi=110)
        print(text)
    missed = [name for name, (_, met) in timings.items() if not met]
    sys.exit(f"less than {BAR:g} times as fast: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
