"""The pictures of a study, and one HTML page with its protocol, tables and pictures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sdkd_plugin.report import rollout_curves, summary_table
from sdkd_plugin.report.figures import (
    accuracy_latency,
    band_bars,
    error_spectra,
    fields,
    sensor_errors,
    sensor_series,
    training_curves,
)
from sdkd_plugin.report.page import Section, html_page
from sdkd_plugin.spectral import GraphTransform
from sdkd_plugin.spectral.basis import AbstractBasisTransform

if TYPE_CHECKING:
    from sdkd_plugin.study.result import Result
    from sdkd_plugin.study.task import Task

SHOWN = 3
"""How many arms the pictures of single samples show, beside the first teacher."""
MACHINE = ("device", "hardware", "threads", "python", "torch", "sdkd_plugin")
"""What a row tells of the machine."""

TEXTS: Mapping[str, tuple[str, str]] = {
    "latency": (
        "Accuracy against latency",
        "Mean error over seeds, with the standard deviation, and milliseconds for the forecast of "
        "one sample, eager, as in the table. Lower and further left is better; the star is the "
        "teacher. Arms with models of their own that differ after the last comma are one line.",
    ),
    "bands": (
        "Errors by band of frequencies",
        "Mean over seeds, with the standard deviation. band_0 holds the lowest frequencies; the "
        "bands sum to the MSE.",
    ),
    "fields": (
        "Fields and errors",
        "Forecasts of the first test sample by the models of the first seed, and their errors, at "
        "the first and the last frame.",
    ),
    "sensors": (
        "Errors on the map",
        "Mean absolute error at each sensor over the test samples, by the first seed's models.",
    ),
    "series": (
        "Forecasts over time",
        "The last step of each forecast beside the truth, by the models of the first seed, at the "
        "sensors with the median and the highest error of the last model.",
    ),
    "steps": (
        "Errors over the forecast",
        "Error over the size of the truth (nRMSE) and correlation with it, at each step of the "
        "forecast, means over the test samples, by the models of the first seed.",
    ),
    "spectra": (
        "Error spectra",
        "Energy of the errors by frequency, by the models of the first seed. The dotted lines "
        "divide the bands; where an error reaches the truth (dashed), nothing is forecast.",
    ),
    "training": (
        "Training",
        "The validation error, in the models' units, and the weights of bands and teachers at "
        "each validation, for the first seed. The weights with the least validation error are "
        "scored.",
    ),
}


def study_figures(result: "Result") -> dict[str, Figure]:
    """Pictures of the first arm's setting, by the names in `TEXTS`.

    ``latency`` and ``bands`` are always drawn, ``spectra`` if the transform has coefficients,
    ``fields`` on a plane, ``sensors`` and ``series`` on a graph with positions or eigenvectors, and
    ``steps`` where several steps are forecast and all labels observed.
    """
    task, setting, arms = result.task, result.arms[0].setting, result.names(result.arms[0].setting)
    rows = result.rows[result.rows.setting.isin(["-", setting])]
    columns = dict.fromkeys([task.measure, *(f"band_{i}" for i in range(task.bands.n_bands))])
    groups = rows.groupby("model", sort=False)[list(columns)]
    figures = {"latency": accuracy_latency({task.name: _points(result, rows)}, task.measure)}
    figures["bands"] = band_bars(groups.mean(), groups.std().fillna(0.0))
    models = {**result.teachers, **{name: result.models(name)[0] for name in arms}}
    forecasts = {k: task.physical(task.forecast(m.cpu(), task.test)) for k, m in models.items()}
    shown = {name: forecasts[name] for name in [*list(result.teachers)[:1], *arms[:SHOWN]]}
    truth, mask = task.physical(task.test.y), task.test.mask
    seen = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask.expand_as(truth)
    transform = task.transform
    if isinstance(transform, GraphTransform) and transform.method == "exact":
        transform = transform.basis
    if isinstance(transform, AbstractBasisTransform):
        errors = {name: torch.where(seen, f - truth, 0.0) for name, f in forecasts.items()}
        compared = {"truth": truth, **errors} if bool(seen.all()) else errors
        spectra = {name: transform.spectrum(field) for name, field in compared.items()}
        figures["spectra"] = error_spectra(spectra, task.bands.edges)
    if bool(seen.all()) and len(truth[0]) > task.channels:
        curves = {name: _by_step(task, forecast, truth) for name, forecast in forecasts.items()}
        figures["steps"] = training_curves(curves)
    if task.transform.domain_axes == (-2, -1):
        first = {name: forecast[0] for name, forecast in shown.items()}
        figures["fields"] = fields(truth[0], first, [0, len(truth[0]) - 1])
    if isinstance(task.transform, GraphTransform):
        figures |= _graph_figures(result, task.transform, truth, shown, seen)
    histories = {
        t.arm.name: t.history(result.seeds[0]) for t in result.trainings if t.arm.setting == setting
    }
    figures["training"] = training_curves({k: _named(v) for k, v in histories.items() if v})
    return figures


def _by_step(task: "Task", forecast: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Means over the samples at each step of a forecast, from 1."""
    if task.transform.channel_axis % truth.ndim == 1:  # the frames are channels
        forecast, truth = (x.unflatten(1, (-1, task.channels)) for x in (forecast, truth))
    curves = rollout_curves(forecast, truth, task.transform, task.bands)
    means = {name: curves[name].mean(0).tolist() for name in ("nRMSE", "correlation")}
    return {"step": [float(i) for i in range(1, truth.shape[1] + 1)], **means}


def _points(result: "Result", rows: pd.DataFrame) -> pd.DataFrame:
    """Latency and error of each model of which both are known."""
    families = {arm.name: arm.name.rpartition(", ")[0] for arm in result.arms if arm.model}
    found = rows.dropna(subset=["milliseconds"]).groupby("model", sort=False)
    points = found.milliseconds.mean().to_frame()
    points["error"], points["deviation"] = (
        found[result.task.measure].agg(how).fillna(0.0) for how in ("mean", "std")
    )
    points["series"] = [families.get(str(name)) or name for name in points.index]
    return points.assign(reference=~points.index.isin(result.names()))


def _graph_figures(
    result: "Result",
    graph: GraphTransform,
    truth: Tensor,
    forecasts: Mapping[str, Tensor],
    seen: Tensor,
) -> dict[str, Figure]:
    positions = result.task.positions
    apart = tuple(i for i in range(truth.ndim) if i != truth.ndim - 2)  # all axes but the nodes
    count = seen.sum(apart).clamp(min=1)
    errors = {
        name: torch.where(seen, forecast - truth, 0.0).abs().sum(apart) / count
        for name, forecast in forecasts.items()
    }
    last = list(errors.values())[-1]
    order = last.argsort()
    median, worst = int(order[len(order) // 2]), int(order[-1])
    nodes = {f"node {median}, median error": median, f"node {worst}, highest error": worst}
    late = {name: forecast[:, -1, :, 0] for name, forecast in forecasts.items()}
    observed = torch.where(seen, truth, torch.nan)[:, -1, :, 0]
    figures = {"series": sensor_series(observed, late, nodes)}
    if positions is None and graph.method != "chebyshev":
        # A spectral layout: neighbours lie close together. A magnetic Laplacian has phases too.
        positions = torch.as_tensor(graph.basis.eigenvectors)[:, 1:3].real
    if positions is not None and positions.shape[1] == 2:
        figures["sensors"] = sensor_errors(positions.cpu().numpy(), errors)
    return figures


def _named(history: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The numbers of a training under the names that a picture shows."""
    alone = sum(name.startswith("teacher_weight") for name in history) < 2  # always 1
    named = {}
    for name, values in history.items():
        if name.startswith("weight_"):
            named[name.replace("weight_", "weight of band ")] = values
        elif not (alone and name.startswith("teacher_weight_")):
            named[name.replace("teacher_weight_", "weight of teacher ")] = values
    return named


def study_page(result: "Result", figures: Mapping[str, Figure]) -> str:
    """The page as HTML.

    Args:
        result: of a study.
        figures: by name; those in `TEXTS` come first, with a text.
    """
    protocol, rows = result.protocol(), result.rows
    machine = rows[list(MACHINE)].drop_duplicates().astype(str)
    table = summary_table(**result.columns())
    compared = [str(column) for column in table if " against " in str(column)]
    first = [str(column) for column in table if column not in compared]
    ahead = first[: first.index("model") + 2]  # the measure; what it is compared with comes next
    table = table[[*ahead, *compared, *first[len(ahead) :]]]
    sections = [Section("Errors", protocol, table)]
    for name in dict.fromkeys([*(n for n in TEXTS if n in figures), *figures]):
        heading, text = TEXTS.get(name, (name.capitalize(), ""))
        sections.append(Section(heading, text, figures[name]))
    days = sorted({date[:10] for date in rows.date})
    dates = f"Rows of {' to '.join(dict.fromkeys([days[0], days[-1]]))} (UTC)."
    sections.append(Section("Machine and versions", dates, machine))
    return html_page(f"{result.task.name}: a study of distillation", sections)
