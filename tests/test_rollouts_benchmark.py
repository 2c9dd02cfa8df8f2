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

    monkeypatch.setattr(rollouts, "SETTINGS", ((5, 12), (1, 12)))
    monkeypatch.setattr(rollouts, "TEACHER_STEPS", 12)
    fields = random(6, 6, 1, 96), random(22, 4, 1, 96, seed=1)
    monkeypatch.setattr(rollouts, "simulated", lambda file: fields)
    return rollouts


def test_every_arm_is_run_once_and_kept(benchmark: ModuleType, tmp_path: Path):
    rows = benchmark.run(2, tmp_path, tmp_path / "rows.csv")
    floors, ours = len(benchmark.FLOORS), 2 + len(benchmark.OURS)
    sizes = {(6, 0): 1}
    sizes |= {(n, seed): 4 + (1 if seed else floors) + ours for n in (1, 5) for seed in (0, 1)}
    assert rows.groupby(["labelled", "seed"]).size().to_dict() == sizes
    again = benchmark.run(2, tmp_path, tmp_path / "rows.csv")
    pd.testing.assert_frame_equal(rows, again)
    students = rows[rows.arm != "teacher"].groupby(["labelled", "seed", "arm"]).one_step.first()
    # Training has moved all students of a seed, and no two arms alike.
    assert students.loc[5, 0].nunique() == len(students.loc[5, 0])
    benchmark.picture(rows)


@pytest.mark.parametrize(
    ("time", "error", "diverged", "missed"),
    [
        (60.0, 0.2, 0, []),
        (59.0, 0.2, 0, ["20 % longer"]),
        (60.0, 0.3, 0, ["half the spectrum error"]),
        (60.0, 0.2, 1, ["none diverged"]),
    ],
)
def test_the_bars(
    benchmark: ModuleType, time: float, error: float, diverged: int, missed: list[str]
):
    """Against the best arm on labels alone; a distilled arm's mean over seeds counts."""
    known = [
        ("labels: one step", 50.0, 0.4, 0),
        ("labels: unrolled", 40.0, 0.1, 0),
        ("teacher", 90.0, 0.0, 0),
        (benchmark.PLAIN, 200.0, 0.0, 0),
        (benchmark.OURS[0], 30.0, 0.0, 9),
        (benchmark.OURS[1], time - 1, error, diverged),
        (benchmark.OURS[1], time + 1, error, diverged),
    ]
    columns = ["arm", "correlation_time", "log_spectrum_error", "diverged"]
    rows = pd.DataFrame(known, columns=columns).assign(one_step=0.0, labelled=5)
    assert benchmark.missed(rows) == [f"5 trajectories: {bar}" for bar in missed]
