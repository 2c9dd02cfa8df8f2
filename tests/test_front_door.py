"""The front door: what `import sdkd_plugin` gives, and that it does nothing else.

Imports are checked in a process of its own, where nothing has been imported before.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sdkd_plugin

PUBLIC = """
    AEKDAggregation AMSE AdaptiveWeighting AtResolution Bands CAMKDAggregation ConfidenceWeighting
    DerivativeMatching DistillationLoss DistillationTerms FixedWeighting FrequencyAlignedLoss
    GaussianNoise
    GraphTransform GridTransform LatentPair MeanAggregation Mixup OnPolicy RelativeWeighting
    SDKDDistiller SpectralLoss inverse_energy_weights
    ProductTransform Spectrum SphereTransform TapReader TeacherCache TeacherOutput __version__
    frequency_aligned_loss measure_teachers precompute
"""

IMPORT = """
import logging, random, sys, warnings
import numpy, torch
import scipy.fft, scipy.sparse.csgraph  # what scipy sets up for itself is not ours

def state():
    return {
        "filters": [str(f) for f in warnings.filters],
        "handlers": [str(h) for h in logging.getLogger().handlers],
        "level": (logging.getLogger().level, logging.root.manager.disable),
        "python": random.getstate(),
        "numpy": str(numpy.random.get_state(legacy=False)),
        "torch": torch.get_rng_state().tolist(),
        "options": (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()),
        "dtype": torch.get_default_dtype(),
        "printing": str(vars(torch._tensor_str.PRINT_OPTS)),
    }

random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
before = state()
import sdkd_plugin
after = state()
print("changed", [key for key in before if before[key] != after[key]])
hosts = "neuralop tsl hydra hydra_plugins omegaconf lightning pytorch_lightning torch_geometric"
slow = "pandas matplotlib scipy.optimize scipy.stats torch.onnx xarray h5py sympy.physics"
print("loaded", [name for name in (hosts + " " + slow).split() if name in sys.modules])
"""


def test_the_public_names_are_frozen():
    assert sorted(sdkd_plugin.__all__) == sorted(PUBLIC.split())
    assert all(hasattr(sdkd_plugin, name) for name in PUBLIC.split())


def test_import_changes_no_state_and_loads_no_host_or_other_slow_package():
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["changed []", "loaded []"]


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
    configs = {str(path.relative_to(root)) for path in (root / "sdkd_plugin/conf").rglob("*.yaml")}
    assert configs
    assert configs <= names
    assert "hydra_plugins/sdkd_searchpath/__init__.py" in names
    # A namespace that other plugins share has no __init__.py: it would hide theirs.
    assert "hydra_plugins/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]
