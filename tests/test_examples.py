"""The examples, small but whole, and what they say to bad input."""

import argparse
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from sdkd_plugin.data import simulate_traffic
from sdkd_plugin.models import GraphMixer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def options(out: Path, **given: object) -> argparse.Namespace:
    defaults = {"preset": "quick", "seeds": 1, "device": "cpu", "data": None, "out": out}
    return argparse.Namespace(**{**defaults, "start": None, "missing": "none", **given})


def check_run(folder: Path, error: str, n_rows: int) -> pd.DataFrame:
    rows = pd.read_csv(folder / "results.csv")
    assert len(rows) == n_rows
    assert set(rows.setting) == {"all labels", "a quarter of the labels"}
    students = rows[rows.model.isin(["student alone", "plain-MSE distillation", "SDKD"])]
    assert students[error].gt(0).all()
    assert students.parameters.nunique() == 1
    table = (folder / "table.md").read_text()
    assert all(model in table for model in rows.model)
    assert "p = " not in table  # with one seed there is nothing to test
    assert yaml.safe_load((folder / "settings.yaml").read_text())["preset"] == "quick"
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*.png"))) == 4
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    return rows


def test_navier_stokes_from_data_to_pictures(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "cache"))
    example = load("ns_2d")
    small = dataclasses.replace(
        example.PRESETS["quick"],
        resolution=16,
        solver_resolution=16,
        training=8,
        validation=2,
        test=3,
        batch_size=2,
        teacher={"width": 4, "depth": 1, "heads": 1, "n_downsampling": 1},
        student={"width": 2, "depth": 1},
        teacher_steps=8,
        student_steps=8,
    )
    example.run_experiment(small, options(tmp_path / "run", seeds=2, device=device.type))
    rows = check_run(tmp_path / "run", "mse", n_rows=2 * (2 + 2 * 3))
    torch.testing.assert_close(
        torch.tensor((rows.band_0 + rows.band_1).to_numpy()), torch.tensor(rows.mse.to_numpy())
    )
    assert len(list((tmp_path / "run" / "weights").glob("*.safetensors"))) == 2 * 2 * 3
    printed = capsys.readouterr().out
    assert "computed by the pseudo-spectral solver" in printed
    assert str(tmp_path / "run") in printed


@pytest.mark.parametrize("source", ["simulated", "csv pair"])
def test_traffic_from_data_to_pictures(source, device, tmp_path, monkeypatch, capsys):
    example = load("metr_la")
    traffic = simulate_traffic(n_sensors=12, days=2, seed=1, progress=False)
    monkeypatch.setattr(example, "simulate_traffic", lambda seed: traffic)
    given = {"device": device.type}
    if source == "csv pair":
        ids = traffic.node_ids
        speed = pd.DataFrame(traffic.filled().numpy()[:400], columns=list(ids))
        speed.to_csv(tmp_path / "my_speed.csv", index=False)
        adjacency = np.zeros((12, 12))
        adjacency[tuple(traffic.edge_index.numpy())] = traffic.edge_weight.numpy()
        pd.DataFrame(adjacency).to_csv(tmp_path / "my_adj.csv", index=False, header=False)
        given |= {"data": str(tmp_path), "start": "2024-01-08"}
    small = dataclasses.replace(
        example.PRESETS["quick"],
        teacher_steps=4,
        student_steps=4,
        validations=2,
        teacher={"hidden_size": 8, "emb_size": 4, "n_layers": 1, "n_heads": 2},
        student={"hidden_size": 8, "emb_size": 4, "n_layers": 1},
    )
    example.run_experiment(small, options(tmp_path / "run", **given))
    rows = check_run(tmp_path / "run", "mae_60", n_rows=2 * 6)
    assert (rows.rmse_60 >= rows.mae_60).all()
    printed = capsys.readouterr().out
    assert ("simulated traffic" in printed) == (source == "simulated")
    assert "METR-LA" not in printed
    weights = load_file(tmp_path / "run/weights/sdkd_all_labels_seed_0.safetensors")
    network = GraphMixer(
        window=12, horizon=12, n_nodes=12, exog_size=2, hidden_size=8, emb_size=4, n_layers=1
    )
    network.load_state_dict({k.removeprefix("network."): v for k, v in weights.items()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ns_2d.py", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["ns_2d.py", "--data", "none.npy"], "--data none.npy is no file; expected trajectories"),
        (["ns_2d.py", "--data", "small.npy"], "small.npy has shape (2, 20, 8, 8), expected"),
        (["ns_2d.py", "--preset", "huge"], "invalid choice: 'huge'"),
        (["metr_la.py", "--data", "empty"], "empty holds no known traffic data. Looked for"),
        (["metr_la.py", "--data", "cut"], "los_speed.csv"),
        (["metr_la.py", "--out", "small.npy"], "--out small.npy is a file, expected a folder"),
        (["metr_la.py", "--out", "small.npy/run"], "--out small.npy/run is below"),
        (["metr_la.py", "--data", "short"], "a_speed.csv does not say when its readings"),
        (
            ["metr_la.py", "--data", "short", "--start", "2024-01-08"],
            "there are 40 time steps, expected at least",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((2, 20, 8, 8), dtype=np.float32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/los_speed.csv").write_text("1,2\n60,61\n")
    (tmp_path / "cut/los_adj.csv").write_text("1,0\n0,1\n")
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a_speed.csv").write_text("1,2\n" + "60,61\n" * 40)
    (tmp_path / "short/a_adj.csv").write_text("1,0.5\n0.5,1\n")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:]]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in ended.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    environment = {**os.environ, "SDKD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "ns_2d.py"), "--out", str(tmp_path / "run")],
        env=environment,
        stderr=subprocess.PIPE,
    )
    shown = b""
    while b"Navier-Stokes" not in shown:  # until the bar of the solver shows
        shown += process.stderr.read(1)
        assert process.poll() is None, shown
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted; no half-written file is left" in rest
    assert b"Traceback" not in rest
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_ctrl_c_in_training_is_not_swallowed(tmp_path):
    rng = np.random.default_rng(0)
    speed = pd.DataFrame(60 - rng.gamma(2, 3, size=(500, 6)), columns=list("abcdef"))
    speed.to_csv(tmp_path / "my_speed.csv", index=False)
    ring = pd.DataFrame(np.roll(np.eye(6), 1, axis=1))
    ring.to_csv(tmp_path / "my_adj.csv", index=False, header=False)
    command = [sys.executable, "-u", str(EXAMPLES / "metr_la.py"), "--data", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--start", "2024-01-08", "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shown = b""
    while b"Training the teacher." not in shown:
        shown += process.stdout.read(1)
        assert process.poll() is None, shown
    time.sleep(3)  # the teacher takes longer
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].endswith(b"interrupted; no half-written file is left.")
    assert not (tmp_path / "run").exists()
