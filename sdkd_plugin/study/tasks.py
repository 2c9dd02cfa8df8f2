"""Tasks by name: flows, traffic, taxis and weather, ready for a `study`.

On grids frames are channels, normalised by the training inputs. The two bands are divided at a
quarter of the highest frequency; `dataclasses.replace(task, bands=...)` sets others.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin import data as files
from sdkd_plugin.data import TrafficData
from sdkd_plugin.data.store import load_or_compute
from sdkd_plugin.report import rollout_curves
from sdkd_plugin.spectral import Bands, GraphTransform, GridTransform
from sdkd_plugin.spectral.grid import Boundary
from sdkd_plugin.study.task import PARTS, Samples, Task

Fields = Float[Tensor, "_ time channels *grid"]  # parts have different numbers of samples
Source = str | os.PathLike[str]
Frames = tuple[int, int]
BANDS = Bands.split(0.25)


def navier_stokes_task(
    trajectories: Source | None = None,
    *,
    sizes: Sequence[int] = (120, 30, 50),
    frames: Frames = (10, 10),
    **solver: Any,
) -> Task:
    """Two-dimensional turbulence: frames of vorticity.

    Args:
        trajectories: a file, as for `read_trajectories`; None computes them.
        sizes: trajectories for training, validation and test.
        frames: how many are read and forecast, a unit of time apart.
        **solver: of `navier_stokes`, such as ``viscosity``.

    Raises:
        ValueError: if a file has too few trajectories or frames.
    """
    if trajectories is None:
        source, options = _computed(solver), {"downsampling": "truncate", **solver}
        fields = files.navier_stokes(sum(sizes), duration=float(sum(frames)), **options)
    else:
        fields = files.read_trajectories(trajectories)
        source = f"read from {os.path.basename(trajectories)}"
    if len(fields) < sum(sizes) or fields.shape[1] < sum(frames):
        raise ValueError(
            f"{trajectories} has shape {tuple(fields.shape)}, expected (samples, time, nx, ny) "
            f"with at least {sum(sizes)} samples of {sum(frames)} frames."
        )
    parts = fields[: sum(sizes), :, None].split(list(sizes))
    return _grid_task(parts, frames, "periodic", name="Navier-Stokes", source=source)


def rayleigh_benard_task(
    *, sizes: Sequence[int] = (120, 30, 50), frames: Frames = (10, 10), **solver: Any
) -> Task:
    """Convection between two plates: frames of temperature. Both axes have the cosine basis.

    Args:
        sizes: trajectories for training, validation and test.
        frames: how many are read and forecast, a free-fall time apart.
        **solver: of `rayleigh_benard`, such as ``rayleigh``; ``resolution`` is needed.
    """
    n, device = sum(sizes), solver.pop("device", "cpu")
    settings = {"duration": float(sum(frames)), **solver}
    fields = load_or_compute(
        "rayleigh-benard",
        lambda: files.rayleigh_benard(n, device=device, **settings),
        parameters={"n_samples": n, **settings},
    )
    parts, source = fields.split(list(sizes)), _computed(solver)
    return _grid_task(parts, frames, "reflect", name="Rayleigh-Benard", source=source)


def apebench_task(
    scenario: str, *, validation: int = 10, frames: Frames = (1, 1), **options: Any
) -> Task:
    """A flow of APEBench, step by step; scores have its ``mean_nRMSE`` too.

    Training has all windows of its trajectories, validation and test have windows that do not
    overlap.

    Args:
        scenario: such as ``1d_phy_burgers`` or ``2d_phy_kolm_flow``; see `apebench_trajectories`.
        validation: the last so many of the trajectories for training.
        frames: how many are read and forecast; ``Unrolled(model, n)`` forecasts n of them.
        **options: of the scenario, such as ``num_points``, and ``folder``, where files are kept.

    Raises:
        ValueError: if there is no such scenario or option, a trajectory has diverged, or a part has
            no window.
        ImportError: if files are missing and APEBench is not installed.
    """
    known, test = files.apebench_trajectories(scenario, **options)
    length = sum(frames)
    if not 0 < validation < len(known) or min(known.shape[1], test.shape[1]) < length:
        raise ValueError(
            f"{scenario} has {len(known)} trajectories of {known.shape[1]} and {len(test)} of "
            f"{test.shape[1]} frames, expected more than `validation`, {validation}, which is at "
            f"least 1, with at least {length} frames."
        )
    chosen = (known[:-validation], 1), (known[-validation:], length), (test, length)
    # `unfold` puts the frames of a window last.
    windows = [part.unfold(1, length, step).movedim(-1, 2).flatten(0, 1) for part, step in chosen]
    scores = partial(_mean_nrmse, GridTransform(test.shape[3:]), test.shape[2])
    source = f"simulated by APEBench, {scenario}"
    return _grid_task(
        windows, frames, "periodic", name=scenario, source=source, extra_scores=scores
    )


def taxibj_task(
    paths: Source | Sequence[Source], *, validation: str, test: str, frames: Frames = (4, 4)
) -> Task:
    """Taxi flows over Beijing, half an hour a frame; windows do not cross gaps.

    Args:
        paths: as for `read_taxibj`.
        validation: first time of the validation's targets, such as ``2016-02-12``.
        test: first time of the test's targets.
        frames: how many are read and forecast.

    Raises:
        ValueError: as `read_taxibj`, or if a part has no window.
    """
    flows = files.read_taxibj(paths)
    bounds = pairwise([None, validation, test, None])
    parts = [flows.flow[flows.windows(*frames, start=a, stop=b)] for a, b in bounds]
    source = f"TaxiBJ, {flows.index[0]} to {flows.index[-1]}, taxis in half an hour"
    return _grid_task(parts, frames, "reflect", name="TaxiBJ", source=source)


def weatherbench_task(
    paths: Source | Sequence[Source],
    variables: Mapping[str, Sequence[int] | None],
    *,
    validation: str,
    test: str,
    every: int = 6,
    frames: Frames = (2, 4),
) -> Task:
    """Global weather. Both axes have the cosine basis.

    Scores are those of normalised fields, and the latitude-weighted RMSE of each channel in its own
    unit, such as ``rmse_z_500``.

    Args:
        paths: as for `read_weatherbench`.
        variables: likewise.
        validation: first time of the validation, such as ``2016``.
        test: first time of the test.
        every: take every so many times of the files.
        frames: how many are read and forecast.

    Raises:
        ValueError: as `read_weatherbench`, or if a part has no window.
    """
    data, length = files.read_weatherbench(paths, variables, every=every), sum(frames)
    inner = data.index.searchsorted([pd.Timestamp(validation), pd.Timestamp(test)]).tolist()
    parts = []
    for name, (begin, end) in zip(PARTS, pairwise([0, *inner, len(data.index)]), strict=True):
        if end - begin < length:
            raise ValueError(f"`{name}` has {end - begin} times, expected at least {length}.")
        parts.append(data.fields[begin:end].unfold(0, length, 1).movedim(-1, 1))
    source = f"WeatherBench, {', '.join(data.channels)}"
    deviation = parts[0][:, : frames[0]].std((0, 1, 3, 4))[:, None, None]
    scores = partial(_channel_rmse, data.channels, deviation, data.latitude)
    options = {"scale": 1.0, "offset": 0.0, "extra_scores": scores, "source": source}
    return _grid_task(parts, frames, "reflect", name="WeatherBench", **options)


def traffic_task(data: Source | TrafficData, *, frames: Frames = (12, 12)) -> Task:
    """Speeds of road sensors; the first 70 % of the time for training, the last 20 % for the test.

    A share of the labels is that of the first windows. Models are called with ``x``, ``u`` (the
    time of the day), ``edge_index`` and ``edge_weight``.

    Args:
        data: speeds and graph, or a folder with the Los-loop files.
        frames: how many are read and forecast.

    Raises:
        ValueError: if the folder has no such files, or they are damaged.
    """
    data = data if isinstance(data, TrafficData) else files.read_los_loop(os.fspath(data))
    (window, horizon), (steps, n_nodes), readings = frames, data.speed.shape, data.filled()
    ends = [0, round(0.7 * steps), round(0.8 * steps), steps]
    offset, scale = float(readings[: ends[1]].mean()), float(readings[: ends[1]].std())
    readings = ((readings - offset) / scale)[..., None]
    since_midnight = (data.index - data.index.normalize()).total_seconds().to_numpy()
    angle = 2 * torch.pi * torch.from_numpy(since_midnight) / 86_400
    clock = torch.stack([angle.sin(), angle.cos()], 1).float()
    parts: dict[str, Any] = {}
    for name, (begin, end) in zip(PARTS, pairwise(ends), strict=True):
        # All targets lie in the part; inputs may lie before it.
        first = torch.arange(max(begin, window), end - horizon + 1)[:, None]
        past, future = first + torch.arange(-window, 0), first + torch.arange(horizon)
        mask = None if bool(data.mask.all()) else data.mask[future][..., None]
        parts[name] = Samples(readings[past], readings[future], mask, {"u": clock[past]})
    step = data.index[1] - data.index[0]
    minutes = (15, 30, 60) if step < pd.Timedelta(hours=1) else (60, 180, 360, 720)
    at = {str(ahead): round(pd.Timedelta(minutes=ahead) / step) - 1 for ahead in minutes}
    return Task(
        **parts,
        transform=GraphTransform.from_edges(data.edge_index, data.edge_weight, n_nodes),
        bands=BANDS,
        shared={"edge_index": data.edge_index, "edge_weight": data.edge_weight},
        task_loss="mae",
        scale=scale,
        offset=offset,
        at={name: step for name, step in at.items() if 0 <= step < horizon},
        measure="mae",
        baselines={"persistence": partial(_repeat_last, 1)},
        labels_first=True,
        name="traffic",
        source=f"{data.source}, miles an hour",
        positions=data.positions,
    )


def _grid_task(parts: Sequence[Fields], frames: Frames, boundary: Boundary, **options: Any) -> Task:
    """A task of fields, each channel normalised by the training inputs."""
    seen = parts[0][:, : frames[0]]
    axes = (0, 1, *range(3, seen.ndim))
    mean, deviation = (f(axes, keepdim=True) for f in (seen.mean, seen.std))
    deviation = torch.where(deviation > 0, deviation, 1)
    split: dict[str, Any] = {}
    for name, part in zip(PARTS, parts, strict=True):
        normal = ((part - mean) / deviation)[:, : sum(frames)]
        split[name] = Samples(*(x.flatten(1, 2) for x in normal.split(list(frames), 1)))
    units: dict[str, Any] = {}
    for side, n in zip(("input", "output"), frames, strict=True):
        units[side] = tuple(torch.cat([x[0, 0]] * n) for x in (deviation, mean))
    scale, offset = units["output"]
    return Task(
        transform=GridTransform(seen.shape[3:], boundary),
        bands=BANDS,
        baselines={"persistence": partial(_repeat_last, seen.shape[2])},
        channels=seen.shape[2],
        **{"scale": scale, "offset": offset, "units": units, **split, **options},
    )


def _repeat_last(channels: int, samples: Samples) -> Tensor:
    """Persistence: the last frame at every step of the forecast."""
    last = samples.x[:, -channels:]
    return last.repeat(1, samples.y.shape[1] // channels, *[1] * (last.ndim - 2))


def _mean_nrmse(
    transform: GridTransform, channels: int, forecast: Tensor, truth: Samples
) -> dict[str, float]:
    """APEBench's own score, over samples and steps."""
    mine, theirs = (x.unflatten(1, (-1, channels)) for x in (forecast, truth.y))
    return {"mean_nRMSE": float(rollout_curves(mine, theirs, transform, BANDS)["nRMSE"].mean())}


def _channel_rmse(
    names: Sequence[str], scale: Tensor, latitude: Tensor, forecast: Tensor, truth: Samples
) -> dict[str, float]:
    """Of normalised fields, in the channels' units; the mean cancels in the difference."""
    mine, theirs = (x.unflatten(1, (-1, len(scale))) * scale for x in (forecast, truth.y))
    errors = files.latitude_weighted_rmse(mine, theirs, latitude).tolist()
    return {f"rmse_{name}": error for name, error in zip(names, errors, strict=True)}


def _computed(solver: Mapping[str, Any]) -> str:
    apart = ("device", "batch_size", "progress")
    named = [f"{k.replace('_', ' ')} {value}" for k, value in solver.items() if k not in apart]
    return f"computed by the spectral solver, {', '.join(named)}"
