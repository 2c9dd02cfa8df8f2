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


def test_from_data_to_pictures(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("ns_2d", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "SIZES", (24, 3, 3, 0))
    monkeypatch.setattr(example, "LABELLED", 6)
    monkeypatch.setattr(example, "TEACHER_STEPS", 20)
    np.save(tmp_path / "u.npy", torch.randn(30, 20, 8, 8).numpy())
    arguments = ["--steps", "20", "--seeds", "2", "--jobs", "1", "--data", str(tmp_path / "u.npy")]
    monkeypatch.setattr(sys, "argv", ["ns_2d.py", *arguments, "--out", str(tmp_path / "run")])
    example.main()
    rows = pd.read_csv(tmp_path / "run" / "results.csv")
    students = ["student alone", "plain-MSE distillation", "SDKD"]
    assert list(dict.fromkeys(rows.model)) == ["persistence", "teacher", *students]
    assert rows.mse.nunique() == len(rows) == 2 + 3 * 2
    assert set(rows.steps.dropna()) == {20}
    printed, captured = capsys.readouterr()
    assert "After 2 steps: " in printed
    assert (tmp_path / "run" / "table.md").read_text() in printed
    assert "it/s" not in captured  # no progress bar where there is no terminal
    pictures = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert pictures == {"bands.png", "spectra.png", "fields.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--data", "none.npy"], "none.npy is no file; expected trajectories"),
        (["--data", "small.npy"], "small.npy has shape (2, 20, 8, 8), expected"),
        (["--out", "small.npy/run"], "--out small.npy/run is below"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((2, 20, 8, 8), dtype=np.float32))
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, str(SCRIPT), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    environment = {**os.environ, "SDKD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "run")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert b"Navier-Stokes" in process.stdout.readline()  # it is about to compute
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted; no half-written file is left" in rest
    assert b"Traceback" not in rest
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
