"""Numbers about forecasts on grids and about models. Traffic is scored by tsl's own metrics."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_positive_int, check_shape
from sdkd_plugin.spectral import AbstractTransform, Bands


class GridScores:
    """Errors of forecasts on a domain, collected batch by batch.

    All are means over the samples: ``mse`` and ``mae`` a mean over a sample's elements,
    ``relative_l2`` the norm of a sample's error over the norm of its truth (all frames at once, as
    neuraloperator's ``LpLoss``), and ``band_0, band_1, ...`` the part of the MSE in each band from
    low to high, so that they sum to it.

    Args:
        transform: the domain of the forecasts.
        bands: the partition.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> scores = GridScores(GridTransform((8, 8)), Bands.split(0.25))
        >>> scores.update(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
        >>> {name: round(value, 6) for name, value in scores.compute().items()}
        {'mse': 1.0, 'mae': 1.0, 'relative_l2': 1.0, 'band_0': 1.0, 'band_1': 0.0}
    """

    def __init__(self, transform: AbstractTransform, bands: Bands) -> None:
        self._transform = transform
        self._bands = bands
        self._samples: list[Tensor] = []

    def update(
        self, forecast: Float[Tensor, "batch ..."], truth: Float[Tensor, "batch ..."]
    ) -> None:
        """Add a batch.

        Raises:
            ValueError: if the shapes differ or do not lie on the domain.
        """
        check_shape("forecast", forecast.shape, truth.shape, "the truth's shape")
        error = (forecast - truth).detach()
        flat = error.flatten(1)
        energy = self._transform.sample_band_energy(error, self._bands) / flat.shape[1]
        columns = [
            flat.square().mean(1),
            flat.abs().mean(1),
            flat.norm(dim=1) / truth.flatten(1).norm(dim=1),
        ]
        self._samples.append(torch.cat([torch.stack(columns, 1), energy], 1).double().cpu())

    def compute(self) -> dict[str, float]:
        """The means over all samples so far.

        Raises:
            ValueError: if there are none.
        """
        if not self._samples:
            raise ValueError("`update` was never called: there is nothing to average.")
        names = ["mse", "mae", "relative_l2", *(f"band_{i}" for i in range(self._bands.n_bands))]
        return dict(zip(names, torch.cat(self._samples).mean(0).tolist(), strict=True))


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
