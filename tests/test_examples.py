"""The Navier-Stokes example, small but whole, and its answers to bad input."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "ns_2d.py"


@pytest.fixture
def example(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("ns_2d", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"SIZES": (24, 3, 3), "LABELLED": 6, "TEACHER_STEPS": 20}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(tmp_path)
    np.save("u.npy", torch.randn(30, 20, 8, 8).numpy())
    return module


def test_from_data_to_pictures(example, monkeypatch, capsys):
    arguments = ["--steps", "20", "--seeds", "2", "--jobs", "1", "--data", "u.npy", "--out", "run"]
    monkeypatch.setattr(sys, "argv", ["ns_2d.py", *arguments])
    example.main()
    rows = pd.read_csv("run/results.csv")
    students = ["student alone", "plain-MSE distillation", "SDKD"]
    assert list(dict.fromkeys(rows.model)) == ["persistence", "teacher", *students]
    assert rows.mse.nunique() == len(rows) == 2 + 3 * 2
    printed, bars = capsys.readouterr()
    assert "After 2 steps: " in printed
    assert Path("run/table.md").read_text() in printed
    assert bars == ""  # where there is no terminal
    assert {path.name for path in Path("run").glob("*.png")} == {
        "bands.png",
        "fields.png",
        "latency.png",
        "spectra.png",
        "steps.png",
        "training.png",
    }
    assert "SDKD" in Path("run/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--data", "none.npy"], "none.npy is no file; expected trajectories"),
        (["--data", "u.npy"], "u.npy has shape (30, 20, 8, 8), expected"),
        (["--out", "u.npy/run"], "--out u.npy/run cannot be a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ns_2d.py", *arguments])
    monkeypatch.setattr(example, "SIZES", (480, 40, 60))
    with pytest.raises(SystemExit) as end:
        example.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert os.listdir() == ["u.npy"]


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    environment = {**os.environ, "SDKD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, **pipes)
    assert b"Navier-Stokes" in process.stdout.readline()  # it is about to compute
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted; no half-written file is left" in rest
    assert b"Traceback" not in rest
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
