"""The problems of the ablation as plain tensors: windows, splits, units and scores.

Here live turbulence and traffic behind one shape. Models and sizes are in `_ablation_systems`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sdkd_plugin import Bands, GraphTransform, GridTransform
from sdkd_plugin.data import TrafficData, navier_stokes, read_los_loop
from sdkd_plugin.losses.task import TASK_LOSSES, observed_mean
from sdkd_plugin.report import GridScores, UserError
from sdkd_plugin.spectral import AbstractTransform

FRAMES = 10
WINDOW = HORIZON = 12
AT = {"15": 2, "30": 5, "60": 11}
"""Steps of five minutes, from 0, by the minutes they are ahead."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and targets in the models' units, the first axis of all the sample.

    Attributes:
        x: what is read, ``(samples, time, ...)``.
        y: what comes, likewise.
        mask: True where ``y`` was observed, or None for everywhere.
        inputs: further inputs by name.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | slice) -> "Samples":
        mask = None if self.mask is None else self.mask[index]
        inputs = {name: value[index] for name, value in self.inputs.items()}
        return Samples(self.x[index], self.y[index], mask, inputs)

    def to(self, device: torch.device) -> "Samples":
        """The same on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Samples(self.x.to(device), self.y.to(device), mask, inputs)


@dataclass(frozen=True, eq=False)
class Problem:
    """What is forecast, split and scaled.

    Attributes:
        source: where the data come from.
        training: all of its labels; which of them a student sees is the setting's affair.
        validation: chooses the weights.
        test: is scored.
        transform: the domain of the forecasts.
        bands: of its frequencies.
        task: the loss against labels, and the validation error.
        scale: physical units are ``scale * value + offset``.
        offset: see there.
        sizes: what every model is built with.
        everywhere: inputs that all samples share.
        labels_first: whether a share of the labels is the earliest one; else it is drawn.
        score: test errors by name, of a forecast and its truth, both in physical units.
    """

    source: str
    training: Samples
    validation: Samples
    test: Samples
    transform: AbstractTransform
    bands: Bands
    task: Literal["mse", "mae"]
    scale: float
    offset: float
    sizes: Mapping[str, int]
    everywhere: Mapping[str, Tensor]
    labels_first: bool
    score: Callable[[Tensor, Samples], dict[str, float]]

    def labelled(self, share: float, seed: int) -> Tensor:
        """Which training samples have labels."""
        n = len(self.training)
        order = torch.arange(n)
        if not self.labels_first:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).argsort()
        return (order < round(share * n)).to(self.training.x.device)

    def inputs(self, samples: Samples) -> dict[str, Tensor]:
        """Everything but ``x`` that a model is called with."""
        return {**self.everywhere, **samples.inputs}

    @torch.no_grad()
    def forecast(self, model: nn.Module, samples: Samples) -> Tensor:
        """A model's forecasts, in its own units."""
        model.eval()
        parts = [samples[start : start + 50] for start in range(0, len(samples), 50)]
        return torch.cat([model(part.x, **self.inputs(part)) for part in parts])

    def validation_error(self, model: nn.Module) -> float:
        """The task's error on the validation samples, in the models' units."""
        forecast = self.forecast(model, self.validation)
        loss = TASK_LOSSES[self.task]
        return float(observed_mean(loss, forecast, self.validation.y, self.validation.mask))

    def scores(self, forecast: Tensor) -> dict[str, float]:
        """Errors of a forecast of the test samples, in physical units."""
        physical = Samples(self.test.x, self.physical(self.test.y), self.test.mask)
        return self.score(self.physical(forecast), physical)

    def physical(self, values: Tensor) -> Tensor:
        """From the models' units."""
        return self.scale * values + self.offset


@dataclass(frozen=True)
class NavierStokes:
    """Turbulence: ten frames of vorticity in, the next ten out. Trajectories split in order."""

    viscosity: float
    resolution: int
    solver_resolution: int
    training: int
    validation: int
    test: int

    @property
    def sentence(self) -> str:
        """For the table's head."""
        return (
            f"{FRAMES} frames in, the next {FRAMES} out, {self.resolution} x {self.resolution}; "
            f"{self.training} trajectories for training, {self.validation} for validation, "
            f"{self.test} for the test; labels drawn at random."
        )

    def problem(self, folder: Path | None, cutoff: float, device: torch.device) -> Problem:
        """Compute the trajectories, or take them from the solver's cache."""
        sizes = [self.training, self.validation, self.test]
        trajectories = navier_stokes(
            sum(sizes),
            resolution=self.resolution,
            solver_resolution=self.solver_resolution,
            viscosity=self.viscosity,
            duration=2.0 * FRAMES,
            downsampling="truncate",
            batch_size=20,
            device=device,
            progress=False,
        )
        # One mean and one deviation for all frames, from the training inputs alone.
        seen = trajectories[: self.training, :FRAMES]
        offset, scale = float(seen.mean()), float(seen.std())
        parts = ((trajectories - offset) / scale).to(device).split(sizes)
        training, validation, test = (Samples(p[:, :FRAMES], p[:, FRAMES:]) for p in parts)
        transform = GridTransform((self.resolution, self.resolution)).to(device)
        bands = Bands.split(cutoff)

        def score(forecast: Tensor, truth: Samples) -> dict[str, float]:
            scores = GridScores(transform, bands)
            scores.update(forecast, truth.y)
            return scores.compute()

        return Problem(
            source=f"computed by the pseudo-spectral solver on {self.solver_resolution} x "
            f"{self.solver_resolution} points, viscosity {self.viscosity:g}, seed 0",
            training=training,
            validation=validation,
            test=test,
            transform=transform,
            bands=bands,
            task="mse",
            scale=scale,
            offset=offset,
            sizes={"in_channels": FRAMES, "out_channels": FRAMES},
            everywhere={},
            labels_first=False,
            score=score,
        )


@dataclass(frozen=True)
class Traffic:
    """Speeds: an hour of readings in, the next hour out. Split in time: 70, 10 and 20 %."""

    @property
    def sentence(self) -> str:
        """For the table's head."""
        return (
            f"{WINDOW} steps in, the next {HORIZON} out, in miles an hour; the first 70 % of the "
            "week for training, 10 % for validation, the last 20 % for the test; labels of the "
            "first windows."
        )

    def problem(self, folder: Path | None, cutoff: float, device: torch.device) -> Problem:
        """Read the folder and cut the windows."""
        if folder is None:
            raise UserError("the system 'traffic' needs --data, a folder with the Los-loop files.")
        data = read_traffic(folder)
        steps, n_nodes = data.speed.shape
        ends = [round(0.7 * steps), round(0.8 * steps), steps]
        readings = data.filled()
        seen = readings[: ends[0]]
        offset, scale = float(seen.mean()), float(seen.std())
        readings = ((readings - offset) / scale)[..., None]
        day = (data.index - data.index.normalize()).total_seconds().to_numpy() / 86_400
        angle = 2 * torch.pi * torch.from_numpy(day)
        clock = torch.stack([angle.sin(), angle.cos()], 1).float()

        def windows(begin: int, end: int) -> Samples:
            # All targets lie in the period; what is read may lie before it.
            first = torch.arange(max(begin, WINDOW), end - HORIZON + 1)[:, None]
            past, future = first + torch.arange(-WINDOW, 0), first + torch.arange(HORIZON)
            mask = None if bool(data.mask.all()) else data.mask[future][..., None]
            return Samples(readings[past], readings[future], mask, {"u": clock[past]}).to(device)

        transform = GraphTransform.from_edges(data.edge_index, data.edge_weight, n_nodes)
        transform, bands = transform.to(device), Bands.split(cutoff)

        def score(forecast: Tensor, truth: Samples) -> dict[str, float]:
            mask = torch.ones_like(truth.y, dtype=torch.bool) if truth.mask is None else truth.mask
            error = torch.where(mask, forecast - truth.y, 0)
            ahead = {"average": slice(None)} | {m: slice(i, i + 1) for m, i in AT.items()}
            scores = {
                f"mae_{name}": float(error[:, at].abs().sum() / mask[:, at].sum())
                for name, at in ahead.items()
            }
            energy = transform.sample_band_energy(error, bands).sum(0) / mask.sum()
            return scores | {f"band_{i}": float(value) for i, value in enumerate(energy)}

        return Problem(
            source=data.source,
            training=windows(0, ends[0]),
            validation=windows(ends[0], ends[1]),
            test=windows(ends[1], ends[2]),
            transform=transform,
            bands=bands,
            task="mae",
            scale=scale,
            offset=offset,
            sizes={
                "input_size": 1,
                "exog_size": 2,
                "window": WINDOW,
                "horizon": HORIZON,
                "n_nodes": n_nodes,
            },
            everywhere={
                "edge_index": data.edge_index.to(device),
                "edge_weight": data.edge_weight.to(device),
            },
            labels_first=True,
            score=score,
        )


def read_traffic(folder: Path) -> TrafficData:
    """The Los-loop week of a folder.

    Raises:
        UserError: if it is not there, or cannot be read.
    """
    try:
        return read_los_loop(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"--data {error}") from error


def persistence(samples: Samples) -> Tensor:
    """The last reading, at every step of the forecast."""
    return samples.x[:, -1:].expand_as(samples.y)
