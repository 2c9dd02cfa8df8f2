"""The benchmark of the traffic week: its simple baselines, and a small run that goes on."""

import importlib
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from sdkd_plugin.data import simulate_traffic
from sdkd_plugin.report import parameter_count
from sdkd_plugin.study import Samples


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("traffic_week")


def test_the_linear_forecaster_has_no_graph_and_starts_at_the_last_reading(benchmark):
    model = benchmark.Linear()
    x, u = torch.randn(3, 12, 5, 1), torch.randn(3, 12, 2)
    order = torch.randperm(5)
    torch.testing.assert_close(model(x[:, :, order], u), model(x, u)[:, :, order])
    torch.nn.init.zeros_(model.map.weight)
    torch.nn.init.zeros_(model.map.bias)
    torch.testing.assert_close(model(x, u), x[:, -1:].expand(-1, 12, -1, -1))


def test_the_historical_average_and_the_errors(benchmark):
    angle = 2 * torch.pi * torch.arange(3 * 288)[:, None] / 288
    clock = torch.stack([angle.sin(), angle.cos()], -1).expand(-1, 12, -1)
    y = torch.randn(3 * 288, 12, 4, 1)
    mask = torch.ones_like(y, dtype=torch.bool)
    mask[5, 0, 0] = mask[7::288, 0, 0] = False
    average = benchmark.historical_average
    days = Samples(y, y.masked_fill(~mask, 1e6), mask, {"u": clock})
    found = average(days, days.select(torch.tensor([288 + 5, 7])))
    expected = y[5::288].mean(0)
    expected[0, 0] = y[5::288][1:, 0, 0].mean()
    torch.testing.assert_close(found[0], expected)
    assert found[1, 0, 0] == 0  # never observed: the mean of all, in normalised units
    scores = benchmark.errors({"30": 5}, torch.full_like(y, 2.0), Samples(y, y * 0 + 4, mask))
    assert scores == pytest.approx({"rmse": 2, "mape": 50, "rmse_30": 2, "mape_30": 50})


def test_the_models_are_those_of_the_table(benchmark):
    counts = {name: parameter_count(plan[0]()) for name, plan in benchmark.plans(207).items()}
    assert list(counts.values()) == [180, 30_668, 98_908, 8_228]


def test_a_small_run_goes_on_and_has_all_rows(benchmark, monkeypatch, tmp_path, capsys):
    traffic = simulate_traffic(n_sensors=8, days=2, seed=1, progress=False)
    task, plans = benchmark.traffic_task(traffic), benchmark.plans
    monkeypatch.setattr(benchmark, "traffic_task", lambda folder: task)
    monkeypatch.setitem(benchmark.BATCHES, "validations", 1)

    def short(n_nodes):
        return {name: (plan[0], 2, *plan[2:]) for name, plan in plans(n_nodes).items()}

    monkeypatch.setattr(benchmark, "plans", short)

    def run(seeds):
        argv = ["traffic_week.py", "--data", ".", "--seeds", seeds, "--jobs", "1"]
        argv += ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            benchmark.main()
        return end.value.code, pd.read_csv(tmp_path / "results/traffic_week.csv")

    run("1")
    missed, rows = run("2")
    # Hardly trained, and with two seeds, it cannot be better by the test.
    assert "missed: SDKD is better in one (p < 0.05)" in missed
    alone = ["linear, graph-free", "GRU-GCN (tsl)", "teacher, one"]
    fixed = ["persistence", "historical average", "mean of the teachers"]
    students = ["student alone", "plain-MSE distillation", "SDKD"]
    order = [(name, "-") for name in [*alone, *fixed]]
    settings = ("all readings", "the last quarter of the readings")
    order += [(name, setting) for setting in settings for name in students]
    counts = rows.groupby(["model", "setting"], sort=False).size()
    assert counts.to_dict() == {k: 1 if k[0] in fixed else 2 for k in order}
    assert rows.rmse_60.nunique() == len(rows)
    assert set(rows.candidates.dropna()) == {1}
    cost = rows.groupby("model").parameters.first()
    assert cost["mean of the teachers"] == 2 * cost["teacher, one"]
    table = (tmp_path / "results/traffic_week.md").read_text()
    assert table in capsys.readouterr().out
    assert "| historical average |" in table
    assert "- all readings: SDKD against student alone: MAE " in table
    again = run("2")[1]
    assert again.seconds.dropna().tolist() == rows.seconds.dropna().tolist()  # none trained again
