"""Students that are rolled out: what each objective is worth, on labels alone and with a teacher.

The Kuramoto-Sivashinsky equation, as APEBench simulates it, on a length of 48 with a step of 0.5.
The teacher is trained on 50 trajectories of 50 steps; of six, with and without weights by inverse
energy and with three sizes of input noise, the one of the longest correlation time on 20 validation
trajectories is taken. Students of a quarter of its parameters have one of these trajectories, and
the same steps and batches; they are rolled out for 250 steps from 100 unseen states. The floor of
their weights by inverse energy is chosen on validation too, for the first seed. The data are
simulated once and kept in ``--cache``; rows are appended as they come, and the same command goes on
where it was stopped.

    pip install '.[benchmarks]'
    python benchmarks/rollouts.py                 # one core, about 25 minutes

Bar: a distilled student's correlation time is 20 % above that of the best arm on labels alone, its
spectrum error at most half of that arm's, and none of its roll-outs diverges.
"""

import argparse
import sys
import time
from collections.abc import Callable
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
from sdkd_plugin.report import (
    command_line_errors,
    format_table,
    paired_change,
    parameter_count,
    rollout_scores,
)
from sdkd_plugin.rollouts import Unrolled, rollout

POINTS, ROLLED, TEACHER_STEPS, STEPS, NOISE, KD_WEIGHT = 96, 3, 3200, 4000, 0.01, 10.0
KEY = ["arm", "seed", "steps"]
SCENARIO = {"domain_extent": 48.0, "num_points": POINTS, "dt": 0.5, "num_substeps": 5}
SCENARIO |= {"convection_coef": 1.0, "diffusion_coef": -1.0, "hyp_diffusion_coef": -1.0}
SCENARIO |= {"num_test_samples": 120, "test_temporal_horizon": 250}
TRANSFORM, BANDS = GridTransform((POINTS,)), Bands.equal(POINTS // 2)
FLOORS = {f"labels: inverse energy, floor {f:g}": f for f in (1e-2, 1e-3, 1e-4)}
LABELS = ("one step", "input noise", "unrolled", "unrolled without gradient")
PLAIN = "distilled: one step"
DISTILLED = (PLAIN, *(f"distilled: {k}" for k in ("input noise", "on-policy", "on-policy, noise")))
SPECTRAL = "distilled: inverse energy"
TEACHERS = {
    f"teacher, floor {f}, noise {n}": (f, n) for f in (None, 1e-2) for n in (1e-3, 3e-3, 1e-2)
}
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
    share, size = TEACHERS.get(arm, (None, NOISE if "noise" in arm else 0.0))
    if "inverse" in arm:
        share = FLOORS[arm if arm in FLOORS else floor]
    weights = (1.0,) * BANDS.n_bands
    if share is not None:
        weights = inverse_energy_weights(y, TRANSFORM, BANDS, floor=share)
    error = SpectralLoss(TRANSFORM, BANDS, weights)
    noise = GaussianNoise(size, generator) if size else nn.Identity()
    if arm.startswith("distilled"):
        on_policy = OnPolicy(model, 8, states=y, generator=generator)
        moved = on_policy if "policy" in arm else nn.Identity()
        options: dict[str, Any] = {"weighting": weights, "task_loss": error, "kd_weight": KD_WEIGHT}
        if "policy" in arm or size:
            options["augmentation"] = lambda x: noise(moved(x))
        step = SDKDDistiller(teacher, model, TRANSFORM, BANDS, **options).step
        return lambda truth: step(truth[:, 0], truth[:, 1]).total
    if "unrolled" in arm:
        rolled = Unrolled(model, ROLLED, through_time="without" not in arm)
        return lambda truth: F.mse_loss(rolled(truth[:, 0]), truth[:, 1:].flatten(1, 2))
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


def best_teacher(data: Tensor, validation: Tensor, cache: Path) -> nn.Module:
    """The candidate of the longest correlation time on validation, if none of it diverged."""
    found = {}
    for arm in TEACHERS:
        model, kept = Net(48, 0), cache / f"{arm.replace(' ', '_')}.safetensors"
        if not kept.exists():
            loss = loss_of(arm, model, model, "", data[:, 1:].flatten(0, 1), 0)
            train(model, loss, data, 0, TEACHER_STEPS)
            save_file(model.state_dict(), kept)
        model.load_state_dict(load_file(kept))
        of = scores(model, validation)
        found[-of["diverged"], of["correlation_time"]] = model
    return found[max(found)]


def run(seeds: int, steps: int, cache: Path, file: Path) -> pd.DataFrame:
    """Train and score what is missing in the CSV, and return all rows of these steps."""
    data, test = simulated(cache / "ks.npz")
    teacher, given = best_teacher(data, test[:20], cache), data[:1]
    y = given[:, 1:].flatten(0, 1)
    rows = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEY)
    for seed in range(seeds):
        floors = [*FLOORS]
        for arm in ["teacher", *(f"labels: {k}" for k in LABELS), *DISTILLED, *FLOORS, SPECTRAL]:
            if arm == SPECTRAL or (seed and arm in FLOORS):
                first = rows[(rows.seed == 0) & (rows.steps == steps)].set_index("arm")
                times = first.validation_correlation_time
                floors = [max(FLOORS, key=lambda name: times[name])]
            key: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps}
            if arm == "teacher":
                key |= {"seed": 0, "steps": TEACHER_STEPS}
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
    return rows[(rows.steps == steps) | (rows.arm == "teacher")]


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


def picture(rows: pd.DataFrame) -> Figure:
    """Correlation time against spectrum error; a point a seed."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for arm, group in rows.groupby("arm", sort=False):
        marker = "*" if arm == "teacher" else "o"
        filled = "full" if str(arm).startswith("distilled") else "none"
        given = group.log_spectrum_error, group.correlation_time
        axis.plot(*given, marker, fillstyle=filled, label=str(arm))
    axis.set(xlabel="log spectrum error", ylabel="correlation time / steps", xscale="log")
    axis.legend(fontsize=6)
    return figure


def main() -> None:
    """Read the command line, run what is missing, write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a student (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("runs/rollouts"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    stem = RESULTS / "rollouts"
    with command_line_errors(parser.prog):
        rows = run(options.seeds, options.steps, options.cache, stem.with_suffix(".csv"))
    met = verdicts(rows)
    lines = [f"- {'met' if ok else 'MISSED'}: {bar}" for bar, ok in met.items()]
    table = format_table(rows, index=["arm", "steps"], columns=COLUMNS)
    text = f"{__doc__.split(chr(10) * 2)[1]}\n\n{table}\n\n" + "\n".join(lines) + "\n"
    write_record(stem, text, pd.read_csv(stem.with_suffix(".csv")))
    picture(rows).savefig(stem.with_suffix(".png"), dpi=120)
    print(text)
    sys.exit(not all(met.values()))


if __name__ == "__main__":
    main()
