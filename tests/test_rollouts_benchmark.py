"""The benchmark of roll-outs: every arm runs, rows are kept, and the bars are those of its text."""

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from small import random


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import rollouts

    monkeypatch.setattr(rollouts, "TEACHER_STEPS", 12)
    fields = random(6, 6, 1, 96), random(22, 4, 1, 96, seed=1)
    monkeypatch.setattr(rollouts, "simulated", lambda file: fields)
    return rollouts


def test_every_arm_is_run_once_and_kept(benchmark: ModuleType, tmp_path: Path):
    rows = benchmark.run(2, 12, tmp_path, tmp_path / "rows.csv")
    arms = len(benchmark.LABELS) + len(benchmark.DISTILLED) + 1
    counts = rows[rows.arm != "teacher"].groupby("seed").size()
    assert counts.to_dict() == {0: arms + len(benchmark.FLOORS), 1: arms + 1}
    again = benchmark.run(2, 12, tmp_path, tmp_path / "rows.csv")
    pd.testing.assert_frame_equal(rows, again)
    students = rows[(rows.arm != "teacher") & (rows.seed == 0)]
    # Training has moved all students of a seed, and no two arms alike.
    assert students.one_step.nunique() == len(students)
    benchmark.picture(rows)


def test_the_teacher_is_chosen_on_validation(benchmark: ModuleType, tmp_path: Path, monkeypatch):
    times = iter([5.0, 9.0, 7.0, 8.0, 20.0, 6.0])
    found = ({"correlation_time": t, "diverged": 2.0 * (t == 20.0)} for t in times)
    monkeypatch.setattr(benchmark, "scores", lambda model, truth: next(found))
    chosen = benchmark.best_teacher(*benchmark.simulated(tmp_path), tmp_path)
    kept = benchmark.load_file(
        tmp_path / f"{list(benchmark.TEACHERS)[1].replace(' ', '_')}.safetensors"
    )
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
        (benchmark.PLAIN, 200.0, 0.0, 0, 55.0),
        (benchmark.DISTILLED[2], time, error, diverged, 60.0),
    ]
    columns = ["arm", "correlation_time", "log_spectrum_error", "diverged"]
    each = pd.DataFrame(known, columns=[*columns, "validation_correlation_time"])
    rows = pd.concat([each.assign(seed=seed, one_step=0.0) for seed in range(2)])
    assert list(benchmark.verdicts(rows).values()) == met
