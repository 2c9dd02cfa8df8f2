"""The five-seed report on a week of traffic, on a small csv pair and a few steps."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def week(tmp_path: Path) -> Path:
    """A small csv pair."""
    generator = np.random.default_rng(0)
    steps, nodes = 320, 6
    day = 50 + 10 * np.sin(2 * np.pi * np.arange(steps) / 288)[:, None]
    speed = day + generator.normal(size=(steps, nodes))
    names = [f"s{i}" for i in range(nodes)]
    folder = tmp_path / "week"
    folder.mkdir()
    pd.DataFrame(speed, columns=names).to_csv(folder / "my_speed.csv", index=False)
    ring = np.eye(nodes) + 0.5 * np.roll(np.eye(nodes), 1, axis=1)
    pd.DataFrame(ring).to_csv(folder / "my_adj.csv", index=False, header=False)
    return folder


def module(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("traffic_week", BENCHMARKS / "traffic_week.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_linear_forecaster_has_no_graph_and_starts_at_the_last_reading(monkeypatch):
    benchmark = module(monkeypatch)
    model = benchmark.LinearForecaster()
    torch.nn.init.zeros_(model.map.weight)
    torch.nn.init.zeros_(model.map.bias)
    x, u = torch.randn(3, 12, 5, 1), torch.randn(3, 12, 2)
    torch.testing.assert_close(model(x, u), x[:, -1:].expand(-1, 12, -1, -1))
    torch.nn.init.normal_(model.map.weight)
    order = torch.randperm(5)
    torch.testing.assert_close(model(x[:, :, order], u), model(x, u)[:, :, order])


def test_teachers_come_first_and_few_seeds_are_few(monkeypatch):
    benchmark = module(monkeypatch)
    tasks = benchmark.tasks(5, list(benchmark.FORECASTERS))
    assert [task.model for task in tasks[:5]] == [benchmark.TEACHER] * 5
    assert sum(task.model == "Graph WaveNet (tsl)" for task in tasks) == 1
    for student in benchmark.STUDENTS:
        assert sum(task.model == student for task in tasks) == 10
    done = pd.DataFrame([task._asdict() for task in tasks[:7]])
    assert [benchmark.is_done(task, done) for task in tasks[:9]] == [True] * 7 + [False] * 2


@pytest.mark.slow
def test_a_small_run_goes_on_where_it_was_and_prints_all_rows(week, tmp_path):
    students = ["student alone", "student, plain-MSE distillation", "student, SDKD"]
    command = [sys.executable, str(BENCHMARKS / "traffic_week.py"), "--data", str(week)]
    command += ["--start", "2024-01-08", "--freq", "5min", "--missing", "none"]
    command += ["--seeds", "3", "--scale", "0.003", "--jobs", "1", "--out", str(tmp_path / "out")]
    command += ["--results", str(tmp_path), "--models", "linear, graph-free", "teacher, one"]
    command += students

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False)

    first = run()
    # Hardly trained, the bars of distillation are missed: that is said, and nothing worse.
    assert first.returncode in (0, 1), first.stderr
    assert "Traceback" not in first.stderr, first.stderr
    table = (tmp_path / "traffic_week.md").read_text()
    for name in ("persistence", "historical average", "teachers together", *students):
        assert f"| {name} |" in table
    rows = pd.read_csv(tmp_path / "traffic_week.csv")
    assert len(rows) == 3 + 3 + 18
    assert rows[["mae_15", "rmse_60", "mape_average"]].gt(0).all(axis=None)
    other = run("--scale", "1")
    assert other.returncode == 2
    assert "has rows of scale [0.003], expected 1.0" in other.stderr
    again = run()
    assert "seed" not in again.stdout.split("Traffic speeds")[0]
    assert len(pd.read_csv(tmp_path / "traffic_week.csv")) == len(rows)
