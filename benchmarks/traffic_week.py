"""One week of traffic, five seeds: baselines, teachers, and the student alone and distilled.

The task: an hour of readings in, the next hour out, at every sensor; windows split in time, 70 %
for training, 10 % for validation, 20 % for test; scaled by the readings of the training part;
masked errors in miles an hour, of the weights with the least validation MAE. All teachers together,
a `GraphAlterNet` a seed, teach the student by their mean forecast. The student learns from all
labels, or from those of the first quarter of the training period; the teachers have seen them all.

    python benchmarks/traffic_week.py --data FOLDER

The folder holds T-GCN's csv pair, such as the Los-loop week. Rows are kept in ``--out`` as they
come, and an interrupted run goes on where it was. The table and all rows go to ``results/``.
Exits with 1 when a bar is missed: the student has at most 20 % of one teacher's parameters, it
forecasts at least five times as fast, and distillation makes it no worse in either setting and
better in at least one (paired t-test over seeds, 5 %).
"""

import argparse
import logging
import math
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from _record import RESULTS, append_rows, environment
from _traffic import (
    AT,
    FIT,
    HORIZON,
    WINDOW,
    LinearForecaster,
    TrafficWeek,
)
from safetensors.torch import load_file, save_file
from torch import nn
from tsl.engines import Predictor
from tsl.metrics.torch import MaskedMAE
from tsl.nn.models import GraphWaveNetModel, GRUGCNModel

from sdkd_plugin.adapters.tsl import DistillationPredictor, SDKDStudent, SDKDTeacher
from sdkd_plugin.data.store import atomic_path
from sdkd_plugin.report import (
    UserError,
    command_line_errors,
    format_table,
    milliseconds_a_forecast,
    paired_change,
    parameter_count,
)

ALL, QUARTER = "all labels", "a quarter of the labels"
SETTINGS = {ALL: 1.0, QUARTER: 0.25}
ALONE, PLAIN, SDKD = "student alone", "student, plain-MSE distillation", "student, SDKD"
STUDENTS = (ALONE, PLAIN, SDKD)
TEACHER, TEACHERS = "teacher, one", "teachers together"


class Forecaster(NamedTuple):
    """A model of the table: how it is made and trained, and for how many seeds."""

    make: Callable[[int], nn.Module]
    steps: int
    lr: float
    most_seeds: int = 5


def teacher(n_nodes: int) -> nn.Module:
    """The large model."""
    return SDKDTeacher(1, HORIZON, WINDOW, n_nodes, exog_size=2, patch_size=12)


def student(n_nodes: int) -> nn.Module:
    """The small model."""
    return SDKDStudent(1, HORIZON, WINDOW, n_nodes, exog_size=2)


def gru_gcn(n_nodes: int) -> nn.Module:
    """Tsl's time-then-space model."""
    return GRUGCNModel(
        input_size=1,
        hidden_size=64,
        output_size=1,
        horizon=HORIZON,
        exog_size=2,
        enc_layers=1,
        gcn_layers=2,
    )


def graph_wavenet(n_nodes: int) -> nn.Module:
    """Tsl's Graph WaveNet, with its own sizes."""
    return GraphWaveNetModel(1, 1, HORIZON, exog_size=2, n_nodes=n_nodes)


# Steps of batch 32; an epoch is 44 of them.
FORECASTERS = {
    "linear, graph-free": Forecaster(lambda n_nodes: LinearForecaster(), 880, 3e-3),
    "GRU-GCN (tsl)": Forecaster(gru_gcn, 880, 3e-3),
    "Graph WaveNet (tsl)": Forecaster(graph_wavenet, 132, 2e-3, most_seeds=1),
    TEACHER: Forecaster(teacher, 880, 4e-3),
    **{name: Forecaster(student, 1320, 5e-3) for name in STUDENTS},
}
KD_WEIGHT = 1.0


class Task(NamedTuple):
    """One training."""

    model: str
    setting: str
    seed: int

    def weights(self, folder: Path) -> Path:
        """Where the trained model is kept."""
        name = "-".join(str(part) for part in self).lower()
        return folder / (name.replace(",", "").replace(" ", "_") + ".safetensors")


def train(task: Task, data: Path, csv: dict[str, Any], out: Path, scale: float) -> dict[str, Any]:
    """Train one model and score it; its weights stay in the folder."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("tsl").setLevel(logging.ERROR)
    week = TrafficWeek(data, **csv)
    forecaster = FORECASTERS[task.model]
    torch.manual_seed(task.seed)
    model = forecaster.make(week.dataset.n_nodes)
    steps = max(1, round(scale * forecaster.steps))
    lesson = week.lesson(SETTINGS[task.setting], only_labelled=task.model not in (PLAIN, SDKD))
    epochs = math.ceil(steps / len(lesson.train_dataloader()))
    options = {
        **FIT,
        "loss_fn": MaskedMAE(),
        "model": model,
        "optim_class": torch.optim.AdamW,
        "optim_kwargs": {"lr": forecaster.lr, "weight_decay": 1e-3},
        "scheduler_class": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_kwargs": {"T_max": epochs},
    }
    if task.model in (PLAIN, SDKD):
        predictor = DistillationPredictor(
            trained_teachers(week, out),
            week.transform(),
            week.bands,
            weighting=(1.0, 1.0) if task.model == PLAIN else "fixed",
            kd_weight=KD_WEIGHT,
            **options,
        )
        predictor.ask_teachers(lesson)
    else:
        predictor = Predictor(**options)
    validation = week.train(predictor, lesson, steps, task.seed)
    path = task.weights(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(model.state_dict(), temporary)
    scores = week.scores(week.forecast(model))
    taught = len(predictor.distiller.teachers) if task.model in (PLAIN, SDKD) else 0
    settings = {"scale": scale, "teachers": taught, "data": fingerprint(week)}
    return task._asdict() | scores | settings | {"validation_mae": validation, "steps": steps}


def fingerprint(week: TrafficWeek) -> str:
    """Tells data sets apart: their source, and what persistence scores on them."""
    return f"{week.data.source}, persistence {week.scores(week.persistence())['mae_average']:.6f}"


def csv_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the files of a csv pair do not say."""
    return {name: getattr(options, name) for name in ("start", "freq", "missing")}


def load_week(options: argparse.Namespace) -> TrafficWeek:
    """The data of the command line.

    Raises:
        UserError: if they cannot be read.
    """
    try:
        return TrafficWeek(options.data, **csv_options(options))
    except ValueError as error:
        raise UserError(f"--data {error}") from error


def trained_teachers(week: TrafficWeek, out: Path) -> list[nn.Module]:
    """All teachers whose weights are there."""
    teachers = []
    for seed in range(FORECASTERS[TEACHER].most_seeds):
        path = Task(TEACHER, ALL, seed).weights(out)
        if path.exists():
            model = teacher(week.dataset.n_nodes)
            model.load_state_dict(load_file(path))
            teachers.append(model.eval())
    return teachers


def tasks(seeds: int, models: list[str]) -> list[Task]:
    """All trainings, those that others wait for first."""
    everything = [
        Task(model, setting, seed)
        for model, forecaster in FORECASTERS.items()
        for setting in (SETTINGS if model in STUDENTS else [ALL])
        for seed in range(min(seeds, forecaster.most_seeds))
        if model in models
    ]
    return sorted(everything, key=lambda task: task.model != TEACHER)


def run(options: argparse.Namespace) -> pd.DataFrame:
    """Do what has not been done yet, and return all rows."""
    rows_file = options.out / "rows.csv"
    done = read(rows_file)
    check_settings(done, options)
    todo = [task for task in tasks(options.seeds, options.models) if not is_done(task, done)]
    threads = max(1, multiprocessing.cpu_count() // options.jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:

        def submit(task: Task) -> "Future[dict[str, Any]]":
            csv = csv_options(options)
            return pool.submit(train, task, options.data, csv, options.out, options.scale)

        def keep(futures: "list[Future[dict[str, Any]]]") -> None:
            for future in futures:
                row = future.result()
                append_rows(rows_file, [row | environment(torch.device("cpu"))])
                print(
                    f"{row['model']}, {row['setting']}, seed {row['seed']}: "
                    f"MAE {row['mae_average']:.3f}",
                    flush=True,
                )

        # Students wait for all teachers; the baselines fill the gap.
        first = [submit(task) for task in todo if task.model == TEACHER]
        others = [submit(task) for task in todo if task.model not in (TEACHER, PLAIN, SDKD)]
        keep(first)
        last = [submit(task) for task in todo if task.model in (PLAIN, SDKD)]
        keep([*others, *last])
    return read(rows_file)


def check_settings(rows: pd.DataFrame, options: argparse.Namespace) -> None:
    """Refuse to go on where other data, steps or teachers have left rows.

    Raises:
        UserError: naming what differs.
    """
    if rows.empty:
        return
    taught = set(rows[rows.model.isin((PLAIN, SDKD))].teachers)
    now = {"scale": options.scale, "data": fingerprint(load_week(options))}
    for name, value in now.items():
        if set(rows[name]) != {value}:
            raise UserError(
                f"--out {options.out} has rows of {name} {sorted(set(rows[name]))}, "
                f"expected {value!r}: give another folder."
            )
    if taught and taught != {min(options.seeds, FORECASTERS[TEACHER].most_seeds)}:
        raise UserError(
            f"--out {options.out} has students of {sorted(taught)} teachers, expected "
            f"--seeds to be as many: give another folder."
        )


def read(path: Path) -> pd.DataFrame:
    """Rows so far, none where there is no file."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(Task._fields))


def is_done(task: Task, rows: pd.DataFrame) -> bool:
    """Whether a row of the task is there."""
    same = (rows.model == task.model) & (rows.setting == task.setting) & (rows.seed == task.seed)
    return bool(same.any())


def untrained(week: TrafficWeek, out: Path) -> list[dict[str, Any]]:
    """Rows of what is not trained here: the baselines without weights, the teachers' mean."""
    forecasts = {
        "persistence": week.persistence(),
        "historical average": week.historical_average(),
    }
    if teachers := trained_teachers(week, out):
        forecasts[TEACHERS] = torch.stack([week.forecast(t) for t in teachers]).mean(0)
    return [
        {"model": name, "setting": ALL, "seed": 0} | week.scores(forecast)
        for name, forecast in forecasts.items()
    ]


def costs(week: TrafficWeek, n_teachers: int) -> pd.DataFrame:
    """Parameters and time of one forecast of one window, by model, all in this process."""
    torch.set_num_threads(1)
    batch = next(iter(week.module.test_dataloader(batch_size=1)))
    cost: dict[str, tuple[int, float]] = {}
    for name, forecaster in FORECASTERS.items():
        model = forecaster.make(week.dataset.n_nodes).eval()
        predictor = Predictor(model=model).eval()
        milliseconds = milliseconds_a_forecast(predictor.predict_batch, batch, repetitions=100)
        cost[name] = parameter_count(model), milliseconds
    parameters, milliseconds = cost[TEACHER]
    cost[TEACHERS] = n_teachers * parameters, n_teachers * milliseconds
    rows = [{"model": name, "parameters": n, "ms": ms} for name, (n, ms) in cost.items()]
    return pd.DataFrame(rows)


COLUMNS = {
    **{
        f"{metric}_{minutes}": (f"{metric.upper()} {minutes}", style)
        for minutes in ("average", *AT)
        for metric, style in {"mae": ".3f", "rmse": ".2f", "mape": ".2f"}.items()
    },
    "parameters": ("parameters", ",.0f"),
    "ms": ("ms", ".2f"),
}


def report(rows: pd.DataFrame, options: argparse.Namespace) -> tuple[str, list[str]]:
    """The table with its protocol, and the bars that were missed."""
    week = load_week(options)
    n_teachers = len(trained_teachers(week, options.out))
    rows = pd.concat([pd.DataFrame(untrained(week, options.out)), rows], ignore_index=True)
    rows = rows.merge(costs(week, n_teachers), on="model", how="left")
    order = ["persistence", "historical average", *FORECASTERS]
    order.insert(order.index(TEACHER) + 1, TEACHERS)
    rows["setting"] = rows.setting.where(rows.model.isin(STUDENTS), "-")
    rows["group"] = rows.setting.map(["-", *SETTINGS].index)
    rows["rank"] = rows.model.map(order.index)
    rows = rows.sort_values(["group", "rank", "seed"], kind="stable")
    seeds = rows.groupby(["model", "setting"]).seed.nunique().rename("seeds").reset_index()
    rows = rows.merge(seeds, on=["model", "setting"])
    rows["seeds"] = rows.seeds.where(rows.model.isin(FORECASTERS), 1)

    lines = [
        f"Traffic speeds, {WINDOW} steps in, the next {HORIZON} out; {week.data.source}; "
        f"{len(week.data.node_ids)} sensors, {len(week.data.index)} steps of five minutes. Windows "
        "split in time, 70 % for training, 10 % for validation, 20 % for test; scaled by the "
        "training readings; errors in miles an hour (MAPE in %), averaged over the horizon and at "
        "15, 30 and 60 minutes; mean ± standard deviation over seeds. AdamW, batch 32, cosine; "
        "steps: "
        + ", ".join(f"{name} {f.steps}" for name, f in FORECASTERS.items() if name not in STUDENTS)
        + f", every student {FORECASTERS[ALONE].steps}; the weights with the least validation MAE "
        f"count. {n_teachers} teachers, one a seed, trained on all labels; their mean forecast "
        f"teaches with kd_weight {KD_WEIGHT:g}; SDKD counts the bands above a quarter of the "
        "highest frequency twice. Time: one window on one CPU thread, to be compared within this "
        "table only.",
        "",
        format_table(rows, index=["setting", "model", "seeds"], columns=COLUMNS),
        "",
    ]
    missed = []
    cost = rows.groupby("model")[["parameters", "ms"]].first()
    share = cost.parameters[ALONE] / cost.parameters[TEACHER]
    faster = cost.ms[TEACHER] / cost.ms[ALONE]
    lines.append(
        f"- The student has {share:.1%} of one teacher's parameters and forecasts {faster:.1f} "
        f"times as fast as one teacher, {n_teachers * faster:.1f} times as fast as all."
    )
    if share > 0.2 or faster < 5:
        missed.append("the student is not small and fast enough")
    better = []
    for setting in SETTINGS:
        for of, against in [(PLAIN, ALONE), (SDKD, ALONE), (SDKD, PLAIN)]:
            change = paired_change(
                rows,
                column="mae_average",
                of={"setting": setting, "model": of},
                against={"setting": setting, "model": against},
            )
            lines.append(f"- {setting}: {of} against {against}: MAE {change}")
            if (of, against) == (SDKD, ALONE):
                better.append(change.relative < 0 and change.p_value < 0.05)
                if change.relative > 0:
                    missed.append(f"distillation makes the student worse with {setting}")
    if not any(better):
        missed.append("distillation does not make the student better in any setting")
    alone = rows[(rows.model == ALONE) & (rows.setting == ALL)].mae_average.mean()
    taught = rows[rows.model == TEACHERS].mae_average.mean()
    verb = "beat" if taught < alone else "do NOT beat"
    lines.append(
        f"- The teachers together {verb} the student alone: MAE {taught:.3f}, {alone:.3f}."
    )
    return "\n".join(lines) + "\n", missed


def main() -> None:
    """Read the command line, run what is missing, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with traffic files")
    parser.add_argument("--start", help="of another csv pair than Los-loop: its first time")
    parser.add_argument("--freq", help="likewise: its step, such as 5min")
    parser.add_argument("--missing", choices=["none", "zeros", "nan"], help="likewise")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default: 5)")
    parser.add_argument("--models", nargs="+", choices=FORECASTERS, default=list(FORECASTERS))
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps")
    parser.add_argument("--out", type=Path, default=Path("runs/traffic_week"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with command_line_errors(parser.prog):
        rows = run(options)
        if {TEACHER, *STUDENTS} - set(rows.model):
            print(f"Rows so far: {options.out}; a run without --models makes the table.")
            return
        text, missed = report(rows, options)
        print(text)
        with atomic_path(options.results / "traffic_week.md") as path:
            path.write_text(text, encoding="utf-8")
        with atomic_path(options.results / "traffic_week.csv") as path:
            rows.to_csv(path, index=False)
    for bar in missed:
        print(f"missed: {bar}", file=sys.stderr)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
