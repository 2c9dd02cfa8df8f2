"""The table of an ablation: what each part is worth, and against what.

Here lives the markdown; rows come from `ablation`, means and tests from `sdkd_plugin.report`.
"""

import math

import pandas as pd
from _ablation_data import NavierStokes
from _ablation_rows import ALL, ALONE, BASES, LATENT_WEIGHT, PLAIN, QUARTER, ROWS
from _ablation_systems import System

from sdkd_plugin.report import format_table, paired_change

SIGNIFICANT = 0.05

GRID_COLUMNS = {
    "relative_l2": ("relative L2", ".4f"),
    "mse": ("MSE", ".5f"),
    "band_0": ("low-band MSE", ".5f"),
    "band_1": ("high-band MSE", ".6f"),
}
TRAFFIC_COLUMNS = {
    "mae_average": ("MAE", ".3f"),
    "mae_15": ("MAE 15 min", ".3f"),
    "mae_30": ("MAE 30 min", ".3f"),
    "mae_60": ("MAE 60 min", ".3f"),
    "band_0": ("low-band MSE", ".2f"),
    "band_1": ("high-band MSE", ".2f"),
}
PROTOCOL = f"""\
Each row changes one thing against plain-MSE distillation, but for the last, which puts parts
together, and for those with a base of their own: AEKD and CAMKD change the aggregation of two
teachers against their mean, the two branches' latents what is tapped (at twice the weight in all)
against the one latent. Mean over seeds (± standard deviation) on test data, in physical units; a
seed is a student's first weights, the order of its batches and, on turbulence, which labels it has;
data and teachers are the same for all. All students of a system take equally many optimisation
steps (function matching forecasts twice in each, and mixes readings without their time of day) with
Adam and a cosine; the weights with the least validation error count. With a quarter of the labels
the teacher answers to all training inputs; the student alone trains on the labelled ones only.
Hyper-parameters were set once, before any row was scored, and tuned for no row: fixed band weights
1 and 2, {LATENT_WEIGHT:g} for each pair of latents, the defaults of this package elsewhere. p:
two-sided paired t-test over seeds, on the error named in the heading. Among this many tests about
one in twenty is below 0.05 by chance."""


def report(rows: pd.DataFrame, systems: dict[str, System], left_out: list[str]) -> str:
    """The whole document.

    Args:
        rows: one row a system, setting, row and seed.
        systems: those in the table, by name.
        left_out: a sentence for each system that is not.
    """
    hardware = ", ".join(sorted(set(rows.hardware)))
    lines = ["# Ablation", "", PROTOCOL, "", f"Measured on: {hardware}.", ""]
    lines += [line for sentence in left_out for line in (sentence, "")]
    for name, system in systems.items():
        lines += section(name, system, rows[rows.system == name])
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, system: System, rows: pd.DataFrame) -> list[str]:
    """One system: its sizes, its table and what the table shows."""
    on_grid = isinstance(system.data, NavierStokes)
    columns = GRID_COLUMNS if on_grid else TRAFFIC_COLUMNS
    error, heading = next(iter(columns.items()))[0], next(iter(columns.values()))[0]
    seeds = rows[rows.setting != ""].seed.nunique()
    teachers = " and ".join(network.name for network in system.teachers)
    lines = [
        f"## {name}",
        "",
        f"Data: {rows.source.iloc[0]}. {system.data.sentence} Teachers: {teachers}, each trained "
        f"on all labels for {system.teaching.steps} steps; the first teaches the rows with one. "
        f"Student: {system.student.name}, {system.learning.steps} steps of batch "
        f"{system.learning.batch_size}, {seeds} seed(s). The teacher counts {system.kd_weight:g} "
        f"times against the labels. Low band: below {system.cutoff:g} of the highest frequency.",
        "",
    ]
    order = {row.name: i for i, row in enumerate(ROWS.values())}
    rows = rows.assign(
        order=[order.get(row, -1) for row in rows.row],
        rank=rows.setting.map({"": 0, QUARTER: 1, ALL: 2}),
    ).sort_values(["rank", "order", "seed"], kind="stable")
    changes = {
        (setting, row): [change(rows, error, setting, row, base) for base in bases_of(row)]
        for setting, row in zip(rows.setting, rows.row, strict=True)
    }
    for i, against in enumerate(HEADINGS):
        rows[f"{heading} {against}"] = [
            shown(changes[key][i]) for key in zip(rows.setting, rows.row, strict=True)
        ]
    index = ["setting", "row", *(f"{heading} {against}" for against in HEADINGS)]
    lines += [format_table(rows, index=index, columns=columns), ""]
    return lines + verdict(changes, heading) + [""]


Change = tuple[float, float] | None
HEADINGS = ("against alone", "against plain MSE", "against its base")
OWN_BASES = {ROWS[row].name: ROWS[base].name for row, base in BASES.items()}


def bases_of(row: str) -> tuple[str, str, str]:
    """What a row is compared with, in the order of the headings."""
    plain = ROWS[PLAIN].name
    return ROWS[ALONE].name, plain, OWN_BASES.get(row, row)


def change(rows: pd.DataFrame, error: str, setting: str, row: str, base: str) -> Change:
    """Relative change and p; None where there is nothing to compare, or not on the same seeds."""
    if row in (base, ROWS[ALONE].name) or not setting:
        return None
    try:
        return paired_change(
            rows,
            column=error,
            of={"setting": setting, "row": row},
            against={"setting": setting, "row": base},
        )
    except ValueError:
        return None


def shown(change: Change) -> str:
    """A cell."""
    if change is None:
        return "-"
    relative, p = change
    return f"{relative:+.1%}" + ("" if math.isnan(p) else f" (p = {p:.2g})")


def verdict(changes: dict[tuple[str, str], list[Change]], heading: str) -> list[str]:
    """Which rows differ from plain-MSE distillation, and which are not seen to."""
    lines = []
    for setting in dict.fromkeys(setting for setting, _ in changes if setting):
        found: dict[str, list[str]] = {"lower": [], "higher": [], "not told apart": []}
        for (where, row), (_, against, _) in changes.items():
            if where != setting or against is None:
                continue
            relative, p = against
            told = p < SIGNIFICANT
            found[("lower" if relative < 0 else "higher") if told else "not told apart"].append(row)
        lines += [
            f"- {setting}, {heading} against plain-MSE distillation, p < {SIGNIFICANT:g}: {what}: "
            f"{'; '.join(names)}."
            for what, names in found.items()
            if names
        ]
    return lines
