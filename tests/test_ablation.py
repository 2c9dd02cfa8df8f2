"""The ablation, small but whole: its rows, its tables, and bad options."""

import importlib
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from sdkd_plugin.data import simulate_traffic
from sdkd_plugin.models import GraphAlterNet, GraphMixer, SimVP, STAlterNet, UNet

QUICK = {"steps": 10, "lr": 1e-2, "batch_size": 2}
TEACHING = {**QUICK, "steps": 100}  # until a teacher is the better one in each band
GRID = {"in_channels": 10, "out_channels": 10, "padding": "reflect", "depth": 1}
GRAPH = {"input_size": 1, "exog_size": 2, "window": 12, "horizon": 12, "emb_size": 4, "n_layers": 1}
SMALL = {
    "rayleigh_benard": (
        partial(STAlterNet, width=4, heads=1, n_downsampling=1, **GRID),
        partial(SimVP, width=2, latent_width=8, n_downsampling=1, **GRID),
        partial(UNet, width=2, **GRID),
    ),
    "traffic": (
        partial(GraphAlterNet, hidden_size=8, **GRAPH),
        partial(GraphMixer, hidden_size=8, **GRAPH),
        partial(GraphMixer, hidden_size=4, **GRAPH),
    ),
}


@pytest.fixture
def ablation(monkeypatch, tmp_path):
    """The benchmark's module, with systems that train in seconds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module("ablation")
    layer = {"resolution": (16, 16), "solver_resolution": (16, 16), "rayleigh": 1e4}
    tasks = {
        "rayleigh_benard": partial(
            module.rayleigh_benard_task, sizes=(8, 2, 3), spin_up=0.0, **layer
        ),
        "traffic": lambda folder: module.traffic_task(
            simulate_traffic(n_sensors=8, days=1, seed=1, progress=False)
        ),
    }
    module.systems(full=True)  # the sizes can be built
    small = {
        name: module.System(
            tasks[name], {"one": one, "two": two}, student, TEACHING, QUICK, kd_weight
        )
        for (name, (one, two, student)), kd_weight in zip(SMALL.items(), (10.0, 1.0), strict=True)
    }
    monkeypatch.setattr(module, "systems", lambda full: small)
    return module


def run(ablation, monkeypatch, folder, *arguments):
    argv = ["ablation.py", "--jobs", "1", "--seeds", "1", "--out", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, "--results", str(folder / "results"), *arguments])
    ablation.main()
    rows = pd.read_csv(folder / "results" / "ablation_quick.csv")
    return rows, (folder / "results" / "ablation_quick.md").read_text()


@pytest.mark.parametrize("name", list(SMALL))
def test_every_row_trains_and_is_another_lesson(name, ablation, monkeypatch, tmp_path):
    rows, text = run(ablation, monkeypatch, tmp_path, "--systems", name, "--data", "folder")
    students = rows[rows.setting != "-"]
    planned = {
        (title, f"{100 * s:.3g}%") for title, shares, _ in ablation.ROWS.values() for s in shares
    }
    settings = students.setting.str.replace(" of the labels", "").replace("all labels", "100%")
    assert set(zip(students.model, settings, strict=True)) == planned
    # A student that is worse than its teacher on all samples does not feel the bound.
    distinct = students[~students.model.str.startswith("teacher-bounded")]
    assert distinct.mse.nunique() == len(distinct)
    assert distinct.mse.notna().all()
    assert rows.model[rows.setting == "-"].tolist() == [
        "persistence",
        "one",
        "two",
        "mean of the teachers",
    ]
    assert f"## {name}\n" in text
    assert "against its base" in text
    assert "(p =" not in text  # with one seed there is nothing to test
    assert str(tmp_path) not in text


def test_a_second_run_goes_on(ablation, monkeypatch, tmp_path):
    options = ["--systems", "rayleigh_benard", "--rows", "alone", "plain", "relative"]
    first, _ = run(ablation, monkeypatch, tmp_path, *options)
    more, text = run(ablation, monkeypatch, tmp_path, *options, "--seeds", "3")
    same = ["model", "setting", "mse", "date"]
    old, new = (rows[(rows.setting != "-") & (rows.seed == 0)][same] for rows in (first, more))
    pd.testing.assert_frame_equal(new.reset_index(drop=True), old.reset_index(drop=True))
    assert (more.groupby(["setting", "model"]).size()["all labels"] == 3).all()
    row = next(x for x in text.splitlines() if x.startswith("| 25% of the labels | weighting: rel"))
    assert row.count("(p = ") == 2  # against the student alone and plain-MSE distillation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds and --jobs are expected to be at least 1"),
        (["--systems", "traffic"], "--systems traffic needs --data"),
        (["--rows", "magic"], "invalid choice: 'magic'"),
        (["--systems", "weather"], "invalid choice: 'weather'"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, ablation, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(ablation, monkeypatch, tmp_path, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
