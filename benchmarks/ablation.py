"""What each part of the method is worth: weightings, latents, aggregations, options.

Appends a row a student to ``results/ablation_PRESET.csv`` beside this file, as soon as it is
trained, and writes the table of all rows of the same protocol to ``results/ablation_PRESET.md``.
The systems are turbulence at two viscosities, computed here, and a week of traffic, read from
``--data``. Students are independent of each other: ``--jobs`` processes train them, each with one
CPU thread, and on a CPU a row does not depend on how many there are.

    python benchmarks/ablation.py --data FOLDER             # two cores, under half an hour
    python benchmarks/ablation.py --data FOLDER --resume    # go on after an interruption
    python benchmarks/ablation.py --preset full --device cuda --jobs 1 --data FOLDER
    python benchmarks/ablation.py --help

There is no bar: a part that is worth nothing is a result.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _ablation_report import report
from _ablation_rows import ROWS
from _ablation_systems import SYSTEMS, System
from _ablation_training import Task, problem_of, run
from _record import RESULTS, append_rows
from tqdm import tqdm

from sdkd_plugin.report import Run, UserError, choose_device, command_line_errors

Rows = list[dict[str, Any]]
KEY = ["system", "protocol", "setting", "seed"]


def prepare(task: Task) -> Rows:
    """Have the data computed and cached, so that no two processes do it at once."""
    problem_of(task)
    return []


def plan(options: argparse.Namespace, systems: dict[str, System], work: Path) -> list[Task]:
    """A task for each student."""
    device = str(choose_device(options.device))
    return [
        Task(name, system, options.data, work, device, setting, key, seed)
        for seed in range(options.seeds)
        for key in options.rows
        for setting in ROWS[key].settings
        for name, system in systems.items()
    ]


def chosen_systems(options: argparse.Namespace) -> tuple[dict[str, System], list[str]]:
    """The systems to run, and a sentence for each that is left out.

    Raises:
        UserError: if the traffic is asked for but its folder is not given.
    """
    every = SYSTEMS[options.preset]
    names = options.systems or list(every)
    left_out = []
    if options.data is None and "traffic" in names:
        if options.systems:
            raise UserError("--systems traffic needs --data, a folder with the Los-loop files.")
        names = [name for name in names if name != "traffic"]
        left_out.append("Traffic is left out: no folder was given with `--data`.")
    return {name: every[name] for name in every if name in names}, left_out


@contextmanager
def workers(jobs: int) -> Iterator[Any]:
    """Something that maps tasks, in whatever order they are done: processes, or this one."""
    if jobs == 1:
        torch.set_num_threads(1)  # as the workers: other threads sum in another order
        yield lambda function, tasks: map(function, tasks)
        return
    # Forked processes would inherit torch's threads and a CUDA context, which neither survives.
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    )
    try:
        yield lambda function, tasks: (
            done.result() for done in as_completed([pool.submit(function, t) for t in tasks])
        )
    finally:
        pool.shutdown(cancel_futures=True)


def teacher_tasks(students: list[Task]) -> list[Task]:
    """The teachers that these students need; the first of each system before the others."""
    of_system = {task.name: task for task in students}
    return [
        replace(task, setting="", row="", seed=index)
        for index in range(max((len(t.system.teachers) for t in students), default=0))
        for task in of_system.values()
        if index < len(task.system.teachers)
    ]


def keys(rows: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """What tells recorded rows apart."""
    return rows[KEY].itertuples(index=False, name=None)


def read(path: Path) -> pd.DataFrame:
    """The newest record of each row, from all runs so far."""
    if not path.exists():
        return pd.DataFrame(columns=KEY)
    rows = pd.read_csv(path, keep_default_na=True).fillna({"setting": ""})
    return rows.drop_duplicates([*KEY, "row"], keep="last")


def run_ablation(options: argparse.Namespace) -> None:
    """Teachers, students, rows, table."""
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1.")
    systems, left_out = chosen_systems(options)
    out = Run(options.out)
    csv = out.folder / f"ablation_{options.preset}.csv"
    with tempfile.TemporaryDirectory() as folder, workers(options.jobs) as mapped:
        students = plan(options, systems, Path(folder))
        done = set(keys(read(csv))) if options.resume else set()
        missing = [task for task in students if task.key not in done]
        teachers = teacher_tasks(missing)
        with tqdm(total=len(teachers) + len(missing), unit="model") as bar:
            for _ in mapped(prepare, [task for task in teachers if task.seed == 0]):
                pass
            for tasks in (teachers, missing):
                for rows in mapped(run, tasks):
                    append_rows(csv, rows)
                    bar.update()
    # Rows of the same protocol that an earlier run has recorded belong into the table, too.
    everything = argparse.Namespace(**{**vars(options), "rows": list(ROWS)})
    planned = plan(everything, systems, out.folder)
    protocols = {task.protocol for task in [*planned, *teacher_tasks(planned)]}
    recorded = read(csv)
    text = report(recorded[recorded.protocol.isin(protocols)], systems, left_out)
    table = out.text(f"ablation_{options.preset}.md", text)
    print(f"{text}\nTable: {table}\nRows: {csv}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(SYSTEMS), default="quick")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS["quick"]), help="default: all")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--data", type=Path, help="folder with the Los-loop files, for traffic")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="run only what is not recorded yet; on a CPU the teachers come out the same again",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and table")
    with command_line_errors(parser.prog):
        run_ablation(parser.parse_args())


if __name__ == "__main__":
    main()
