"""Distil a small U-Net from a large STAlterNet on two-dimensional turbulence.

The task: ten frames of vorticity in, the next ten out. neuraloperator's own ``Trainer`` does the
training. Side by side, at equal optimisation steps: persistence, the teacher, the student alone,
the student with plain-MSE distillation and the student with SDKD, where the student has all labels
and where it has labels for a quarter of the inputs and the teacher's answers for all.

    python examples/ns_2d.py                      # ten minutes on two CPU cores at most
    python examples/ns_2d.py --preset paper       # FNO's data set at nu = 1e-5, for a GPU
    python examples/ns_2d.py --help
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset
from tqdm import tqdm

from sdkd_plugin import Bands, GridTransform, LatentPair, SDKDDistiller, TeacherAnswer
from sdkd_plugin.adapters.neuralop import TrainerLoss, distillation_dataset
from sdkd_plugin.data import navier_stokes, read_trajectories
from sdkd_plugin.report import (
    GridScores,
    Run,
    UserError,
    band_means,
    choose_device,
    command_line_errors,
    compare,
    format_table,
    milliseconds_a_forecast,
    parameter_count,
)
from sdkd_plugin.report.figures import band_bars, binned_spectrum, error_spectra, fields

# After the adapter, which keeps neuraloperator from setting warning filters.
from neuralop import Trainer, get_model  # isort: skip
from neuralop.data.transforms.data_processors import DefaultDataProcessor  # isort: skip
from neuralop.data.transforms.normalizers import UnitGaussianNormalizer  # isort: skip
from neuralop.models.base_model import BaseModel  # isort: skip
from zencfg.bunch import Bunch  # isort: skip

FRAMES = 10
SETTINGS = {"all labels": 1.0, "a quarter of the labels": 0.25}
STUDENTS = ("student alone", "plain-MSE distillation", "SDKD")


@dataclass(frozen=True)
class Preset:
    """Sizes of an experiment. The trajectories are split in order."""

    viscosity: float
    resolution: int
    solver_resolution: int
    training: int
    validation: int
    test: int
    teacher: dict[str, Any]
    student: dict[str, Any]
    teacher_steps: int
    student_steps: int
    teacher_lr: float
    student_lr: float
    batch_size: int = 10
    cutoff: float = 0.25
    kd_weight: float = 10.0
    latent_weight: float = 0.1


PRESETS = {
    "quick": Preset(
        viscosity=1e-4,
        resolution=32,
        solver_resolution=64,
        training=160,
        validation=40,
        test=60,
        teacher={"width": 16, "depth": 3, "coordinates": True},
        student={"width": 12, "coordinates": True},
        teacher_steps=1408,
        student_steps=1200,
        teacher_lr=2e-3,
        student_lr=3e-3,
    ),
    # Sizes of the split and batch as in the paper's released recipe, on the FNO paper's data.
    "paper": Preset(
        viscosity=1e-5,
        resolution=64,
        solver_resolution=256,
        training=960,
        validation=120,
        test=120,
        teacher={"width": 64, "depth": 4, "coordinates": True},
        student={"width": 16, "coordinates": True},
        teacher_steps=28_800,
        student_steps=28_800,
        teacher_lr=1e-3,
        student_lr=3e-3,
    ),
}


class Experiment:
    """The data, split and normalised, and how a model is made, trained and scored on them."""

    def __init__(self, preset: Preset, trajectories: Tensor, device: torch.device) -> None:
        self.preset, self.device = preset, device
        sizes = [preset.training, preset.validation, preset.test]
        windows = [(part[:, :FRAMES], part[:, FRAMES:]) for part in trajectories.split(sizes)]
        self.training, self.validation, self.test = windows
        self.transform = GridTransform(trajectories.shape[2:])
        self.bands = Bands.split(preset.cutoff)
        # One mean and one deviation for all frames, from the training inputs alone.
        inputs = self.training[0]
        self.normaliser = UnitGaussianNormalizer(
            mean=inputs.mean().reshape(1, 1, 1, 1), std=inputs.std().reshape(1, 1, 1, 1)
        )

    def model(self, arch: str, options: dict[str, Any], seed: int) -> BaseModel:
        """A registered model, from the host's own factory."""
        torch.manual_seed(seed)
        config = {"model_arch": arch, "data_channels": FRAMES, "out_channels": FRAMES, **options}
        return get_model(Bunch({"model": config})).to(self.device)

    def draw_labelled(self, share: float, seed: int) -> Tensor:
        """Which training samples have labels: exactly a share of them, drawn at random."""
        n = self.preset.training
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return order.argsort() < round(share * n)

    def train(
        self,
        title: str,
        model: BaseModel,
        loss: Callable[..., Tensor],
        samples: StackDataset[Any],
        steps: int,
        lr: float,
        seed: int,
    ) -> None:
        """Train with the host's trainer; keep the weights with the least validation error."""
        loader = DataLoader(
            samples,
            batch_size=self.preset.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )
        if steps % len(loader):
            raise UserError(
                f"{steps} steps are not a whole number of epochs of {len(loader)} steps: all "
                "students must take equally many."
            )
        epochs = steps // len(loader)
        trained = loss.distiller if isinstance(loss, TrainerLoss) else model
        optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        validation = DataLoader(distillation_dataset(*self.validation), self.preset.batch_size)
        trainer = Trainer(
            model=model,
            n_epochs=epochs,
            device=self.device,
            data_processor=DefaultDataProcessor(self.normaliser, self.normaliser),
        )
        with (
            tempfile.TemporaryDirectory() as folder,
            tqdm(total=epochs * len(loader), desc=title, unit="step", delay=1) as bar,
        ):
            trainer.train(
                ProgressLoader(loader, bar),
                {"validation": validation},
                optimizer,
                scheduler,
                training_loss=loss,
                eval_losses={"mse": supervised_loss},
                save_best="validation_mse",
                save_dir=folder,
            )
            saved = Path(folder) / "best_model_state_dict.pt"
            if not saved.exists():
                raise RuntimeError(f"{title}: diverged, there is no finite validation error.")
            model.load_checkpoint(folder, "best_model")
        model.eval()

    def normalised(self, x: Tensor) -> Tensor:
        """Fields as the models see them."""
        return self.normaliser.to(self.device).transform(x.to(self.device))

    @torch.no_grad()
    def forecast(self, model: nn.Module) -> Tensor:
        """The forecast of the test inputs, in physical units."""
        batches = self.normalised(self.test[0]).split(50)
        forecast = torch.cat([model(batch) for batch in batches])
        return self.normaliser.inverse_transform(forecast).cpu()

    def scores(self, forecast: Tensor) -> dict[str, float]:
        """Errors on the test samples, in physical units."""
        scores = GridScores(self.transform, self.bands)
        scores.update(forecast, self.test[1])
        return scores.compute()

    def cost(self, model: nn.Module) -> dict[str, float]:
        """Parameters, and time of one forecast of one sample."""
        x = self.test[0][:1].to(self.device)
        return {
            "parameters": parameter_count(model),
            "milliseconds": milliseconds_a_forecast(model, x, device=self.device),
        }


def run_experiment(preset: Preset, options: argparse.Namespace) -> None:
    """The whole comparison: data, teacher, students, table, pictures."""
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}, expected at least 1.")
    device = choose_device(options.device)
    run = Run(options.out)
    trajectories, source = load(preset, options.data, device)
    experiment = Experiment(preset, trajectories, device)

    teacher = experiment.model("sdkd_stalternet", preset.teacher, seed=0)
    samples = distillation_dataset(*experiment.training)
    steps, lr = preset.teacher_steps, preset.teacher_lr
    experiment.train("teacher", teacher, supervised_loss, samples, steps, lr, seed=0)
    forecasts = {
        "persistence": experiment.test[0][:, -1:].expand(-1, FRAMES, -1, -1),
        "teacher": experiment.forecast(teacher),
    }
    rows: list[dict[str, Any]] = []
    for setting, share in SETTINGS.items():
        row = {"setting": setting, "seed": 0}
        rows.append(row | {"model": "persistence"} | experiment.scores(forecasts["persistence"]))
        scores = experiment.scores(forecasts["teacher"]) | experiment.cost(teacher)
        rows.append(row | {"model": "teacher"} | scores)
        for seed in range(options.seeds):
            labelled = experiment.draw_labelled(share, seed)
            for name in STUDENTS:
                student = experiment.model("sdkd_unet", preset.student, seed)
                loss, samples = lesson(name, experiment, teacher, student, labelled)
                title = f"{name}, {setting}, seed {seed}"
                steps, lr = preset.student_steps, preset.student_lr
                experiment.train(title, student, loss, samples, steps, lr, seed)
                forecast = experiment.forecast(student)
                scores = experiment.scores(forecast) | experiment.cost(student)
                rows.append({"setting": setting, "seed": seed, "model": name} | scores)
                forecasts.setdefault(f"{name}, {setting}", forecast)
                weights = f"{name} {setting} seed {seed}.safetensors".lower().replace(" ", "_")
                run.weights(f"weights/{weights}", student)
    settings = {"data": source, "preset": options.preset, "seeds": options.seeds}
    settings |= {"device": str(device), **asdict(preset)}
    settings["resolution"] = list(experiment.transform.shape)
    if options.data is not None:
        settings |= {"viscosity": None, "solver_resolution": None}
    report(run, experiment, pd.DataFrame(rows), forecasts, settings)


def lesson(
    name: str, experiment: Experiment, teacher: nn.Module, student: nn.Module, labelled: Tensor
) -> tuple[Callable[..., Tensor], StackDataset[Any]]:
    """What a student learns from: its loss and its samples."""
    preset = experiment.preset
    x, y = experiment.training
    if name == "student alone":
        return supervised_loss, distillation_dataset(x[labelled], y[labelled])
    plain = name == "plain-MSE distillation"
    seen = experiment.normalised(x)
    distiller = SDKDDistiller(
        teacher,
        student,
        copy.deepcopy(experiment.transform),  # the distiller moves its own to the device
        experiment.bands,
        # SDKD's own default gives the high band twice the weight of the low one.
        weighting=(1.0, 1.0) if plain else "fixed",
        kd_weight=preset.kd_weight,
        latents=() if plain else (LatentPair("latent", "latent", preset.latent_weight),),
        example={"x": seen[:1]},
    ).to(experiment.device)
    # The teacher answers once: every epoch asks about the same inputs.
    answers = [distiller.teach(batch)[0] for batch in seen.split(50)]
    answer = TeacherAnswer(
        torch.cat([a.forecast for a in answers]).cpu(),
        {tap: torch.cat([a.latents[tap] for a in answers]).cpu() for tap in answers[0].latents},
    )
    return TrainerLoss(distiller), distillation_dataset(x, y, labelled, answer)


def supervised_loss(out: Tensor, y: Tensor, **sample: Any) -> Tensor:
    """The plain MSE, summed over the batch as the host's trainer expects."""
    return F.mse_loss(out, y) * len(y)


class ProgressLoader:
    """A loader that moves a progress bar: the host's trainer has none."""

    def __init__(self, loader: DataLoader[Any], bar: "tqdm[Any]") -> None:
        self.loader, self.bar = loader, bar

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            yield batch
            self.bar.update()


def load(preset: Preset, path: Path | None, device: torch.device) -> tuple[Tensor, str]:
    """Trajectories ``(samples, frames, n, n)``, and a sentence on where they come from."""
    samples = preset.training + preset.validation + preset.test
    if path is None:
        trajectories = navier_stokes(
            samples,
            resolution=preset.resolution,
            solver_resolution=preset.solver_resolution,
            viscosity=preset.viscosity,
            duration=2.0 * FRAMES,
            downsampling="truncate",
            batch_size=50,
            device=device,
        )
        return trajectories, (
            f"computed by the pseudo-spectral solver on {preset.solver_resolution} x "
            f"{preset.solver_resolution} points, viscosity {preset.viscosity:g}, seed 0"
        )
    try:
        trajectories = read_trajectories(path)
    except ValueError as error:
        raise UserError(f"--data {error}") from error
    if len(trajectories) < samples or trajectories.shape[1] < 2 * FRAMES:
        raise UserError(
            f"--data {path} has shape {tuple(trajectories.shape)}, expected (samples, time, nx, "
            f"ny) with at least {samples} samples of {2 * FRAMES} frames for this preset."
        )
    return trajectories[:samples, : 2 * FRAMES], f"read from {path}"


COLUMNS = {
    "mse": ("MSE", ".5f"),
    "mae": ("MAE", ".4f"),
    "relative_l2": ("relative L2", ".4f"),
    "band_0": ("low-band MSE", ".5f"),
    "band_1": ("high-band MSE", ".6f"),
    "parameters": ("parameters", ",.0f"),
    "milliseconds": ("ms a forecast", ".1f"),
}


def report(
    run: Run,
    experiment: Experiment,
    rows: pd.DataFrame,
    forecasts: dict[str, Tensor],
    settings: dict[str, Any],
) -> None:
    """Write the tables and the pictures, and print the table and where all lies."""
    preset = experiment.preset
    lines = [
        f"Navier-Stokes 2D, {FRAMES} frames in, the next {FRAMES} out, "
        f"{' x '.join(map(str, experiment.transform.shape))}; trajectories {settings['data']}.",
        f"Mean over {settings['seeds']} seed(s) (± standard deviation) on {preset.test} test "
        f"trajectories, in physical units; {preset.training} for training, {preset.validation} for "
        f"validation. Every student takes {preset.student_steps} steps of batch "
        f"{preset.batch_size}; the weights with the least validation MSE count. One teacher, "
        f"trained on all labels for {preset.teacher_steps} steps. Low band: below "
        f"{preset.cutoff:g} of the highest frequency. Both distilled students count the teacher "
        f"{preset.kd_weight:g} times; plain-MSE distillation has equal band weights, SDKD twice "
        "the weight on the high band and the teacher's latent with weight "
        f"{preset.latent_weight:g}. Times: one sample on {experiment.device}, to be compared "
        "within this table only.",
        "",
        format_table(rows, index=["setting", "model"], columns=COLUMNS),
        "",
    ]
    lines += compare(rows, STUDENTS, column="mse", heading="MSE")
    text = "\n".join(lines) + "\n"
    run.settings(settings)
    run.rows("results.csv", rows)
    run.text("table.md", text)

    quarter = list(SETTINGS)[1]
    shown = {
        "teacher": forecasts["teacher"],
        **{name: forecasts[f"{name}, {quarter}"] for name in STUDENTS},
    }
    truth = experiment.test[1]
    run.figure(
        "fields.png",
        fields(
            truth[0],
            {n: shown[n][0] for n in ("teacher", "student alone", "SDKD")},
            frames=[0, 4, 9],
            unit="vorticity",
        ),
    )
    spectra = {
        name: binned_spectrum(*experiment.transform.spectrum(field))
        for name, field in {
            "truth": truth,
            **{name: forecast - truth for name, forecast in shown.items()},
        }.items()
    }
    run.figure(
        "error_spectra.png", error_spectra(spectra, experiment.bands.edges, "vorticity squared")
    )
    for setting in SETTINGS:
        bars = band_bars(
            band_means(rows[rows.setting == setting], ["teacher", *STUDENTS]), f"MSE, {setting}"
        )
        run.figure(f"band_errors_{setting.replace(' ', '_')}.png", bars)
    print(text)
    print(f"Table, settings, figures and students' weights: {run.folder}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Distil a U-Net from an STAlterNet on turbulence.")
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default: 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", type=Path, help="trajectories: .mat, .npy, .pt or .safetensors")
    parser.add_argument("--out", type=Path, default=Path("runs/ns_2d"), help="default: %(default)s")
    options = parser.parse_args()
    with command_line_errors(parser.prog):
        run_experiment(PRESETS[options.preset], options)


if __name__ == "__main__":
    main()
