"""A training step stays light: our calls in it are counted."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks/step_calls.py"


def test_a_step_makes_few_calls_of_ours_behind_both_hosts():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
