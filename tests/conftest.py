"""What all tests share: devices, threads, and a way to see our own messages."""

import pytest
import torch
from jaxtyping import config as jaxtyping_config

# Tests are small: threads would only wait for each other, and xdist's workers crowd each other out.
torch.set_num_threads(1)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type checks that only pytest adds, so that our own messages are seen."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
