"""Calls of what is public, with arguments that work, and hostile values to put in their place."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sdkd_plugin import (
    AMSE,
    AdaptiveWeighting,
    AEKDAggregation,
    AtResolution,
    Bands,
    ConfidenceWeighting,
    DerivativeMatching,
    DistillationLoss,
    FixedWeighting,
    FrequencyAlignedLoss,
    GaussianNoise,
    GraphTransform,
    GridTransform,
    LatentPair,
    Mixup,
    OnPolicy,
    ProductTransform,
    RelativeWeighting,
    SDKDDistiller,
    SpectralLoss,
    Spectrum,
    TapReader,
    TeacherCache,
    frequency_aligned_loss,
    inverse_energy_weights,
    models,
    precompute,
)
from sdkd_plugin.data import (
    TaxiFlows,
    TrafficData,
    find_traffic,
    latitude_weighted_rmse,
    navier_stokes,
    read_csv_pair,
    read_los_loop,
    read_taxibj,
    read_trajectories,
    read_weatherbench,
    simulate_traffic,
)
from sdkd_plugin.data.store import load_or_compute
from sdkd_plugin.model_folder import ModelCard, load_card, load_model, save_model
from sdkd_plugin.report import forecast_scores
from sdkd_plugin.study import Arm, Samples, Task, standard_arms, study

GRID = GridTransform((8, 8))
BANDS = Bands.split(0.4)
RING = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def conv() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1)


def distiller(**options: Any) -> SDKDDistiller:
    return SDKDDistiller(conv(), conv(), GRID, **options)


X, Y = random(2, 3, 1, 8, 8)
VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "minus": -1,
    "zero": 0,
    "seven": 7,
    "half": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "huge int": 10**18,
    "endless int": 10**400,
    "huge": 1e308,
    "tiny": 1e-320,
    "complex": 1j,
    "numpy int": np.int64(3),
    "numpy float": np.float32(0.25),
    "numpy array": np.array([0.25, 0.5]),
    "empty text": "",
    "text": "tset",
    "long text": "x" * 100_000,
    "bytes": b"\xff",
    "empty list": [],
    "list": [0.25, 0.5],
    "list of None": [None],
    "list of text": ["latent"],
    "nested": [[1, 2], [3]],
    "tuple": (4, 4),
    "dict": {"a": 1},
    "set": {1},
    "object": object(),
    "class": int,
    "function": len,
    "module": nn.Identity(),
    "grid": GRID,
    "other grid": GridTransform((4,)),
    "bands": BANDS,
    "path": Path("/nowhere/at/all"),
    "folder": Path(),
    "this file": Path(__file__),
    "scalar": torch.tensor(0.5),
    "nan scalar": torch.tensor(math.nan),
    "no elements": torch.zeros(0),
    "no samples": torch.zeros(0, 1, 8, 8),
    "vector": torch.ones(3),
    "matrix": torch.ones(2, 6),
    "integers": torch.arange(3),
    "outside": torch.full((2, 6), 10**12),
    "flags": torch.tensor([True, False, True]),
    "field": random(3, 1, 8, 8),
    "nan field": torch.full((3, 1, 8, 8), math.nan),
    "inf field": torch.full((3, 1, 8, 8), math.inf),
    "huge field": torch.full((3, 1, 8, 8), 3e38),
    "double field": random(3, 1, 8, 8).double(),
    "complex field": random(3, 1, 8, 8) * 1j,
    "other field": random(3, 1, 4, 8),
    "index": pd.date_range("2020", periods=3, freq="30min"),
    "generator": torch.Generator(),
}


class Call(NamedTuple):
    """A function, arguments that work, and what to compute from its result."""

    function: Callable[..., Any]
    works: Mapping[str, Any]
    use: Callable[[Any], Any] | None = None


def weighed_by(amse: Any) -> Any:
    return FrequencyAlignedLoss(GRID, BANDS, "fixed", amse=amse).terms(X, Y, Y).total


def weighed(weighting: Any) -> Any:
    return FrequencyAlignedLoss(GRID, BANDS, weighting)(X, Y)


GRAPH = {"horizon": 3, "window": 6, "n_nodes": 5, "hidden_size": 8, "emb_size": 4, "n_layers": 1}
GRAPH_INPUT = {"edge_index": RING[:, :4], "edge_weight": torch.ones(4)}
TRAFFIC = {
    "speed": torch.ones(3, 2),
    "mask": torch.ones(3, 2, dtype=torch.bool),
    "edge_index": torch.tensor([[0], [1]]),
    "edge_weight": torch.ones(1),
    "node_ids": ("a", "b"),
    "index": pd.date_range("2020", periods=3, freq="5min"),
    "source": "here",
}


def forecast(model: nn.Module) -> Tensor:
    return model.eval()(X)


def graph_forecast(model: nn.Module) -> Tensor:
    return model.eval()(torch.ones(1, 6, 5, 1), **GRAPH_INPUT)


def table(folder: Path) -> dict[str, Call]:
    (folder / "speed.csv").write_text("a,b\n60,0\n55,50\n")
    (folder / "adj.csv").write_text("1,0.5\n0,1\n")
    np.save(folder / "u.npy", np.ones((2, 4, 8, 8), np.float32))
    precompute(distiller().loss, [{"x": X}], folder / "cache")
    card = ModelCard("UNet", {"in_channels": 1, "out_channels": 1, "width": 2, "depth": 1})
    save_model(folder / "model", card.make(), card)
    cache, loss, samples = TeacherCache(folder / "cache"), distiller().loss, Samples(X, Y)
    ready, measured = distiller(), distiller(weighting="adaptive", teacher_bound=0.1)
    grid = {"in_channels": 1, "out_channels": 1}
    pairs = {
        "missing": "zeros",
        "speed_csv": folder / "speed.csv",
        "adjacency_csv": folder / "adj.csv",
    }
    task = {"train": samples, "validation": samples, "test": samples}
    whole = Task(**task, transform=GRID, bands=BANDS)
    solver = {"resolution": 8, "solver_resolution": 16, "duration": 1.0, "dt": 0.5, "cache": False}
    edges = {"edge_index": RING, "edge_weight": torch.ones(6), "num_nodes": 6}
    return {
        "Bands": Call(
            Bands, {"edges": (0.3, 0.6), "transition": 0.1}, lambda b: b(GRID.frequencies)
        ),
        "Bands.split": Call(Bands.split, {"cutoff": 0.3, "transition": 0.1}),
        "Bands.dyadic": Call(Bands.dyadic, {"n": 3, "transition": 0.0}),
        "Bands.from_energy": Call(
            Bands.from_energy,
            {"spectrum": Spectrum(torch.linspace(0, 1, 9), torch.ones(9)), "n": 3},
        ),
        "Bands()": Call(BANDS, {"frequencies": torch.linspace(0, 1, 9)}),
        "GridTransform": Call(
            GridTransform, {"shape": (8, 8), "boundary": "periodic"}, lambda t: t.frequencies
        ),
        "GraphTransform.from_edges": Call(
            GraphTransform.from_edges, {**edges, "potential": 0.25}, lambda t: t.frequencies
        ),
        "GraphTransform.from_edges chebyshev": Call(
            GraphTransform.from_edges,
            {**edges, "method": "chebyshev", "tolerance": 0.05},
            lambda t: t.band_energy(torch.ones(1, *t.domain_shape, 1), BANDS),
        ),
        "GraphTransform": Call(
            GraphTransform,
            {"eigenvectors": torch.eye(4), "eigenvalues": torch.linspace(0, 2, 4)},
            lambda t: t.frequencies,
        ),
        "ProductTransform": Call(ProductTransform, {"space": GRID, "frames": 4, "variables": 1}),
        "GridTransform.forward": Call(GRID.forward, {"x": X}),
        "GridTransform.band_energy": Call(GRID.band_energy, {"x": X, "bands": BANDS}),
        "FixedWeighting": Call(FixedWeighting, {"weights": (1.0, 2.0)}, weighed),
        "RelativeWeighting": Call(RelativeWeighting, {"floor": 0.1}, weighed),
        "AdaptiveWeighting": Call(
            AdaptiveWeighting,
            {"n_bands": 2, "decay": 0.9, "max_weight": 4.0, "floor": 0.05},
            weighed,
        ),
        "ConfidenceWeighting": Call(ConfidenceWeighting, {"n_bands": 2, "decay": 0.9}),
        "AEKDAggregation": Call(AEKDAggregation, {"max_weight": 0.6, "unit_gradients": False}),
        "LatentPair": Call(LatentPair, {"student": "a", "teacher": "b", "weight": 1.0}),
        "GaussianNoise": Call(GaussianNoise, {"deviation": 0.1}, lambda f: f(X)),
        "GaussianNoise()": Call(GaussianNoise(0.1), {"x": X}),
        "Mixup": Call(Mixup, {"generator": None}, lambda f: f(X)),
        "Mixup()": Call(Mixup(), {"x": X}),
        "frequency_aligned_loss": Call(
            frequency_aligned_loss,
            {"student": X, "teacher": Y, "transform": GRID, "bands": BANDS, "weights": (1.0, 1.0)},
        ),
        "FrequencyAlignedLoss": Call(
            FrequencyAlignedLoss,
            {"transform": GRID, "bands": BANDS, "weighting": "fixed"},
            lambda f: f(X, Y),
        ),
        "DistillationLoss": Call(
            DistillationLoss,
            {
                **{"teacher": conv(), "transform": GRID, "bands": BANDS, "weighting": "fixed"},
                **{"kd_weight": 1.0, "latents": (), "aggregation": "mean"},
            },
        ),
        "DistillationLoss()": Call(
            loss, {"forecast": X, "x": X, "y": Y, "mask": None}, lambda t: t.total
        ),
        "SDKDDistiller": Call(
            SDKDDistiller,
            {
                **{"teacher": conv(), "student": conv(), "transform": GRID, "bands": BANDS},
                **{"task_loss": "mse", "kd_weight": 1.0, "weighting": "fixed", "latents": ()},
                **{"augmentation": None, "example": None},
            },
            lambda d: d.step(X, Y).total,
        ),
        "step": Call(ready.step, {"x": X, "y": Y, "mask": None}, lambda t: t.total),
        "step without labels": Call(ready.step, {"x": X, "y": None}, lambda t: t.total),
        "step, measured": Call(measured.step, {"x": X, "y": Y}, lambda t: t.total),
        "step, plain": Call(distiller(kd_weight=0.0).step, {"x": X, "y": Y}, lambda t: t.total),
        "step from a cache": Call(
            SDKDDistiller(cache, conv(), GRID).step,
            {"x": X, "y": Y, "index": torch.arange(3)},
            lambda t: t.total,
        ),
        "AMSE": Call(AMSE, {"weight": 1.0, "amplitude": "target"}, weighed_by),
        "SpectralLoss": Call(
            SpectralLoss,
            {"transform": GRID, "bands": BANDS, "weights": (1.0, 2.0), "amse": None},
            lambda f: f(X, Y),
        ),
        "inverse_energy_weights": Call(
            inverse_energy_weights,
            {"fields": X, "transform": GRID, "bands": BANDS, "floor": 1e-3},
        ),
        "OnPolicy": Call(
            OnPolicy,
            {"model": conv(), "max_steps": 2, "states": X, "bound": 3.0, "generator": None},
            lambda p: p(X),
        ),
        "DerivativeMatching": Call(
            DerivativeMatching,
            {"weight": 1.0, "size": 0.01, "generator": None},
            lambda d: distiller(derivatives=d).step(X, Y).total,
        ),
        "Bands.equal": Call(Bands.equal, {"n": 3, "transition": 0.0}),
        "AtResolution": Call(AtResolution, {"model": conv(), "shape": (4, 4)}, lambda m: m(X)),
        "TapReader": Call(TapReader, {"model": nn.Sequential(conv()), "names": ["0"]}),
        "TeacherCache": Call(TeacherCache, {"folder": folder / "cache", "key": None}),
        "TeacherCache.outputs": Call(cache.outputs, {"index": torch.arange(3), "x": X}),
        "precompute": Call(precompute, {"loss": loss, "batches": [{"x": X}], "cache": None}),
        "precompute to disk": Call(
            partial(precompute, loss, cache=folder / "other cache"),
            {"batches": [{"x": X}], "storage": "float32", "views": 0, "seed": 0},
        ),
        "UNet": Call(models.UNet, {**grid, "width": 2, "depth": 1, "padding": "zeros"}, forecast),
        "ResNet": Call(models.ResNet, {**grid, "width": 4, "depth": 1}, forecast),
        "MLPMixer": Call(
            models.MLPMixer, {**grid, "shape": (8, 8), "width": 4, "depth": 1, "patch": 4}, forecast
        ),
        "SimVP": Call(
            models.SimVP,
            {**grid, "width": 4, "latent_width": 8, "depth": 1, "n_downsampling": 0},
            forecast,
        ),
        "STAlterNet": Call(
            models.STAlterNet, {**grid, "width": 4, "depth": 1, "heads": 2}, forecast
        ),
        "GraphMixer": Call(models.GraphMixer, {**GRAPH, "dropout": 0.1}, graph_forecast),
        "GraphAlterNet": Call(
            models.GraphAlterNet, {**GRAPH, "n_heads": 2, "patch_size": 3}, graph_forecast
        ),
        "UNet()": Call(models.UNet(**grid, width=2, depth=1), {"x": X}),
        "TrafficData": Call(TrafficData, TRAFFIC),
        "TaxiFlows": Call(TaxiFlows, {"flow": torch.ones(3, 2, 4, 4), "index": VALUES["index"]}),
        "find_traffic": Call(find_traffic, {"folder": folder}),
        "read_csv_pair": Call(read_csv_pair, {**pairs, "start": "2012-03-01", "freq": "5min"}),
        "read_los_loop": Call(read_los_loop, {"folder": folder}),
        "read_taxibj": Call(read_taxibj, {"paths": folder}),
        "read_trajectories": Call(read_trajectories, {"path": folder / "u.npy"}),
        "read_weatherbench": Call(read_weatherbench, {"paths": folder, "variables": {"t2m": None}}),
        "simulate_traffic": Call(
            simulate_traffic, {"n_sensors": 6, "days": 1, "freeways": (1, 1), "progress": False}
        ),
        "navier_stokes": Call(navier_stokes, {"n_samples": 1, "progress": False, **solver}),
        "latitude_weighted_rmse": Call(
            latitude_weighted_rmse,
            {"forecast": X, "truth": Y, "latitude": torch.linspace(-80, 80, 8)},
        ),
        "load_or_compute": Call(
            partial(load_or_compute, compute=lambda: torch.ones(2)),
            {
                **{"stem": "a", "parameters": {"n": 1}, "folder": folder},
            },
        ),
        "ModelCard": Call(ModelCard, {"model": "UNet", "arguments": {}, "units": {}}),
        "load_model": Call(load_model, {"folder": folder / "model", "fits": None}),
        "load_card": Call(load_card, {"folder": folder / "model"}),
        "save_model": Call(
            save_model, {"folder": folder / "saved", "model": card.make(), "card": card}
        ),
        "forecast_scores": Call(
            forecast_scores, {"forecast": X, "truth": Y, "transform": GRID, "bands": BANDS}
        ),
        "Samples": Call(Samples, {"x": X, "y": Y, "mask": None}),
        "Task": Call(Task, {**task, "transform": GRID, "bands": BANDS, "task_loss": "mse"}),
        "Arm": Call(Arm, {"name": "a", "labels": 1.0, "teachers": None}),
        "standard_arms": Call(standard_arms, {"n_bands": 2, "weightings": ("fixed",)}),
        "study": Call(
            study,
            {
                **{"task": whole, "student": conv, "teacher": conv(), "seeds": 1, "steps": 2},
                **{"lr": 1e-3, "batch_size": 2, "validations": 1, "clip": None},
            },
        ),
    }
