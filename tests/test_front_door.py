"""The front door: what `import sdkd_plugin` gives, and that it does nothing else.

Each check runs in a process of its own, where nothing has been imported before.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import sdkd_plugin

PUBLIC = [
    "AEKDAggregation",
    "AdaptiveWeighting",
    "AtResolution",
    "Bands",
    "CAMKDAggregation",
    "ConfidenceWeighting",
    "DistillationTerms",
    "FixedWeighting",
    "FrequencyAlignedLoss",
    "GraphTransform",
    "GridTransform",
    "LatentPair",
    "MeanAggregation",
    "RelativeWeighting",
    "SDKDDistiller",
    "Spectrum",
    "TapReader",
    "GaussianNoise",
    "Mixup",
    "TeacherOutput",
    "__version__",
    "frequency_aligned_loss",
]

STRANGERS = [
    "neuralop",
    "tsl",
    "hydra",
    "hydra_plugins",
    "omegaconf",
    "lightning",
    "pytorch_lightning",
    "torch_geometric",
    "pandas",
    "matplotlib",
]

LOADED = f"""
import json, sys
import sdkd_plugin
print(json.dumps([name for name in {STRANGERS} if name in sys.modules]))
"""

STATE = """
import json, logging, random, warnings
import numpy, torch

def state():
    return {
        "filters": [str(f) for f in warnings.filters],
        "handlers": [str(h) for h in logging.getLogger().handlers],
        "level": logging.getLogger().level,
        "logging": logging.root.manager.disable,
        "python": str(random.getstate()),
        "numpy": str(numpy.random.get_state(legacy=False)),
        "torch": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "printing": str(vars(torch._tensor_str.PRINT_OPTS)),
    }

random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
# scipy.fft is ours to use; what it sets up for itself is not ours.
import scipy.fft, scipy.sparse.csgraph
before = state()
import sdkd_plugin
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""

SECONDS = """
import json, time
import torch
start = time.perf_counter()
import sdkd_plugin
print(json.dumps(time.perf_counter() - start))
"""


def answer(code: str) -> Any:
    """What a fresh interpreter prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_public_names_are_frozen():
    assert sorted(sdkd_plugin.__all__) == sorted(PUBLIC)
    assert all(hasattr(sdkd_plugin, name) for name in PUBLIC)


def test_import_loads_no_host():
    assert answer(LOADED) == []


def test_import_leaves_warnings_loggers_and_random_states_alone():
    assert answer(STATE) == []


def test_import_is_fast():
    # A second and a third try are for a machine that is busy with other tests.
    assert any(answer(SECONDS) < 2.5 for _ in range(3))


@pytest.mark.slow
def test_a_wheel_holds_the_configs_and_the_hydra_plugin(tmp_path):
    root = Path(__file__).parents[1]
    for name in ("sdkd_plugin", "hydra_plugins"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, tmp_path / "tree" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--wheel-dir", str(tmp_path), str(tmp_path / "tree")]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = root / "sdkd_plugin/conf"
    configs = {str(path.relative_to(root)) for path in folder.rglob("*.yaml")}
    assert configs
    assert configs <= names
    assert "hydra_plugins/sdkd_searchpath/__init__.py" in names
    # A namespace that other plugins share has no __init__.py: it would hide theirs.
    assert "hydra_plugins/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]
