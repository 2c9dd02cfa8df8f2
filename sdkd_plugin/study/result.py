"""What a study found: rows, a table with paired comparisons, models and figures."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from sdkd_plugin._checks import check_choice
from sdkd_plugin._files import atomic_path
from sdkd_plugin.report import Change, format_table, paired_change
from sdkd_plugin.study.page import study_figures, study_page
from sdkd_plugin.study.task import Arm, Task
from sdkd_plugin.study.training import Training

HEADINGS = {"mse": "MSE", "mae": "MAE", "relative_l2": "relative L2"}


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of a `study`.

    Attributes:
        task: what was forecast.
        rows: one for each baseline, teacher, arm and seed: scores on the test samples in physical
            units, the validation error, steps, costs and the machine.
        trainings: one an arm, in the order of the table.
        teachers: frozen, by name.
        seeds: of every arm.
    """

    task: Task
    rows: pd.DataFrame
    trainings: Sequence[Training]
    teachers: Mapping[str, nn.Module]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        taken = self.rows[["steps", "candidates"]].dropna().drop_duplicates().to_numpy().tolist()
        recipe = self.trainings[0].recipe
        if taken != [[recipe.steps, recipe.validations]]:
            raise RuntimeError(f"the arms took unequal steps and validations: {taken}.")

    @property
    def arms(self) -> list[Arm]:
        """In the order of the table."""
        return [training.arm for training in self.trainings]

    def change(self, of: str, against: str, *, setting: str | None = None) -> Change:
        """How much lower or higher the task's measure is for one arm than for another.

        Args:
            of: name of an arm.
            against: name of the arm that it is compared with, seed by seed.
            setting: as in the rows; by default that of the first arm.

        Raises:
            ValueError: if an arm is not there.
        """
        rows = self.rows[self.rows.setting == (setting or self.arms[0].setting)]
        groups = {"of": {"model": of}, "against": {"model": against}}
        return paired_change(rows, column=self.task.measure, **groups)

    def table(self) -> str:
        """Means ± deviations over seeds, and each arm against the first two and its base."""
        return format_table(**self.columns())

    def columns(self) -> dict[str, Any]:
        """What `summary_table` shows of this study: rows, index and columns."""
        measure, rows = self.task.measure, self.rows.copy()
        index = ["setting", "model"] if len({arm.setting for arm in self.arms}) > 1 else ["model"]
        first = self.names()[:2] if len(self.names()) > 1 else []
        bases = {name: dict.fromkeys(rows.model, name) for name in first}
        if own := {arm.name: arm.base for arm in self.arms if arm.base}:
            bases["its base"] = own
        for name, base_of in bases.items():
            index.append(f"{HEADINGS.get(measure, measure)} against {name}")
            of = (base_of.get(model, "") for model in rows.model)
            rows[index[-1]] = list(map(self._compared, rows.model, of, rows.setting))
        shown = dict.fromkeys([measure, *self.task.scores(self.task.test.y)])
        columns = {name: (HEADINGS.get(name, name), _style(rows[name])) for name in shown}
        columns |= {"parameters": ("parameters", ",.0f"), "milliseconds": ("ms", ".2f")}
        return {"rows": rows, "index": index, "columns": columns}

    def names(self, setting: str | None = None) -> list[str]:
        """The arms of a setting, or of all, in the order of the table."""
        return list(dict.fromkeys(a.name for a in self.arms if setting in (None, a.setting)))

    def _compared(self, model: str, base: str, setting: str) -> str:
        there = self.names(setting)
        later = base in there and model in there[there.index(base) + 1 :]
        return str(self.change(model, base, setting=setting)) if later else "-"

    def report(self) -> str:
        """The protocol in words, and the table."""
        return f"{self.protocol()}\n\n{self.table()}\n"

    def protocol(self) -> str:
        """Data, splits, training and test in words."""
        task, recipe = self.task, self.trainings[0].recipe
        best = self.rows.groupby("model").validation.mean().idxmin()
        moved = f", moved by the symmetries of {task.symmetry.name}" if task.symmetry else ""
        return (
            f"{task.name}: {task.source}. {len(task.train)} samples for training, "
            f"{len(task.validation)} for validation, {len(task.test)} for the test. Mean over "
            f"{len(self.seeds)} seed(s) (± standard deviation) of errors on the test "
            f"samples in physical units. Every arm takes {recipe.steps} steps of batch "
            f"{recipe.batch_size}{moved} and keeps the best of {recipe.validations} validations. "
            f"Best arm on validation data: {best}. p: two-sided paired t-test over seeds. "
            "ms: one sample, comparable within this table."
        )

    def models(self, name: str, *, setting: str | None = None) -> list[nn.Module]:
        """The trained models of an arm, one a seed, in eval mode on the CPU.

        A ValueError if there is no such arm in the setting, by default that of the first arm.
        """
        names = self.names(setting := setting or self.arms[0].setting)
        check_choice("name", name, names)
        training = [t for t in self.trainings if t.arm.setting == setting][names.index(name)]
        return [training.model(seed) for seed in self.seeds]

    def figures(self) -> dict[str, Figure]:
        """Pictures of the first arm's setting, by name; see `sdkd_plugin.study.page`."""
        return study_figures(self)

    def page(self) -> str:
        """Protocol, table and pictures as one self-contained HTML page."""
        return study_page(self, self.figures())

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.html``, ``table.md``, ``results.csv`` and the figures into a folder."""
        figures = self.figures()
        texts = {"table.md": self.report(), "results.csv": self.rows.to_csv(index=False)}
        for name, text in {**texts, "report.html": study_page(self, figures)}.items():
            with atomic_path(Path(folder) / name) as path:
                path.write_text(text, encoding="utf-8")
        for name, figure in figures.items():
            with atomic_path(Path(folder) / f"{name}.png") as path:
                figure.savefig(path, dpi=120)


def _style(values: "pd.Series[float]") -> str:
    """A format with four digits for the least value."""
    least = values.abs().min()
    return f".{max(0, 3 - math.floor(math.log10(least)))}f" if least > 0 else ".4g"
