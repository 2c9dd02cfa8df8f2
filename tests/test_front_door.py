"""The front door: what `import sdkd_plugin` gives, and that it does nothing else.

Each check runs in a process of its own, where nothing has been imported before.
"""

import json
import subprocess
import sys
from typing import Any

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
    "TeacherAnswer",
    "__version__",
    "frequency_aligned_loss",
]

STRANGERS = [
    "neuralop",
    "tsl",
    "hydra",
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
