"""The tasks by name: their windows, parts, units and scores."""

import dataclasses
from functools import partial

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from torch import nn

from sdkd_plugin.data import simulate_traffic
from sdkd_plugin.models import GraphMixer
from sdkd_plugin.study import (
    Arm,
    Task,
    navier_stokes_task,
    rayleigh_benard_task,
    study,
    taxibj_task,
    traffic_task,
    weatherbench_task,
)

QUICK = {"steps": 4, "batch_size": 3, "validations": 2, "seeds": 1}


def trained(task: Task, make: partial) -> pd.Series:
    """The row of a model that is trained for a few steps."""
    result = study(task, student=make, arms=[Arm("alone", kd_weight=0)], lr=1e-3, **QUICK)
    assert {"persistence", "alone"} == set(result.rows.model)
    return result.rows.iloc[0]


def test_trajectories_and_convection(tmp_path, monkeypatch):
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "cache"))
    fields = torch.randn(9, 5, 8, 8)
    np.save(tmp_path / "u.npy", fields.numpy())
    task = navier_stokes_task(tmp_path / "u.npy", sizes=(4, 2, 2), frames=(3, 2))
    torch.testing.assert_close(task.physical(task.test.y), fields[6:8, 3:])
    assert task.train.x.mean() == pytest.approx(0, abs=1e-6)
    last = fields[6:8, 2:3].expand(-1, 2, -1, -1)
    row = trained(task, partial(nn.Conv2d, 3, 2, 1))
    assert row.mse == pytest.approx(float((last - fields[6:8, 3:]).square().mean()), rel=1e-4)
    with pytest.raises(ValueError, match=r"shape \(9, 5, 8, 8\), expected .* at least 200"):
        navier_stokes_task(tmp_path / "u.npy")
    small = {"resolution": (16, 8), "solver_resolution": (16, 12), "rayleigh": 1e4, "spin_up": 0.0}
    layer = rayleigh_benard_task(sizes=(2, 1, 1), frames=(2, 1), **small)
    assert layer.transform.boundary == "reflect"
    assert layer.train.x.shape == (2, 2, 16, 8)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    trained(layer, partial(nn.Conv2d, 2, 1, 1))


def test_taxi_flows(tmp_path):
    index = pd.date_range("2013-07-01", periods=60, freq="30min").delete([20])
    flows = np.random.default_rng(0).poisson(5, (59, 2, 8, 8))
    with h5py.File(tmp_path / "BJ13_M32x32_T30_InOut.h5", "w") as content:
        content["data"] = flows
        slots = index.hour * 2 + index.minute // 30 + 1
        content["date"] = [f"{d:%Y%m%d}{s:02d}".encode() for d, s in zip(index, slots, strict=True)]
    task = taxibj_task(tmp_path, validation="2013-07-01 15:00", test="2013-07-01 22:00")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [15, 11, 13]
    expected = torch.from_numpy(flows[-4:].reshape(8, 8, 8)).float()
    torch.testing.assert_close(task.physical(task.test.y[-1]), expected)
    last = np.tile(flows[-5], (4, 1, 1)).reshape(8, 8, 8)
    task = dataclasses.replace(task, test=task.test.select(slice(-1, None)))
    row = trained(task, partial(nn.Conv2d, 8, 8, 1))
    assert row.mae == pytest.approx(np.abs(last - flows[-4:].reshape(8, 8, 8)).mean(), rel=1e-4)


def test_weather(tmp_path):
    hours = pd.date_range("2016-12-30", periods=120, freq="6h")
    axes = {"time": hours, "lat": [-45.0, 45.0], "lon": [0.0, 90.0, 180.0, 270.0]}
    for name, size in {"t2m": 10.0, "u10": 0.1}.items():
        values = size * np.random.default_rng(0).normal(size=(120, 2, 4))
        field = xarray.DataArray(values, axes, name=name)
        field.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    task = weatherbench_task(
        tmp_path,
        {"t2m": None, "u10": None},
        validation="2017-01-10",
        test="2017-01-20",
        every=1,
        frames=(2, 1),
    )
    assert [len(part) for part in (task.train, task.validation, task.test)] == [42, 38, 34]
    row = trained(task, partial(nn.Conv2d, 4, 2, 1))
    assert row.rmse_t2m == pytest.approx(100 * row.rmse_u10, rel=1e-3)
    assert row.rmse_t2m == pytest.approx(10 * 2**0.5, rel=0.2)  # of two independent fields
    with pytest.raises(ValueError, match="`test` has 0 times, expected at least 3"):
        weatherbench_task(
            tmp_path, {"t2m": None}, validation="2017", test="2019", frames=(2, 1), every=1
        )


def test_traffic_windows_do_not_overlap_in_their_targets():
    data = simulate_traffic(n_sensors=8, days=2, seed=1, progress=False)
    mask = torch.ones_like(data.mask)
    mask[550:555, 3] = False
    data = dataclasses.replace(data, speed=data.filled(), mask=mask)
    task, steps, readings = traffic_task(data), len(data.index), data.filled()
    ends = [12, round(0.7 * steps), round(0.8 * steps), steps]
    for part, begin, end in zip(
        (task.train, task.validation, task.test), ends, ends[1:], strict=False
    ):
        assert len(part) == end - begin - 11
        for at, first in ((0, begin), (-1, end - 12)):
            torch.testing.assert_close(
                task.physical(part.y[at, ..., 0]), readings[first : first + 12]
            )
            torch.testing.assert_close(
                task.physical(part.x[at, ..., 0]), readings[first - 12 : first]
            )
    assert int((~task.test.mask).sum()) == 12 * 5  # five gaps, each in twelve windows
    assert task.at == {"15": 2, "30": 5, "60": 11}
    hours = dataclasses.replace(data, index=pd.date_range("2024", periods=steps, freq="1h"))
    assert traffic_task(hours).at == {"60": 0, "180": 2, "360": 5, "720": 11}
    make = partial(
        GraphMixer,
        input_size=1,
        exog_size=2,
        window=12,
        horizon=12,
        n_nodes=8,
        hidden_size=8,
        emb_size=4,
        n_layers=1,
    )
    row = trained(task, make)
    error = (task.test.x[:, -1:] - task.test.y) * task.test.mask * task.scale
    assert row.mae_30 == pytest.approx(float(error[:, 5].abs().sum() / task.test.mask[:, 5].sum()))
    result = study(task, student=make, arms=[Arm("alone", kd_weight=0)], **QUICK)
    # a graph has spectra, a map by its eigenvectors and series, and no plane
    assert set(result.figures()) == {"bands", "latency", "spectra", "sensors", "series", "training"}
