"""Students that are rolled out: what each objective is worth, on labels alone and with a teacher.

The Kuramoto-Sivashinsky equation, as APEBench simulates it, on a length of 48 with a step of 0.5.
The teacher is trained on 50 trajectories of 50 steps, with weights by inverse energy and slight
input noise. Students of one size have 5 of these trajectories, or 1, and the same steps and
batches; they are rolled out for 250 steps from 100 unseen states. The floor of their weights is
chosen by the correlation time on 20 other trajectories, for the first seed. The data are simulated
once and kept in ``--cache``; rows are appended as they come, and the same command goes on where it
was stopped.

    pip install '.[benchmarks]'
    python benchmarks/rollouts.py                 # one core, about 15 minutes

Bar: a distilled student's correlation time is 20 % above that of the best arm on labels alone, its
spectrum error at most half of that arm's, and none of its roll-outs diverges.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
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
from sdkd_plugin.report import command_line_errors, format_table, parameter_count, rollout_scores
from sdkd_plugin.rollouts import Unrolled, rollout

POINTS, ROLLED, TEACHER_STEPS = 96, 3, 3200
SETTINGS = ((5, 800), (1, 2000))
"""Labelled trajectories and training steps of the students."""

KEY = ["labelled", "steps", "arm", "seed"]
SCENARIO = {"domain_extent": 48.0, "num_points": POINTS, "dt": 0.5, "num_substeps": 5}
SCENARIO |= {"convection_coef": 1.0, "diffusion_coef": -1.0, "hyp_diffusion_coef": -1.0}
SCENARIO |= {"num_test_samples": 120, "test_temporal_horizon": 250}
TRANSFORM, BANDS = GridTransform((POINTS,)), Bands.equal(POINTS // 2)
FLOORS = {f"labels: inverse energy, floor {f:g}": f for f in (1e-2, 1e-3, 1e-4)}
LABELS = ("one step", "input noise", "unrolled", "unrolled without gradient")
PLAIN, ON_POLICY = "distilled: plain", "distilled: on-policy"
OURS = ("distilled: inverse energy", "distilled: inverse energy, on-policy")
COLUMNS = {
    "correlation_time": ("correlation time / steps", ".1f"),
    "log_spectrum_error": ("log spectrum error", ".3f"),
    "diverged": ("diverged of 100", ".1f"),
    "one_step": ("nRMSE of one step", ".5f"),
}


class Net(nn.Module):
    """A residual network of five periodic convolutions with kernels of five points."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        hidden = [m for _ in range(3) for m in (nn.Conv1d(width, width, 5), nn.GELU())]
        self.net = nn.Sequential(nn.Conv1d(1, width, 5), nn.GELU(), *hidden, nn.Conv1d(width, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        """The next state."""
        return x + self.net(F.pad(x, (10, 10), mode="circular"))


def simulated(file: Path) -> tuple[Tensor, Tensor]:
    """Trajectories to train on and to test, ``(samples, steps, 1, POINTS)``, scaled by training."""
    if not file.exists():
        from apebench import scenarios

        made = scenarios.scenario_dict["phy_ks_cons"](**SCENARIO)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, train=made.get_train_data(), test=made.get_test_data())
    kept = np.load(file)
    train, test = (torch.from_numpy(kept[part]) for part in ("train", "test"))
    return train / train.std(), test / train.std()


def loss_of(
    arm: str, model: nn.Module, teacher: nn.Module, floor: str, y: Tensor, seed: int
) -> Callable[[Tensor], Tensor]:
    """The loss of an arm, of windows ``(batch, 1 + ROLLED, 1, POINTS)`` of the truth.

    ``floor`` names the arm whose weights the distilled students take, ``y`` is all labels.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = (1.0,) * BANDS.n_bands
    if "inverse" in arm or arm == "teacher":
        share = FLOORS[arm if arm in FLOORS else floor]
        weights = inverse_energy_weights(y, TRANSFORM, BANDS, floor=share)
    error = SpectralLoss(TRANSFORM, BANDS, weights)
    if arm.startswith("distilled"):
        options: dict[str, Any] = {"weighting": weights, "task_loss": error}
        if "policy" in arm:
            options["augmentation"] = OnPolicy(model, 16, states=y, generator=generator)
        step = SDKDDistiller(teacher, model, TRANSFORM, BANDS, **options).step
        return lambda truth: step(truth[:, 0], truth[:, 1]).total
    if "unrolled" in arm:
        rolled = Unrolled(model, ROLLED, through_time="without" not in arm)
        return lambda truth: F.mse_loss(rolled(truth[:, 0]), truth[:, 1:].flatten(1, 2))
    noise: Callable[[Tensor], Tensor] = nn.Identity()
    if "noise" in arm or arm == "teacher":
        noise = GaussianNoise(0.01 if "noise" in arm else 0.001, generator)
    return lambda truth: error(model(noise(truth[:, 0])), truth[:, 1]).mean()


def train(
    model: nn.Module, loss: Callable[[Tensor], Tensor], data: Tensor, seed: int, steps: int
) -> None:
    """Adam with one cycle of the learning rate; the same batches for every arm."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    windows = torch.stack([data[:, i : i - ROLLED or None] for i in range(ROLLED + 1)], 2)
    windows, generator = windows.flatten(0, 1), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(windows[torch.randint(len(windows), (16,), generator=generator)]).backward()
        optimizer.step()
        cycle.step()


def scores(model: nn.Module, truth: Tensor) -> dict[str, float]:
    """Of roll-outs from the first states of trajectories, and of one step from a state each."""
    with torch.no_grad():
        forecast = rollout(model.eval(), truth[:, 0], truth.shape[1] - 1)
        one, y = model(truth[:, -2]), truth[:, -1]
    found = rollout_scores(forecast, truth[:, 1:], TRANSFORM, Bands.split(0.3))
    return {**found, "one_step": float((one - y).norm() / y.norm())}


def run(seeds: int, cache: Path, file: Path) -> pd.DataFrame:
    """Train and score what is missing in the CSV, and return all rows."""
    data, test = simulated(cache / "ks.npz")
    teacher, kept = Net(48, 0), cache / "ks_teacher.safetensors"
    if not kept.exists():
        every = data[:, 1:].flatten(0, 1)
        loss = loss_of("teacher", teacher, teacher, next(iter(FLOORS)), every, 0)
        train(teacher, loss, data, 0, TEACHER_STEPS)
        save_file(teacher.state_dict(), kept)
    teacher.load_state_dict(load_file(kept))
    rows = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEY)
    for seed, (labelled, steps) in product(range(seeds), SETTINGS):
        given = data[:labelled]
        y = given[:, 1:].flatten(0, 1)
        floors = [*FLOORS]
        alone = [f"labels: {name}" for name in LABELS]
        for arm in ["teacher", *alone, ON_POLICY, *FLOORS, PLAIN, *OURS]:
            if arm == PLAIN or (seed and arm in FLOORS):
                first = rows[(rows.seed == 0) & (rows.labelled == labelled)].set_index("arm")
                times = first.validation_correlation_time
                floors = [max(FLOORS, key=lambda name: times[name])]
            key: dict[str, Any] = {"labelled": labelled, "steps": steps, "arm": arm, "seed": seed}
            if arm == "teacher":
                key |= {"labelled": len(data), "steps": TEACHER_STEPS, "seed": 0}
            if (rows[KEY] == pd.Series(key)).all(axis=1).any() or arm in {*FLOORS} - {*floors}:
                continue
            start, model = time.process_time(), teacher if arm == "teacher" else Net(24, seed)
            if arm != "teacher":
                loss = loss_of(arm, model, teacher, floors[0], y, seed)
                train(model, loss, given, seed, steps)
            row = {**key, **scores(model, test[20:])}
            row |= {"validation_correlation_time": scores(model, test[:20])["correlation_time"]}
            row |= {"parameters": parameter_count(model)}
            row |= {"cpu_seconds": time.process_time() - start, **environment(torch.device("cpu"))}
            append_rows(file, [row])
            rows = pd.read_csv(file)
            print({name: row[name] for name in (*KEY, *COLUMNS)}, flush=True)
    return rows


def missed(rows: pd.DataFrame) -> list[str]:
    """The bars that are missed."""
    found = []
    for labelled, group in rows[rows.arm != "teacher"].groupby("labelled"):
        means = group.groupby("arm")[list(COLUMNS)].mean().sort_values("correlation_time")
        alone = means[means.index.str.startswith("labels")].iloc[-1]
        best = means[means.index.isin((ON_POLICY, *OURS))].iloc[-1]
        bars = {
            "20 % longer": best.correlation_time >= 1.2 * alone.correlation_time,
            "half the spectrum error": best.log_spectrum_error <= 0.5 * alone.log_spectrum_error,
            "none diverged": best.diverged == 0,
        }
        found += [f"{labelled} trajectories: {bar}" for bar, met in bars.items() if not met]
    return found


def picture(rows: pd.DataFrame) -> Figure:
    """Correlation time against spectrum error; a point a seed."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for (labelled, arm), group in rows.groupby(["labelled", "arm"], sort=False):
        marker = "*" if arm == "teacher" else "o"
        filled = "full" if str(arm).startswith("distilled") else "none"
        given = group.log_spectrum_error, group.correlation_time
        axis.plot(*given, marker, fillstyle=filled, label=f"{arm} ({labelled})")
    axis.set(xlabel="log spectrum error", ylabel="correlation time / steps", xscale="log")
    axis.legend(fontsize=6)
    return figure


def main() -> None:
    """Read the command line, run what is missing, write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--cache", type=Path, default=Path("runs/rollouts"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    stem = RESULTS / "rollouts"
    with command_line_errors(parser.prog):
        rows = run(options.seeds, options.cache, stem.with_suffix(".csv"))
        write_record(stem, format_table(rows, index=KEY[:3], columns=COLUMNS) + "\n", rows)
        picture(rows).savefig(stem.with_suffix(".png"), dpi=120)
    sys.exit("\n".join(f"missed: {bar}" for bar in missed(rows)) or 0)


if __name__ == "__main__":
    main()
