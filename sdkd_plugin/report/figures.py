"""Pictures of forecasts; every function returns a matplotlib figure and shows nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from sdkd_plugin._checks import check_shape
from sdkd_plugin.spectral import Spectrum


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
                style = {"cmap": colours, "vmin": -limit, "vmax": limit, "origin": "lower"}
                image = axis.imshow(values[frame].cpu().numpy().T, **style)
                axis.set_title(f"{title}, frame {frame + 1}", fontsize=9)
                figure.colorbar(image, ax=axis, shrink=0.8)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def error_spectra(spectra: Mapping[str, Spectrum], edges: Sequence[float]) -> Figure:
    """Energy of errors in 32 equal bins of the frequency, with the edges of the bands.

    A spectrum named ``truth`` is drawn dashed.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis, bins, lowest = figure.subplots(), np.linspace(0, 1, 33), np.inf
    for name, spectrum in spectra.items():
        frequencies = spectrum.frequencies.double().clamp(0, 1).cpu().numpy()
        energy, _ = np.histogram(frequencies, bins, weights=spectrum.energy.double().cpu().numpy())
        held = np.histogram(frequencies, bins)[0] > 0
        style = {"color": "black", "linestyle": "--"} if name == "truth" else {}
        axis.semilogy(bins[:-1][held] + 1 / 64, energy[held], label=name, **style)
        # The truth may carry nothing at some frequencies; the errors set the scale.
        lowest = lowest if name == "truth" else min(lowest, energy[energy > 0].min())
    axis.set_ylim(bottom=lowest / 3)
    for edge in edges:
        axis.axvline(edge, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("frequency (0: mean, 1: highest of the domain)")
    axis.set_ylabel("energy of the error")
    axis.legend(fontsize=8)
    return figure


def band_bars(means: pd.DataFrame, deviations: pd.DataFrame) -> Figure:
    """Errors with error bars: a panel for each column, such as a band, a bar for each model."""
    columns, names = list(means), list(means.index)
    figure = Figure(figsize=(7, (0.5 + 0.3 * len(names)) * len(columns)), layout="constrained")
    axes = figure.subplots(len(columns), 1, squeeze=False)[:, 0]
    colours = [f"C{i}" for i in range(len(names))]
    for axis, column in zip(axes, columns, strict=True):
        bars = axis.barh(names, means[column], xerr=deviations[column], color=colours)
        axis.bar_label(bars, [f"{value:.3g}" for value in means[column]], fontsize=8, padding=2)
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.set_title(column, fontsize=10, loc="left")
    return figure


def sensor_errors(
    positions: Float[np.ndarray, "nodes 2"], errors: Mapping[str, Float[Tensor, " nodes"]]
) -> Figure:
    """The error of each model at each sensor, on one colour scale; positions as x and y."""
    lines = -(-len(errors) // 2)
    figure = Figure(figsize=(7, 0.5 + 3 * lines), layout="constrained")
    panels = figure.subplots(lines, 2).ravel()
    highest = max(float(error.max()) for error in errors.values())
    for axis in panels:
        axis.set_axis_off()
    for axis, (name, error) in zip(panels, errors.items(), strict=False):
        points = axis.scatter(*positions.T, c=error.cpu().numpy(), s=14, vmin=0, vmax=highest)
        axis.set_title(name, fontsize=10)
        axis.set_aspect("equal", "datalim")
    figure.colorbar(points, ax=list(panels), shrink=0.8, label="error")
    return figure


def sensor_series(
    truth: Float[Tensor, "samples nodes"],
    forecasts: Mapping[str, Float[Tensor, "samples nodes"]],
    nodes: Mapping[str, int],
) -> Figure:
    """Truth and forecasts over the samples, a panel for each named sensor."""
    figure = Figure(figsize=(7, 2.1 * len(nodes) + 0.6), layout="constrained")
    panels = figure.subplots(len(nodes), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (label, node) in zip(panels, nodes.items(), strict=True):
        axis.plot(truth[:, node].cpu().numpy(), color="black", linewidth=1, label="truth")
        for name, forecast in forecasts.items():
            axis.plot(forecast[:, node].cpu().numpy(), linewidth=1, label=name)
        axis.set_title(label, fontsize=9, loc="left")
    panels[-1].set_xlabel("sample")
    panels[0].legend(fontsize=8, ncols=1 + len(forecasts))
    return figure


def training_curves(histories: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Numbers over training or a roll-out, a panel for each of them, a line a model.

    Args:
        histories: by name of the model: equally long sequences by name, one of them ``step``.
    """
    names = dict.fromkeys(name for h in histories.values() for name in h if name != "step")
    figure = Figure(figsize=(7, 2.1 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for axis, name in zip(panels, names, strict=True):
        for i, (model, history) in enumerate(histories.items()):
            if name in history:
                axis.plot(history["step"], history[name], f"C{i}.-", label=model)
        axis.set_title(name, fontsize=9, loc="left")
        if "error" in name:
            axis.set_yscale("log")
    panels[-1].set_xlabel("step")
    panels[0].legend(fontsize=8)
    return figure


def accuracy_latency(panels: Mapping[str, pd.DataFrame], measure: str) -> Figure:
    """Error against latency, a panel for each problem; lower and further left is better.

    Args:
        panels: by title: points with ``series``, ``milliseconds``, ``error``, its ``deviation``
            and ``reference``. The points of a series are joined in the order of their latency; a
            reference, such as a teacher, is a star and a dotted line at its error.
        measure: name of the error.
    """
    figure = Figure(figsize=(6.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for i, (series, group) in enumerate(points.groupby("series", sort=False)):
            ordered, star = group.sort_values("milliseconds"), bool(group.reference.any())
            style = {"fmt": "*", "markersize": 12} if star else {"fmt": "o-"}
            values = (ordered[name] for name in ("milliseconds", "error", "deviation"))
            axis.errorbar(*values, color=f"C{i}", label=series, capsize=2, **style)
            if star:
                axis.axhline(ordered.error.min(), color=f"C{i}", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("milliseconds a forecast")
        axis.set_ylabel(measure)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    return figure
