"""APEBench's flows: simulated once, read without it, and a task of each by name."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from sdkd_plugin.data import apebench_trajectories
from sdkd_plugin.rollouts import Unrolled
from sdkd_plugin.study import Arm, apebench_task, study

simulations: list[str] = []


@dataclass
class Decay:
    """Halves in each step, in as many dimensions as wanted."""

    num_spatial_dims: int = 1
    num_points: int = 8
    size: float = 1.0

    def data(self, part: str, samples: int, steps: int) -> np.ndarray:
        simulations.append(part)
        shape = (samples, 1, 1, *(self.num_points,) * self.num_spatial_dims)
        first = self.size * np.random.default_rng(samples).normal(size=shape)
        return first * 0.5 ** np.arange(steps + 1).reshape(-1, 1, *[1] * self.num_spatial_dims)

    def get_train_data(self) -> np.ndarray:
        return self.data("train", 6, 4)

    def get_test_data(self) -> np.ndarray:
        return self.data("test", 3, 7)


@pytest.fixture
def apebench(monkeypatch: pytest.MonkeyPatch) -> None:
    scenarios = ModuleType("apebench.scenarios")
    vars(scenarios)["scenario_dict"] = {"phy_decay": Decay}
    monkeypatch.setitem(sys.modules, "apebench", ModuleType("apebench"))
    monkeypatch.setitem(sys.modules, "apebench.scenarios", scenarios)
    simulations.clear()


def test_a_flow_is_simulated_once(apebench: None, tmp_path: Path, monkeypatch):
    train, test = apebench_trajectories("2d_phy_decay", folder=tmp_path, size=2.0)
    assert (train.shape, test.shape) == ((6, 5, 1, 8, 8), (3, 8, 1, 8, 8))
    expected = torch.from_numpy(Decay(2, size=2.0).get_test_data()).float()
    assert torch.equal(test, expected)
    monkeypatch.setitem(sys.modules, "apebench.scenarios", None)
    again = apebench_trajectories("2d_phy_decay", folder=tmp_path, size=2.0)
    assert all(torch.equal(a, b) for a, b in zip(again, (train, test), strict=True))
    assert simulations == ["train", "test", "test"]
    with pytest.raises(ImportError, match=r"pip install 'sdkd_plugin\[apebench\]'"):
        apebench_trajectories("2d_phy_decay", folder=tmp_path, size=3.0)


@pytest.mark.parametrize(
    ("scenario", "options", "message"),
    [
        ("phy_decay", {}, "`scenario` is 'phy_decay', expected dimensions and a name"),
        ("1d_phy_rise", {}, r"`scenario` is 'phy_rise', .* APEBench's: \['phy_decay'\]"),
        ("1d_phy_decay", {"points": 3}, "`options`: .*points"),
        ("1d_phy_decay", {"size": 1e39}, "train data of 1d_phy_decay"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_refusals(apebench: None, tmp_path: Path, scenario: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        apebench_trajectories(scenario, folder=tmp_path, **options)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_task_of_a_flow(apebench: None, tmp_path: Path, dimensions: int):
    make = partial(apebench_task, f"{dimensions}d_phy_decay", folder=tmp_path)
    task = make(validation=2, frames=(1, 3))
    # Four trajectories of five frames; windows of four frames overlap in training alone.
    assert [len(part) for part in (task.train, task.validation, task.test)] == [8, 2, 6]
    test = torch.from_numpy(Decay(dimensions).get_test_data()).float()
    frames = test.reshape(6, 4, *test.shape[3:])
    torch.testing.assert_close(task.physical(task.test.y), frames[:, 1:])
    assert task.train.x.std() == pytest.approx(1.0)

    class Fading(nn.Module):
        """Of physical values a quarter instead of the half."""

        def __init__(self) -> None:
            super().__init__()
            self.share = nn.Parameter(torch.tensor(0.25))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            offset = task.offset[0] / task.scale[0]
            return self.share * (x + offset) - offset

    arm = Arm("alone", kd_weight=0)
    quick = {"steps": 1, "validations": 1, "seeds": 1, "lr": 1e-12}
    rows = study(task, student=lambda: Unrolled(Fading(), 3), arms=[arm], **quick).rows
    by_step = [1 - 0.5**n for n in (1, 2, 3)]
    assert rows.mean_nRMSE.iloc[-1] == pytest.approx(sum(by_step) / 3, rel=1e-4)
    with pytest.raises(ValueError, match=r"6 trajectories of 5 .* more than `validation`, 6"):
        make(validation=6)
    with pytest.raises(ValueError, match="at least 6 frames"):
        make(validation=1, frames=(1, 5))
