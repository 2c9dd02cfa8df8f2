"""Traffic as tsl's data sets of windows, and our models as tsl's."""

import numpy as np
import pandas as pd
import pytest
import torch
from tsl_parts import NODES

from sdkd_plugin.adapters.tsl import load_traffic, spatiotemporal_dataset
from sdkd_plugin.data import TrafficData


@pytest.fixture(scope="module")
def traffic() -> TrafficData:
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(200)
    speed = 50 + 10 * torch.sin(steps / 20)[:, None] + torch.randn(200, NODES, generator=generator)
    mask = torch.rand(200, NODES, generator=generator) > 0.1
    ring = torch.arange(NODES)
    return TrafficData(
        speed=torch.where(mask, speed, torch.nan),
        mask=mask,
        edge_index=torch.stack([ring, ring.roll(-1)]),
        edge_weight=torch.linspace(0.2, 1, NODES),
        node_ids=tuple("abcde"),
        index=pd.date_range("2012-03-01", periods=200, freq="5min"),
        source="a test",
    )


def test_windows_hold_what_the_traffic_does(traffic):
    dataset = spatiotemporal_dataset(traffic, window=6, horizon=3)
    item = dataset[10]
    torch.testing.assert_close(item.input.x[..., 0], traffic.filled()[10:16])
    assert torch.equal(item.mask[..., 0], traffic.mask[16:19])
    observed = item.mask[..., 0]
    assert torch.equal(item.target.y[..., 0][observed], traffic.speed[16:19][observed])
    minutes = 5 * np.arange(10, 16)
    angle = torch.from_numpy(2 * np.pi * minutes / 1440).float()
    torch.testing.assert_close(item.input.u, torch.stack([angle.sin(), angle.cos()], 1))


def test_labels_can_be_hidden_without_hiding_readings(traffic):
    labelled = torch.ones(200, NODES, dtype=torch.bool)
    labelled[15:] = False
    item = spatiotemporal_dataset(traffic, window=6, horizon=3, labelled=labelled)[12]
    assert not bool(item.mask.any())
    torch.testing.assert_close(item.input.x[..., 0], traffic.filled()[12:18])
    with pytest.raises(ValueError, match=r"`labelled` has shape \(3, 5\), expected \(200, 5\)"):
        spatiotemporal_dataset(traffic, labelled=labelled[:3])


def test_traffic_is_found_in_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_traffic(tmp_path / "none")
    (tmp_path / "my_speed.csv").write_text("a,b\n" + "50.5,60\n" * 12)
    (tmp_path / "my_adj.csv").write_text("1,0.5\n0,1\n")
    with pytest.raises(ValueError, match=r"has no times of its readings, .* give"):
        load_traffic(tmp_path)
    data = load_traffic(tmp_path, start="2012-03-01", missing="none", freq="15min")
    assert (data.index[1] - data.index[0]) == pd.Timedelta(minutes=15)
    assert data.speed.shape == (12, 2)
    assert data.edge_index.tolist() == [[0], [1]]
