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
from sdkd_plugin.spectral import AbstractTransform, Bands


class Scores:
    """Errors of forecasts on a grid or a graph, collected batch by batch.

    ``mse`` and ``mae`` are means over all observed elements; ``relative_l2`` is the norm of a
    sample's error over the norm of its truth, all frames at once as in neuraloperator's
    ``LpLoss``, a mean over the samples; ``band_0, band_1, ...`` is the part of the MSE in each band
    from low to high, so that the parts sum to it; ``mae_<name>`` is the MAE at one time step.

    Args:
        transform: the domain of the forecasts.
        bands: the partition of its frequencies.
        at: time steps, from 0 along axis 1, by the name that their MAE gets.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> scores = Scores(GridTransform((8, 8)), Bands.split(0.25))
        >>> scores.update(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
        >>> {name: round(value, 6) for name, value in scores.compute().items()}
        {'mse': 1.0, 'mae': 1.0, 'relative_l2': 1.0, 'band_0': 1.0, 'band_1': 0.0}
    """

    def __init__(
        self, transform: AbstractTransform, bands: Bands, at: Mapping[str, int] | None = None
    ) -> None:
        self._transform, self._bands, self._at = transform, bands, dict(at or {})
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def update(
        self,
        forecast: Float[Tensor, "batch ..."],
        truth: Float[Tensor, "batch ..."],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            forecast: of a model.
            truth: of the same shape.
            mask: True where the truth was observed; of as many axes, each of its size or 1.

        Raises:
            ValueError: if shapes differ, or do not lie on the domain.
        """
        check_shape("forecast", forecast.shape, truth.shape, "the truth's shape")
        seen = torch.ones_like(truth, dtype=torch.bool)
        if mask is not None:
            check_mask(mask, truth)
            seen = mask.expand_as(truth)
        error, truth = (torch.where(seen, x.detach(), 0) for x in (forecast - truth, truth))
        energy = self._transform.sample_band_energy(error, self._bands).double().sum(0)
        elements = seen.sum()
        self._add("mse", error.double().square().sum(), elements)
        self._add("mae", error.double().abs().sum(), elements)
        ratios = error.flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
        self._add("relative_l2", ratios.double().sum(), torch.tensor(len(ratios)))
        for i in range(self._bands.n_bands):
            self._add(f"band_{i}", energy[i], elements)
        for name, step in self._at.items():
            self._add(f"mae_{name}", error[:, step].double().abs().sum(), seen[:, step].sum())

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros(())) + total.cpu()
        self._counts[name] = self._counts.get(name, torch.zeros(())) + count.cpu()

    def compute(self) -> dict[str, float]:
        """The means over all batches so far.

        Raises:
            ValueError: if there are none.
        """
        if not self._sums:
            raise ValueError("`update` was never called: there is nothing to average.")
        return {name: float(total / self._counts[name]) for name, total in self._sums.items()}


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
    """Median wall time of one call without gradients, after three calls that are not counted.

    Times of one run on one machine compare with each other; no others do.

    Args:
        model: called as ``model(*args, **inputs)``; put it into eval mode first.
        *args: of the call, usually a batch of one sample.
        inputs: keyword arguments of the call.
        device: where the call runs; a GPU is waited for before each reading of the clock.
        repetitions: of which the median is taken.

    Raises:
        ValueError: if the repetitions are not a positive integer.
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
