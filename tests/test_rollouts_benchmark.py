"""The benchmark of roll-outs: every arm runs, rows are kept, and the bars are those of its text."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from small import random


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import rollouts

    def simulated(flow, cache: Path):
        grid = flow.transform.shape
        return random(6, 6, 1, *grid), random(22, 4, 1, *grid, seed=1)

    monkeypatch.setattr(rollouts, "simulated", simulated)
    monkeypatch.setattr(rollouts, "FLOWS", {k: quick(flow) for k, flow in rollouts.FLOWS.items()})
    return rollouts


def quick(flow):
    """A flow with few steps."""
    return replace(flow, steps=(6, 12), batch=4)


@pytest.mark.parametrize("name", ["ks", "kolmogorov"])
def test_every_arm_is_run_once_and_kept(benchmark: ModuleType, tmp_path: Path, name: str):
    flow = benchmark.FLOWS[name]

    def run(labels: int) -> pd.DataFrame:
        return benchmark.run(flow, labels, 2, 12, tmp_path, tmp_path / "rows.csv")

    found = {labels: run(labels) for labels in (4, 5)}
    rows = found[5]
    arms = len(flow.labels) + len(flow.distilled) + len(benchmark.REFERENCES) - 1
    counts = rows[rows.arm != "teacher"].groupby("seed").size()
    assert counts.to_dict() == {0: arms + len(flow.floors), 1: arms + 1}
    assert set(rows[rows.arm.isin(benchmark.REFERENCES)].labels) == {6 * 5}
    pd.testing.assert_frame_equal(rows, run(5))
    every = pd.concat(found.values()).drop_duplicates()
    students = every[(every.arm != "teacher") & (every.seed == 0)]
    # Training has moved all students of a seed, and no two arms or numbers of labels alike.
    assert students.one_step.nunique() == len(students)
    benchmark.picture(found)


def test_the_teacher_is_chosen_on_validation(benchmark: ModuleType, tmp_path: Path, monkeypatch):
    flow = benchmark.FLOWS["ks"]
    times = iter([5.0, 9.0, 20.0])
    found = ({"correlation_time": t, "diverged": 2.0 * (t == 20.0)} for t in times)
    monkeypatch.setattr(benchmark, "scores", lambda *given: next(found))
    chosen = benchmark.best_teacher(flow, *benchmark.simulated(flow, tmp_path), tmp_path)
    arm = list(flow.teachers)[1].replace(" ", "_")
    kept = benchmark.load_file(tmp_path / f"{flow.scenario}_{arm}_{flow.steps[0]}.safetensors")
    assert all((kept[name] == value).all() for name, value in chosen.state_dict().items())


@pytest.mark.parametrize(
    ("time", "error", "diverged", "met"),
    [
        (60.5, 0.2, 0, [True, True, True]),
        (59.0, 0.2, 0, [False, True, True]),
        (60.5, 0.3, 0, [True, False, True]),
        (60.5, 0.2, 1, [True, True, False]),
    ],
)
def test_the_bars(benchmark: ModuleType, time: float, error: float, diverged: int, met: list[bool]):
    """The arms that are best on validation are compared; means over seeds count."""
    known = [
        ("labels: one step", 50.0, 0.4, 0, 50.0),
        ("labels: unrolled", 70.0, 0.1, 0, 40.0),
        ("teacher", 90.0, 0.0, 0, 90.0),
        ("distilled: one step", 200.0, 0.0, 0, 55.0),
        ("distilled: on-policy", time, error, diverged, 60.0),
    ]
    columns = ["arm", "correlation_time", "log_spectrum_error", "diverged"]
    each = pd.DataFrame(known, columns=[*columns, "validation_correlation_time"])
    zeros = {"one_step": 0.0, "cpu_seconds": 0.0}
    rows = pd.concat([each.assign(seed=seed, **zeros) for seed in range(2)])
    assert list(benchmark.verdicts(rows).values()) == met
