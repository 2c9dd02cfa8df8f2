"""The Navier-Stokes example, small but whole, and what it says to bad input."""

import argparse
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def options(out: Path, **given: object) -> argparse.Namespace:
    defaults = {"preset": "quick", "seeds": 1, "device": "cpu", "data": None, "out": out}
    return argparse.Namespace(**{**defaults, **given})


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ns_2d.py", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["ns_2d.py", "--data", "none.npy"], "--data none.npy is no file; expected trajectories"),
        (["ns_2d.py", "--data", "small.npy"], "small.npy has shape (2, 20, 8, 8), expected"),
        (["ns_2d.py", "--preset", "huge"], "invalid choice: 'huge'"),
        (["ns_2d.py", "--out", "small.npy"], "--out small.npy is a file, expected a folder"),
        (["ns_2d.py", "--out", "small.npy/run"], "--out small.npy/run is below"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((2, 20, 8, 8), dtype=np.float32))
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
