"""Tables of results: means and deviations over seeds, as markdown, and paired comparisons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import scipy.stats


def summary_table(
    rows: pd.DataFrame, *, index: Sequence[str], columns: Mapping[str, tuple[str, str]]
) -> pd.DataFrame:
    """A table of texts, one row a group: the mean and, over several seeds, the deviation.

    Args:
        rows: one row a model and seed.
        index: columns that name a group, shown first.
        columns: column name to ``(heading, format)``, such as ``("MSE", ".4f")``; a group without
            a value shows a dash.

    Example:
        >>> rows = pd.DataFrame({"model": ["a", "a", "b"], "mse": [1.0, 3.0, 2.0]})
        >>> summary_table(rows, index=["model"], columns={"mse": ("MSE", ".1f")})["MSE"].tolist()
        ['2.0 ± 1.4', '2.0']
    """
    lines = []
    for key, group in rows.groupby(list(index), sort=False):
        cells = [str(k) for k in key]
        for column, (_, style) in columns.items():
            values = group[column].dropna()
            cells.append("-" if values.empty else format(values.mean(), style))
            if values.nunique() > 1:
                cells[-1] += f" ± {values.std():{style}}"
        lines.append(cells)
    return pd.DataFrame(lines, columns=[*index, *(heading for heading, _ in columns.values())])


def format_table(
    rows: pd.DataFrame, *, index: Sequence[str], columns: Mapping[str, tuple[str, str]]
) -> str:
    """A `summary_table` in markdown.

    Example:
        >>> rows = pd.DataFrame({"model": ["a", "a", "b"], "mse": [1.0, 3.0, 2.0]})
        >>> print(format_table(rows, index=["model"], columns={"mse": ("MSE", ".1f")}))
        | model | MSE |
        |---|--:|
        | a | 2.0 ± 1.4 |
        | b | 2.0 |
    """
    table = summary_table(rows, index=index, columns=columns)
    head, *lines = (f"| {' | '.join(cells)} |" for cells in [table.columns, *table.to_numpy()])
    aligned = "|" + "---|" * len(index) + "--:|" * len(columns)
    return "\n".join([head, aligned, *lines])


class Change(NamedTuple):
    """How a mean differs between two groups.

    Attributes:
        relative: of the means; negative is lower.
        p_value: of the two-sided paired t-test over seeds, NaN with fewer than three.
    """

    relative: float
    p_value: float

    def __str__(self) -> str:
        test = "" if math.isnan(self.p_value) else f" (p = {self.p_value:.2g})"
        return f"{self.relative:+.1%}{test}"


def paired_change(
    rows: pd.DataFrame, *, column: str, of: Mapping[str, Any], against: Mapping[str, Any]
) -> Change:
    """How much lower or higher a column is for one group than for another, seed by seed.

    Args:
        rows: one row a model and seed, with a column ``seed``.
        column: what to compare.
        of: column values that select the group.
        against: column values that select the one it is compared with.

    Raises:
        ValueError: if the groups do not have the same seeds.

    Example:
        >>> rows = pd.DataFrame({"m": ["a", "b"] * 2, "seed": [0, 0, 1, 1], "e": [2.0, 1, 2, 1]})
        >>> print(paired_change(rows, column="e", of={"m": "b"}, against={"m": "a"}))
        -50.0%
    """
    mine, other = (
        rows[(rows[list(group)] == pd.Series(dict(group))).all(axis=1)]
        .set_index("seed")[column]
        .sort_index()
        for group in (of, against)
    )
    if mine.empty or list(mine.index) != list(other.index):
        raise ValueError(
            f"`rows` has the seeds {list(mine.index)} for {dict(of)} and {list(other.index)} for "
            f"{dict(against)}: expected the same, at least one."
        )
    p_value = float(scipy.stats.ttest_rel(mine, other).pvalue) if len(mine) >= 3 else math.nan
    return Change(float(mine.mean() / other.mean() - 1), p_value)
