"""Pictures of forecasts: fields, sensor series, error spectra, band errors.

Every function returns a matplotlib figure and shows nothing; no global state of matplotlib is
used. Colours follow the order of the names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from sdkd_plugin._checks import check_shape
from sdkd_plugin.spectral import Spectrum

Array = npt.NDArray[np.floating[Any]]


def fields(
    truth: Float[Tensor, "frames nx ny"],
    forecasts: Mapping[str, Float[Tensor, "frames nx ny"]],
    frames: Sequence[int],
) -> Figure:
    """The truth of one sample and, for each model, forecast and error, at some frames."""
    figure = Figure(
        figsize=(6.4 * len(frames) + 1, 2.7 + 2.7 * len(forecasts)), layout="constrained"
    )
    axes = figure.subplots(1 + len(forecasts), 2 * len(frames), squeeze=False)
    scale = float(truth[list(frames)].abs().max())
    error_scale = max(float((f - truth)[list(frames)].abs().max()) for f in forecasts.values())
    for row, (name, field) in enumerate({"truth": truth, **forecasts}.items()):
        check_shape(f"forecasts[{name!r}]", field.shape, truth.shape, "the truth's shape")
        for column, frame in enumerate(frames):
            forecast, error = axes[row, 2 * column : 2 * column + 2]
            panels = [(forecast, field, scale, "RdBu_r", name)]
            if row:
                panels.append((error, field - truth, error_scale, "PuOr", f"{name}: error"))
            for axis, values, limit, colours, title in panels:
                image = axis.imshow(
                    values[frame].cpu().numpy().T, cmap=colours, vmin=-limit, vmax=limit, origin="lower"
                )
                axis.set_title(f"{title}, frame {frame + 1}", fontsize=9)
                figure.colorbar(image, ax=axis, shrink=0.8)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def error_spectra(spectra: Mapping[str, Spectrum], edges: Sequence[float]) -> Figure:
    """Energy of errors in equal bins of the frequency, with the edges of the bands.

    Args:
        spectra: by name; one named ``truth`` is drawn dashed.
        edges: of the bands.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    lowest = np.inf
    for name, spectrum in spectra.items():
        centres, energy = binned_spectrum(spectrum.frequencies, spectrum.energy)
        style = {"color": "black", "linestyle": "--"} if name == "truth" else {}
        axis.semilogy(centres, energy, label=name, linewidth=1.4, **style)
        # The truth may carry nothing at some frequencies; the errors set the scale.
        lowest = lowest if name == "truth" else min(lowest, energy[energy > 0].min())
    axis.set_ylim(bottom=lowest / 3)
    for edge in edges:
        axis.axvline(edge, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("frequency (0: mean, 1: highest of the domain)")
    axis.set_ylabel("energy of the error")
    axis.legend(fontsize=8)
    return figure


def binned_spectrum(frequencies: Tensor, energy: Tensor, n_bins: int = 32) -> tuple[Array, Array]:
    """Total energy in equal frequency bins.

    Returns:
        centres of the bins that hold a frequency, and the energy in each.
    """
    edges = np.linspace(0, 1, n_bins + 1)
    f = frequencies.double().clamp(0, 1).cpu().numpy()
    total, _ = np.histogram(f, edges, weights=energy.double().cpu().numpy())
    count, _ = np.histogram(f, edges)
    return ((edges[1:] + edges[:-1]) / 2)[count > 0], total[count > 0]


def band_bars(errors: Mapping[str, Mapping[Any, float]]) -> Figure:
    """Error of each model in each band, a panel a band.

    Args:
        errors: by the band's name, from low to high, and the model's.
    """
    names = list(next(iter(errors.values())))
    figure = Figure(figsize=(4.6 * len(errors), 1.2 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(errors), squeeze=False)[0]
    for axis, (band, values) in zip(axes, errors.items(), strict=True):
        bars = axis.barh(names, list(values.values()), color=[f"C{i}" for i in range(len(names))])
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.set_title(band, fontsize=10)
        axis.set_xlabel("MSE")
    return figure


def series(
    hours: Array,
    truth: Array,
    observed: npt.NDArray[np.bool_],
    forecasts: Mapping[str, Array],
    titles: Sequence[str],
    unit: str,
) -> Figure:
    """Series of some sensors: the truth and each model's forecast of the same times.

    Args:
        hours: of shape ``(time,)``.
        truth: of shape ``(sensors, time)``.
        observed: of the same shape; where False, the truth is not drawn.
        forecasts: of the same shape, by the model's name.
        titles: one a sensor.
        unit: of the series.
    """
    figure = Figure(figsize=(10, 2.4 * len(titles)), layout="constrained")
    axes = figure.subplots(len(titles), 1, squeeze=False, sharex=True)[:, 0]
    for i, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        seen = np.where(observed[i], truth[i], np.nan)
        axis.plot(hours, seen, color="black", linewidth=1.6, label="truth")
        for name, values in forecasts.items():
            axis.plot(hours, values[i], linewidth=1.1, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel(unit)
    axes[-1].set_xlabel("hours")
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, ncols=len(names), loc="outside upper center")
    return figure
