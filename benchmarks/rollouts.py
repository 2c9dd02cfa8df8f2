"""Students that are rolled out: what each objective is worth, on labels alone and with a teacher.

Two chaotic systems: APEBench's scenarios of the Kuramoto-Sivashinsky equation (1D) and of the
Kolmogorov flow (2D), with the coefficients below. Students of one size are trained with the same
steps and batches, and rolled out from 100 unseen states. The data are simulated once, with JAX on
the CPU, and kept in ``--cache``; rows are appended as they come, and the same command goes on where
it was stopped.

    pip install '.[benchmarks]'
    python benchmarks/rollouts.py                 # one core, about 20 minutes
    python benchmarks/rollouts.py --system flow

Bar: a distilled student's correlation time is 20 % above that of the best arm on labels alone, its
spectrum error at most half of that arm's, and none of its roll-outs diverges.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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

FLOORS, ROLLED = (1e-2, 1e-3, 1e-4), 3
LOW_AND_HIGH = Bands.split(0.3)
INVERSE = "labels: inverse energy, floor "
PLAIN, SPECTRAL = "distilled: plain", "distilled: inverse energy"
ON_POLICY = f"{SPECTRAL}, on-policy"
COLUMNS = {
    "correlation_time": ("correlation time / steps", ".1f"),
    "log_spectrum_error": ("log spectrum error", ".3f"),
    "diverged": ("diverged of 100", ".1f"),
    "one_step": ("nRMSE of one step", ".5f"),
}


class System(NamedTuple):
    """A scenario with its options, the horizon of roll-outs, and widths and steps of models."""

    scenario: str
    options: dict[str, Any]
    horizon: int
    teacher: int
    student: int
    steps: int
    lr: float = 3e-3
    batch: int = 16


KS = {"domain_extent": 48.0, "num_points": 96, "dt": 0.5, "num_substeps": 5}
KS |= {"convection_coef": 1.0, "diffusion_coef": -1.0, "hyp_diffusion_coef": -1.0}
SYSTEMS = {
    "ks": System("phy_ks_cons", KS, 250, teacher=48, student=24, steps=1200),
    "flow": System("phy_kolm_flow", {"num_points": 32}, 60, teacher=40, student=16, steps=1500),
}


class Net(nn.Module):
    """A residual network of five convolutions with kernels of five points, periodic."""

    def __init__(self, axes: int, width: int) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d)[axes - 1]
        hidden = [m for _ in range(3) for m in (conv(width, width, 5), nn.GELU())]
        self.net = nn.Sequential(conv(1, width, 5), nn.GELU(), *hidden, conv(width, 1, 5))
        self.pads = [10] * (2 * axes)

    def forward(self, x: Tensor) -> Tensor:
        """The next state."""
        return x + self.net(F.pad(x, self.pads, mode="circular"))


class Data(NamedTuple):
    """Trajectories ``(samples, steps, 1, *shape)``, scaled by the training deviation."""

    train: Tensor
    validation: Tensor
    test: Tensor


def simulated(name: str, system: System, cache: Path) -> Data:
    """50 trajectories of 50 steps to train on, 20 to validate and 100 to test, of the horizon."""
    file = cache / f"{name}.npz"
    if not file.exists():
        from apebench import scenarios

        sizes = {"num_test_samples": 120, "test_temporal_horizon": system.horizon}
        made = scenarios.scenario_dict[system.scenario](**system.options, **sizes)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, train=made.get_train_data(), test=made.get_test_data())
    kept = np.load(file)
    train, test = (torch.from_numpy(kept[part]) for part in ("train", "test"))
    scale = train.std()
    return Data(train / scale, test[:20] / scale, test[20:] / scale)


Loss = Callable[[nn.Module, Tensor], Tensor]
"""Of a model and windows ``(batch, 1 + ROLLED, 1, *shape)`` of the truth."""


def unrolled(model: nn.Module, truth: Tensor, *, through_time: bool) -> Tensor:
    """The MSE of a few steps in a row."""
    forecast = Unrolled(model, ROLLED, through_time=through_time)(truth[:, 0])
    return F.mse_loss(forecast, truth[:, 1:].flatten(1, 2))


def noisy(model: nn.Module, truth: Tensor, *, noise: GaussianNoise) -> Tensor:
    """The MSE of one step from a disturbed state."""
    return F.mse_loss(model(noise(truth[:, 0])), truth[:, 1])


def one_step(model: nn.Module, truth: Tensor, *, loss: Callable = F.mse_loss) -> Tensor:
    """A loss of one step."""
    return loss(model(truth[:, 0]), truth[:, 1]).mean()


def of_labels(spectral: dict[float, SpectralLoss], seed: int) -> dict[str, Loss]:
    """The arms on labels alone."""
    noise = GaussianNoise(0.01, torch.Generator().manual_seed(seed))
    return {
        "labels: one step": one_step,
        "labels: input noise": partial(noisy, noise=noise),
        "labels: unrolled": partial(unrolled, through_time=True),
        "labels: unrolled without gradient": partial(unrolled, through_time=False),
        **{f"{INVERSE}{f:g}": partial(one_step, loss=spectral[f]) for f in spectral},
    }


def train(model: nn.Module, loss: Loss, data: Tensor, system: System, seed: int) -> nn.Module:
    """Adam with one cycle of the learning rate; the same batches for every arm."""
    optimizer = torch.optim.Adam(model.parameters(), system.lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, system.lr, system.steps, pct_start=0.1)
    windows = torch.stack([data[:, i : i - ROLLED or None] for i in range(ROLLED + 1)], 2)
    windows, generator = windows.flatten(0, 1), torch.Generator().manual_seed(seed)
    for _ in range(system.steps):
        optimizer.zero_grad()
        rows = torch.randint(len(windows), (system.batch,), generator=generator)
        loss(model, windows[rows]).backward()
        optimizer.step()
        cycle.step()
    return model


def scores(model: nn.Module, truth: Tensor, transform: GridTransform) -> dict[str, float]:
    """Of roll-outs from the first states of trajectories, and of one step from a state each."""
    with torch.no_grad():
        forecast = rollout(model.eval(), truth[:, 0], truth.shape[1] - 1)
        one, y = model(truth[:, 100]), truth[:, 101]
    found = rollout_scores(forecast, truth[:, 1:], transform, LOW_AND_HIGH)
    return {**found, "one_step": float((one - y).norm() / y.norm())}


def run(name: str, seeds: int, cache: Path, results: Path) -> tuple[pd.DataFrame, list[str]]:
    """Train and score what is missing in the CSV; all rows, and the bars that are missed."""
    system, file = SYSTEMS[name], results / f"rollouts_{name}.csv"
    data = simulated(name, system, cache)
    transform = GridTransform(data.train.shape[3:])
    bands = Bands.equal(data.train.shape[-1] // 2)
    y = data.train[:, 1:].flatten(0, 1)
    weights = {f: inverse_energy_weights(y, transform, bands, floor=f) for f in FLOORS}
    spectral = {f: SpectralLoss(transform, bands, w) for f, w in weights.items()}

    def model(width: int, seed: int) -> Net:
        torch.manual_seed(seed)
        return Net(len(transform.shape), width)

    def done() -> pd.DataFrame:
        return pd.read_csv(file) if file.exists() else pd.DataFrame({"arm": [], "seed": []})

    def record(arm: str, seed: int, make: Callable[[], nn.Module]) -> None:
        if ((done().arm == arm) & (done().seed == seed)).any():
            return
        start = time.process_time()
        trained = make()
        row = {"arm": arm, "seed": seed, **scores(trained, data.test, transform)}
        chosen = scores(trained, data.validation, transform)["correlation_time"]
        row |= {"validation_correlation_time": chosen, "parameters": parameter_count(trained)}
        row |= {"cpu_seconds": time.process_time() - start, **environment(torch.device("cpu"))}
        append_rows(file, [row])
        print({k: row[k] for k in ("arm", "seed", *COLUMNS)}, flush=True)

    teacher, kept = model(system.teacher, 0), cache / f"{name}_teacher.safetensors"
    if not kept.exists():
        longer = system._replace(steps=3 * system.steps)
        train(teacher, partial(one_step, loss=spectral[min(FLOORS)]), data.train, longer, 0)
        save_file(teacher.state_dict(), kept)
    teacher.load_state_dict(load_file(kept))
    record("teacher", 0, lambda: teacher)

    def distilled(arm: str, floor: float, seed: int) -> nn.Module:
        student = model(system.student, seed)
        options: dict[str, Any] = {"weighting": [1.0] * bands.n_bands}
        if arm != PLAIN:
            options = {"weighting": weights[floor], "task_loss": spectral[floor]}
        if arm == ON_POLICY:
            random = torch.Generator().manual_seed(seed)
            options["augmentation"] = OnPolicy(student, 8, states=y, generator=random)
        step = SDKDDistiller(teacher, student, transform, bands, **options).step
        return train(
            student, lambda _, truth: step(truth[:, 0], truth[:, 1]).total, data.train, system, seed
        )

    floor = 0.0
    for seed in range(seeds):
        for arm, loss in of_labels(
            spectral if seed == 0 else {floor: spectral[floor]}, seed
        ).items():
            student = model(system.student, seed)
            record(arm, seed, partial(train, student, loss, data.train, system, seed))
        first = done().query("seed == 0").set_index("arm").validation_correlation_time
        floor = max(FLOORS, key=lambda f: first[f"{INVERSE}{f:g}"])
        for arm in (PLAIN, SPECTRAL, ON_POLICY):
            record(arm, seed, partial(distilled, arm, floor, seed))
    rows = done()
    means = rows.groupby("arm")[list(COLUMNS)].mean()
    alone = means[means.index.str.startswith("labels")].sort_values("correlation_time").iloc[-1]
    taught = means.loc[[SPECTRAL, ON_POLICY]].sort_values("correlation_time").iloc[-1]
    bars = {
        "correlation time 20 % above the best on labels alone": taught.correlation_time
        >= 1.2 * alone.correlation_time,
        "half of its spectrum error": taught.log_spectrum_error <= 0.5 * alone.log_spectrum_error,
        "none diverged": taught.diverged == 0,
    }
    return rows, [f"{name}: {bar}" for bar, met in bars.items() if not met]


def picture(rows: pd.DataFrame) -> Figure:
    """Correlation time against spectrum error; a point a seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for arm, group in rows.groupby("arm", sort=False):
        marker = "*" if arm == "teacher" else "os"[str(arm).startswith("distilled")]
        axis.plot(group.log_spectrum_error, group.correlation_time, marker, label=arm)
    axis.set(xlabel="log spectrum error", ylabel="correlation time / steps", xscale="log")
    axis.legend(fontsize=7)
    return figure


def main() -> None:
    """Read the command line, run what is missing, write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=SYSTEMS, default="ks")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: 3)")
    parser.add_argument("--cache", type=Path, default=Path("runs/rollouts"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with command_line_errors(parser.prog):
        rows, missed = run(options.system, options.seeds, options.cache, options.results)
        stem = options.results / f"rollouts_{options.system}"
        write_record(stem, format_table(rows, index=["arm"], columns=COLUMNS) + "\n", rows)
        picture(rows).savefig(stem.with_suffix(".png"), dpi=120)
    sys.exit("\n".join(f"missed: {bar}" for bar in missed) or 0)


if __name__ == "__main__":
    main()
