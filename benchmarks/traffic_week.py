"""One week of traffic, five seeds: baselines, teachers, and the student alone and distilled.

An hour of readings in, the next hour out. The mean forecast of all teachers, one a seed, teaches
the student. It has all readings, or those of a network that was set up lately: the last quarter of
the training period, which is all it sees, where the teachers know the whole.

    python benchmarks/traffic_week.py --data FOLDER   # with the Los-loop files

Rows and weights are kept in ``--out``, and the same command goes on where it was stopped. Exits
with 1 if the student is not small and fast, or SDKD makes it worse or nowhere better: see ``bars``.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _record import RESULTS, write_record
from torch import Tensor, nn

import sdkd_plugin.adapters.tsl  # noqa: F401 - so that tsl can be imported
from sdkd_plugin.models import GraphAlterNet, GraphMixer
from sdkd_plugin.report import command_line_errors, format_table, paired_change
from sdkd_plugin.study import Arm, Result, Samples, Task, standard_arms, study, traffic_task

from tsl.nn.models import GRUGCNModel  # isort: skip

STEPS_A_DAY, FRAMES = 288, 12
TEACHER, STUDENT = "teacher, one", "student"
ALONE, PLAIN, SDKD = (arm.name for arm in standard_arms())
ALL, YOUNG = "all readings", "the last quarter of the readings"
BATCHES: dict[str, Any] = {"batch_size": 32, "validations": 15, "weight_decay": 1e-3, "clip": 5.0}


class Linear(nn.Module):
    """One linear map, without a graph, from a sensor's window and the time of day."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(FRAMES + 2, FRAMES)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Forecast, added to the last reading: ``(batch, horizon, nodes, 1)``."""
        day = u[:, -1:].expand(-1, x.shape[2], -1)
        change = self.map(torch.cat([(x - x[:, -1:])[..., 0].mT, day], dim=-1))
        return x[:, -1:] + change.mT[..., None]


def plans(n_nodes: int) -> dict[str, tuple[Callable[[], nn.Module], int, float, int]]:
    """How a model is made, its steps (44 are an epoch), its learning rate, and the most seeds."""
    sizes: dict[str, Any] = {"input_size": 1, "horizon": FRAMES, "exog_size": 2}
    ours = {**sizes, "n_nodes": n_nodes, "window": FRAMES}
    gru = {**sizes, "output_size": 1, "hidden_size": 64, "enc_layers": 1, "gcn_layers": 2}
    return {
        "linear, graph-free": (Linear, 880, 3e-3, 5),
        "GRU-GCN (tsl)": (partial(GRUGCNModel, **gru), 880, 3e-3, 2),
        TEACHER: (partial(GraphAlterNet, patch_size=12, **ours), 880, 4e-3, 5),
        STUDENT: (partial(GraphMixer, **ours), 3960, 5e-3, 5),
    }


def historical_average(train: Samples, samples: Samples) -> Tensor:
    """The sensor's mean at that time of the day over the targets of training."""
    clocks = (part.inputs["u"][:, -1] for part in (train, samples))
    days = (torch.atan2(*u.unbind(1)) / (2 * torch.pi) % 1 for u in clocks)
    known, wanted = ((STEPS_A_DAY * day).round().long() % STEPS_A_DAY for day in days)
    mask = torch.ones_like(train.y) if train.mask is None else train.mask.to(train.y)
    zero = train.y.new_zeros(STEPS_A_DAY, *train.y.shape[1:])
    total, count = (zero.index_add(0, known, values) for values in (train.y * mask, mask))
    return (total / count.clamp(min=1))[wanted]  # of times without a reading: the mean of all


def errors(at: Mapping[str, int], forecast: Tensor, truth: Samples) -> dict[str, float]:
    """RMSE and MAPE (%) of the observed readings, over the horizon and at its steps."""
    scores: dict[str, float] = {}
    for name, step in [("", slice(None)), *((f"_{k}", slice(i, i + 1)) for k, i in at.items())]:
        seen = ... if truth.mask is None else truth.mask[:, step]
        y, error = truth.y[:, step][seen], (forecast - truth.y)[:, step][seen]
        scores[f"rmse{name}"] = float(error.square().mean().sqrt())
        scores[f"mape{name}"] = float(100 * (error / y).abs().mean())
    return scores


def run(options: argparse.Namespace) -> tuple[pd.DataFrame, str, list[str]]:
    """All rows, the report, and the bars that were missed."""
    task = traffic_task(options.data)
    old, more = task.baselines, {"historical average": partial(historical_average, task.train)}
    task = replace(task, baselines={**old, **more}, extra_scores=partial(errors, task.at))
    plan = plans(task.train.x.shape[2])

    def train(name: str, of: Task = task, **teaching: Any) -> Result:
        make, steps, lr, most_seeds = plan[name]
        recipe = {"steps": steps, "lr": lr, "seeds": min(options.seeds, most_seeds), **BATCHES}
        recipe |= {"folder": options.out, "jobs": options.jobs, "arms": [Arm(name, kd_weight=0)]}
        return study(of, student=make, **(recipe | teaching))

    others = {name: train(name) for name in plan if name != STUDENT}
    teach = partial(train, STUDENT, teacher=others[TEACHER].models(TEACHER))
    young = replace(task, train=task.train.select(slice(-(len(task.train) // 4), None)))
    result, later = teach(arms=standard_arms()), teach(young, arms=standard_arms())
    fixed = result.rows[(result.rows.setting == "-") & ~result.rows.model.str.match(r"teacher \d")]
    rows = pd.concat(
        [each.rows[each.rows.model == name].assign(setting="-") for name, each in others.items()]
        + [fixed]
        + [
            each.rows[each.rows.setting != "-"].assign(setting=name)
            for name, each in ((ALL, result), (YOUNG, later))
        ]
    )
    columns = {
        f"{score}{at}": (f"{score}{at}".upper().replace("_", " "), style)
        for at in ("", *(f"_{minutes}" for minutes in task.at))
        for score, style in {"mae": ".3f", "rmse": ".2f", "mape": ".2f"}.items()
    } | {"parameters": ("parameters", ",.0f"), "milliseconds": ("ms", ".2f")}
    cost = rows.groupby("model")[["parameters", "milliseconds"]].mean().astype(float)
    changes = {
        (name, of, against): paired_change(
            rows[rows.setting == name],
            column="mae",
            of={"model": of},
            against={"model": against},
        )
        for name in (ALL, YOUNG)
        for against, of in combinations((ALONE, PLAIN, SDKD), 2)
    }
    gains = [change for (_, *pair), change in changes.items() if pair == [SDKD, ALONE]]
    best = rows[rows.setting == ALL].groupby("model").mae.mean().drop(ALONE).min()
    bars = {
        "a fifth of the parameters": cost.parameters[ALONE] <= 0.2 * cost.parameters[TEACHER],
        "five times as fast": cost.milliseconds[ALONE] <= 0.2 * cost.milliseconds[TEACHER],
        "a distilled student with all readings at most 3.40 MAE": best <= 3.4,
        "SDKD is worse in no setting": max(gain.relative for gain in gains) <= 0,
        "SDKD is better in one (p < 0.05)": any(x < 0 and p < 0.05 for x, p in gains),
    }
    text = [
        f"{result.report().splitlines()[0]} MAPE in %. Steps of the others: "
        f"{', '.join(f'{k} {plan[k][1]}' for k in others)}. {len(result.teachers)} teachers. "
        f"{YOUNG[0].upper()}{YOUNG[1:]}: {len(young.train)} samples for training.\n",
        format_table(rows, index=["setting", "model"], columns=columns) + "\n",
        *(f"- {s}: {of} against {other}: MAE {c}" for (s, of, other), c in changes.items()),
    ]
    return rows, "\n".join(text) + "\n", [bar for bar, met in bars.items() if not met]


def main() -> None:
    """Read the command line, run what is missing, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the Los-loop files")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default: 5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/traffic_week"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with command_line_errors(parser.prog):
        rows, text, missed = run(options)
        write_record(options.results / "traffic_week", text, rows)
        print(text)
    sys.exit("\n".join(f"missed: {bar}" for bar in missed) or 0)


if __name__ == "__main__":
    main()
