"""Students that are rolled out: what each objective is worth, on labels alone and with a teacher.

The teacher is trained on 50 trajectories of APEBench; of the candidates that diverge least on 20
validation trajectories the one of the longest correlation time is taken. Students have the first
labelled steps of one of these trajectories, twelve unless ``--labels`` has other numbers, and as
many steps of batches of one size; a step of distillation takes longer. They are rolled out from 100
unseen states. The floor of their weights by inverse energy is chosen on validation too, for the
first seed. Arms and settings were fixed on trajectories of another test seed; the test is opened
once. "All labels" is what two arms on labels reach with all that the teacher had.

The data are simulated once and kept in ``--cache``; rows are appended as they come, and the same
command goes on where it was stopped. The flow is the one-dimensional Kuramoto-Sivashinsky equation
or the two-dimensional Kolmogorov flow.

    pip install '.[benchmarks]'
    python benchmarks/rollouts.py                 # one core, about 25 minutes
    python benchmarks/rollouts.py kolmogorov      # about 50 minutes

Bar: the correlation time of the best distilled arm, by validation, is 20 % above that of the best
arm on labels alone, its spectrum error at most half of that arm's, and no roll-out of it diverges.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from _record import RESULTS, append_rows, environment, write_record
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdkd_plugin import (
    Bands,
    GaussianNoise,
    GridTransform,
    OnPolicy,
    SDKDDistiller,
    SpectralLoss,
    inverse_energy_weights,
)
from sdkd_plugin.data import apebench_trajectories
from sdkd_plugin.report import (
    command_line_errors,
    format_table,
    paired_change,
    parameter_count,
    rollout_scores,
)
from sdkd_plugin.rollouts import Unrolled, rollout

ROLLED, NOISE, KD_WEIGHT, VALIDATION = 3, 0.01, 10.0, 20
LABELS, REFERENCES = (12,), ("teacher", "all labels: input noise", "all labels: unrolled")
KEY = ["arm", "seed", "steps", "labels"]


@dataclass(frozen=True)
class Flow:
    """A flow of APEBench, and what is trained on it."""

    text: str
    scenario: str
    options: dict[str, Any]
    bins: int
    kernel: int
    dilations: tuple[int, ...]
    widths: tuple[int, int]  # of teacher and student, as the next ones
    steps: tuple[int, int]
    batch: int
    teachers: Mapping[str, float]  # size of the input noise
    labels: tuple[str, ...]
    floors: tuple[float, ...]
    distilled: tuple[str, ...]

    @cached_property
    def transform(self) -> GridTransform:
        """The periodic domain."""
        return GridTransform((self.options["num_points"],) * int(self.scenario[0]))

    @cached_property
    def bands(self) -> Bands:
        """Those that weights by inverse energy are measured in."""
        return Bands.equal(self.bins)

    def net(self, seed: int, *, teacher: bool = False) -> nn.Module:
        """A new network."""
        torch.manual_seed(seed)
        dimensions, width = int(self.scenario[0]), self.widths[not teacher]
        return Net(dimensions, width, self.kernel, self.dilations)


KS = Flow(
    text="The Kuramoto-Sivashinsky equation on a length of 48 with a step of 0.5. Students of a "
    "quarter of the teacher's parameters are rolled out for 250 steps.",
    scenario="1d_phy_ks_cons",
    options={"domain_extent": 48.0, "num_points": 96, "dt": 0.5, "num_substeps": 5}
    | {"convection_coef": 1.0, "diffusion_coef": -1.0, "hyp_diffusion_coef": -1.0}
    | {"num_test_samples": 120, "test_temporal_horizon": 250, "test_seed": 2_000_000},
    bins=48,
    kernel=5,
    dilations=(1, 1, 1, 1, 1),
    widths=(48, 24),
    steps=(12_800, 4000),
    batch=16,
    teachers={f"teacher, noise {n}": n for n in (1e-3, 3e-3, 1e-2)},
    labels=("one step", "input noise", "unrolled", "unrolled, noise", "unrolled without gradient"),
    floors=(1e-2, 1e-3, 1e-4),
    distilled=("one step", "input noise", "on-policy", "on-policy, noise", "inverse energy"),
)
KOLMOGOROV = Flow(
    text="Kolmogorov flow, forced turbulence of vorticity on 32 x 32 points, with a viscosity of "
    "0.02 and a step of 0.5. Students of a quarter of the teacher's parameters are rolled out for "
    "60 steps.",
    scenario="2d_phy_kolm_flow",
    options={"num_points": 32, "dt": 0.5, "num_substeps": 20, "diffusivity": 0.02}
    | {"num_warmup_steps": 100, "num_test_samples": 120, "test_temporal_horizon": 60}
    | {"test_seed": 2_000_000},
    bins=16,
    kernel=3,
    dilations=(1, 2, 4, 2, 1),
    widths=(32, 16),
    steps=(6000, 4000),
    batch=4,
    teachers={f"teacher, noise {n}": n for n in (1e-3, 1e-2, 3e-2)},
    labels=("one step", "input noise", "unrolled", "unrolled, noise"),
    floors=(1e-2, 1e-3),
    distilled=("one step", "on-policy", "on-policy, inverse energy"),
)
FLOWS = {"ks": KS, "kolmogorov": KOLMOGOROV}
COLUMNS = {
    "correlation_time": ("correlation time / steps", ".1f"),
    "log_spectrum_error": ("log spectrum error", ".3f"),
    "diverged": ("diverged of 100", ".1f"),
    "one_step": ("nRMSE of one step", ".5f"),
    "cpu_seconds": ("training and scoring / s", ".0f"),
}


class Net(nn.Module):
    """A residual network of periodic convolutions."""

    def __init__(self, dimensions: int, width: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        conv: Any = partial(
            (nn.Conv1d, nn.Conv2d)[dimensions - 1],
            kernel_size=kernel,
            padding="same",
            padding_mode="circular",
        )
        first, *inner, last = dilations
        hidden = [m for d in inner for m in (conv(width, width, dilation=d), nn.GELU())]
        ends = conv(1, width, dilation=first), conv(width, 1, dilation=last)
        self.net = nn.Sequential(ends[0], nn.GELU(), *hidden, ends[1])

    def forward(self, x: Tensor) -> Tensor:
        """The next state."""
        return x + self.net(x)


def steps_in_a_row(arm: str) -> int:
    """Steps in a row that an arm is trained for."""
    return ROLLED if "unrolled" in arm else 1


def simulated(flow: Flow, cache: Path) -> tuple[Tensor, Tensor]:
    """Trajectories to train on and to test, scaled by training."""
    train, test = apebench_trajectories(flow.scenario, folder=cache, **flow.options)
    return train / train.std(), test / train.std()


def loss_of(
    flow: Flow,
    arm: str,
    model: nn.Module,
    teacher: nn.Module,
    floor: float | None,
    y: Tensor,
    seed: int,
) -> Callable[[Tensor], Tensor]:
    """The loss of an arm, of windows ``(batch, 1 + rolled, 1, ...)`` of the truth.

    ``floor`` is that of weights by inverse energy, where the arm has them; ``y`` is all labels.
    """
    generator = torch.Generator().manual_seed(seed)
    size = flow.teachers.get(arm, NOISE if "noise" in arm else 0.0)
    weights = (1.0,) * flow.bands.n_bands
    if floor is not None:
        weights = inverse_energy_weights(y, flow.transform, flow.bands, floor=floor)
    error = SpectralLoss(flow.transform, flow.bands, weights)
    noise = GaussianNoise(size, generator) if size else nn.Identity()
    if arm.startswith("distilled"):
        on_policy = OnPolicy(model, 8, states=y, generator=generator)
        moved = on_policy if "policy" in arm else nn.Identity()
        options: dict[str, Any] = {"weighting": weights, "task_loss": error, "kd_weight": KD_WEIGHT}
        if "policy" in arm or size:
            options["augmentation"] = lambda x: noise(moved(x))
        step = SDKDDistiller(teacher, model, flow.transform, flow.bands, **options).step
        return lambda truth: step(truth[:, 0], truth[:, 1]).total
    if "unrolled" in arm:
        unrolled = Unrolled(model, ROLLED, through_time="without" not in arm)
        return lambda truth: F.mse_loss(unrolled(noise(truth[:, 0])), truth[:, 1:].flatten(1, 2))
    return lambda truth: error(model(noise(truth[:, 0])), truth[:, 1]).mean()


def train(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    data: Tensor,
    *,
    rolled: int,
    seed: int,
    steps: int,
    batch: int,
) -> None:
    """Adam with one cycle of the learning rate, on random windows of ``1 + rolled`` frames."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    windows = torch.stack([data[:, i : i - rolled or None] for i in range(rolled + 1)], 2)
    windows, generator = windows.flatten(0, 1), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(windows[torch.randint(len(windows), (batch,), generator=generator)]).backward()
        optimizer.step()
        cycle.step()


def scores(flow: Flow, model: nn.Module, truth: Tensor) -> dict[str, float]:
    """Of roll-outs from the first states of trajectories, and of one step from a state each."""
    with torch.no_grad():
        forecast = rollout(model.eval(), truth[:, 0], truth.shape[1] - 1)
        one, y = model(truth[:, -2]), truth[:, -1]
    found = rollout_scores(forecast, truth[:, 1:], flow.transform, Bands.split(0.3))
    return {**found, "one_step": float((one - y).norm() / y.norm())}


def best_teacher(flow: Flow, data: Tensor, validation: Tensor, cache: Path) -> nn.Module:
    """Of the candidates that diverge least on validation, that of the longest correlation time."""
    found = {}
    for arm in flow.teachers:
        model = flow.net(0, teacher=True)
        kept = cache / f"{flow.scenario}_{arm.replace(' ', '_')}_{flow.steps[0]}.safetensors"
        if not kept.exists():
            loss = loss_of(flow, arm, model, model, None, data[:, 1:].flatten(0, 1), 0)
            train(model, loss, data, rolled=1, seed=0, steps=flow.steps[0], batch=flow.batch)
            save_file(model.state_dict(), kept)
        model.load_state_dict(load_file(kept))
        of = scores(flow, model, validation)
        found[-of["diverged"], of["correlation_time"]] = model
    return found[max(found)]


def run(flow: Flow, labels: int, seeds: int, steps: int, cache: Path, file: Path) -> pd.DataFrame:
    """Train and score what is missing in the CSV, and return all rows of these labels and steps.

    `REFERENCES` have all labels, the teacher's.
    """
    data, test = simulated(flow, cache)
    validation, test = test.split([VALIDATION, len(test) - VALIDATION])
    teacher, given = best_teacher(flow, data, validation, cache), data[:1, : labels + 1]
    y = given[:, 1:].flatten(0, 1)
    floors = {f"labels: inverse energy, floor {f:g}": f for f in flow.floors}
    arms = [*REFERENCES, *(f"labels: {k}" for k in flow.labels), *floors]
    arms += [f"distilled: {k}" for k in flow.distilled]
    rows = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEY)
    for seed, arm in product(range(seeds), arms):
        floor = floors.get(arm)
        if "inverse" in arm and (floor is None or seed):
            same = (rows.steps == steps) & (rows.labels == labels)
            first = rows[same & (rows.seed == 0) & rows.arm.isin([*floors])]
            best = floors[str(first.set_index("arm").validation_correlation_time.idxmax())]
            if floor not in (None, best):
                continue
            floor = best
        key: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps, "labels": labels}
        if arm in REFERENCES:
            key["labels"] = len(data) * (data.shape[1] - 1)
        if arm == "teacher":
            key |= {"seed": 0, "steps": flow.steps[0]}
        if (rows[KEY] == pd.Series(key)).all(axis=1).any():
            continue
        start, model = time.process_time(), teacher if arm == "teacher" else flow.net(seed)
        if arm != "teacher":
            loss = loss_of(flow, arm, model, teacher, floor, y, seed)
            options = {"rolled": steps_in_a_row(arm), "seed": seed, "steps": steps}
            train(model, loss, data if arm in REFERENCES else given, batch=flow.batch, **options)
        row = {**key, **scores(flow, model, test)}
        of_validation = scores(flow, model, validation)["correlation_time"]
        row |= {"validation_correlation_time": of_validation, "parameters": parameter_count(model)}
        row |= {"cpu_seconds": time.process_time() - start, **environment(torch.device("cpu"))}
        append_rows(file, [row])
        rows = pd.read_csv(file)
        print({name: row[name] for name in (*KEY, *COLUMNS)}, flush=True)
    students = rows.steps.eq(steps) & (rows.labels.eq(labels) | rows.arm.isin(REFERENCES))
    return rows[students | rows.arm.eq("teacher")]


def verdicts(rows: pd.DataFrame) -> dict[str, bool]:
    """The best distilled arm by validation against the best on labels alone, and the bars."""
    by = "validation_correlation_time"
    means = rows.groupby("arm")[[*COLUMNS, by]].mean().sort_values(by)
    alone = means[means.index.str.startswith("labels")].iloc[-1]
    best = means[means.index.str.startswith("distilled")].iloc[-1]
    groups = {"of": {"arm": best.name}, "against": {"arm": alone.name}}
    gain = paired_change(rows, column="correlation_time", **groups)
    ratio = best.log_spectrum_error / alone.log_spectrum_error
    against = f"{best.name} against {alone.name}"
    return {
        f"correlation time, {against}: {gain}, asked +20 %": gain.relative >= 0.2,
        f"log spectrum error, {against}: {ratio:.2f} times, asked half": ratio <= 0.5,
        f"roll-outs of {best.name} that diverge: {best.diverged:.1f}, asked none": best.diverged
        == 0,
    }


def picture(found: Mapping[int, pd.DataFrame]) -> Figure:
    """Correlation time against spectrum error; a point a seed."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (labels, rows) in zip(panels, found.items(), strict=True):
        for arm, group in rows.groupby("arm", sort=False):
            marker = "*" if arm in REFERENCES else "o"
            filled = "full" if str(arm).startswith("distilled") else "none"
            given = group.log_spectrum_error, group.correlation_time
            axis.plot(*given, marker, fillstyle=filled, label=str(arm))
        axis.set(title=f"{labels} labels", xlabel="log spectrum error", xscale="log")
    panels[0].set(ylabel="correlation time / steps")
    panels[-1].legend(fontsize=6)
    return figure


def main() -> None:
    """Read the command line, run what is missing, write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flow", nargs="?", choices=FLOWS, default="ks", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--labels", type=int, nargs="+", default=LABELS, help="steps with labels")
    parser.add_argument("--steps", type=int, help="of a student, instead of the flow's")
    parser.add_argument("--cache", type=Path, default=Path("runs/rollouts"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    flow = FLOWS[options.flow]
    stem = RESULTS / ("rollouts" if flow is KS else f"rollouts_{options.flow}")
    given = options.seeds, options.steps or flow.steps[1], options.cache, stem.with_suffix(".csv")
    with command_line_errors(parser.prog):
        found = {labels: run(flow, labels, *given) for labels in options.labels}
    met = {
        f"{n} labels, {bar}": ok for n, rows in found.items() for bar, ok in verdicts(rows).items()
    }
    lines = [f"- {'met' if ok else 'MISSED'}: {bar}" for bar, ok in met.items()]
    rows = pd.concat(found.values()).drop_duplicates()
    table = format_table(rows, index=["labels", "arm"], columns=COLUMNS)
    about = f"{flow.text}\n\n{__doc__.split(chr(10) * 2)[1]}"
    text = f"{about}\n\n{table}\n\n" + "\n".join(lines) + "\n"
    write_record(stem, text, pd.read_csv(stem.with_suffix(".csv")))
    picture(found).savefig(stem.with_suffix(".png"), dpi=120)
    print(text)
    sys.exit(not all(met.values()))


if __name__ == "__main__":
    main()
