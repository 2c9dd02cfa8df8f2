"""Errors of forecasts on a domain, and what a model costs."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_mask, check_positive_int, check_shape
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral import AbstractTransform, Bands


@explained
def forecast_scores(
    forecast: Float[Tensor, "batch ..."],
    truth: Float[Tensor, "batch ..."],
    transform: AbstractTransform,
    bands: Bands,
    *,
    mask: Bool[Tensor, "..."] | None = None,
    at: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Errors of forecasts on a grid or a graph, over the observed elements.

    ``mse`` and ``mae`` are means over elements; ``relative_l2`` is ``||error|| / ||truth||`` of a
    sample, all frames at once, averaged over samples; ``band_0, band_1, ...`` is the part of the
    MSE in each band from low to high, so that they sum to it; ``mae_<name>`` is the MAE at one time
    step.

    Args:
        forecast: of a model.
        truth: any value where it was not observed.
        transform: the domain of the forecasts.
        bands: the partition of its frequencies.
        mask: True where the truth was observed; as many axes as it, each of its size or 1.
        at: time steps, from 0 along axis 1, by name.

    Raises:
        ValueError: if shapes differ, or the fields do not lie on the domain.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> fields = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
        >>> found = forecast_scores(*fields, GridTransform((8, 8)), Bands.split(0.25))
        >>> {name: round(value, 6) for name, value in found.items()}
        {'mse': 1.0, 'mae': 1.0, 'relative_l2': 1.0, 'band_0': 1.0, 'band_1': 0.0}
    """
    check_shape("forecast", forecast.shape, truth.shape, "the truth's shape")
    if mask is None:
        mask = torch.ones_like(truth, dtype=torch.bool)
    check_mask(mask, truth)
    seen = mask.expand_as(truth)
    error, truth = (torch.where(seen, x, 0).double() for x in (forecast - truth, truth))
    norms = error.flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    energy = transform.sample_band_energy(error, bands).sum(0) / seen.sum()
    scores = {
        "mse": error.square().sum() / seen.sum(),
        "mae": error.abs().sum() / seen.sum(),
        "relative_l2": norms[seen.flatten(1).any(1)].mean(),
        **{f"band_{i}": value for i, value in enumerate(energy)},
    }
    for name, step in (at or {}).items():
        scores[f"mae_{name}"] = error[:, step].abs().sum() / seen[:, step].sum()
    return {name: float(value) for name, value in scores.items()}


def parameter_count(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; a complex one counts twice.

    Example:
        >>> parameter_count(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())


def milliseconds_a_forecast(
    model: Callable[..., Any],
    *args: Any,
    inputs: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    repetitions: int = 20,
) -> float:
    """Median wall time of ``model(*args, **inputs)`` without gradients, after three calls.

    Args:
        model: in eval mode.
        *args: of the call, usually a batch of one sample.
        inputs: keyword arguments of the call.
        device: where the call runs; a GPU is waited for before each reading of the clock.
        repetitions: of which the median is taken.
    """
    check_positive_int("repetitions", repetitions)
    on_gpu = torch.device(device).type == "cuda"
    wait = partial(torch.cuda.synchronize, device) if on_gpu else (lambda: None)
    times = []
    with torch.no_grad():
        for _ in range(3 + repetitions):
            wait()
            start = time.perf_counter()
            model(*args, **(inputs or {}))
            wait()
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])
