"""Distil a small GraphMixer from a GraphAlterNet on traffic speeds.

The task: an hour of readings in, the next hour out, at every sensor. tsl's data module feeds
Lightning, and tsl's masked metrics score. Side by side, at equal optimisation steps: persistence,
the historical average, the teacher, the student alone, the student with plain-MSE distillation and
the student with SDKD, where the student has all labels and where it has labels for the first
quarter of the training period and the teacher's answers for all of it.

    python examples/metr_la.py --data FOLDER      # the Los-loop week, another csv pair, or METR-LA
    python examples/metr_la.py --data metr_la     # METR-LA, downloaded by tsl
    python examples/metr_la.py                    # no data at hand: simulated traffic
    python examples/metr_la.py --help
"""

import argparse
import copy
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sdkd_plugin import Bands, GraphTransform
from sdkd_plugin.adapters.tsl import (
    DistillationPredictor,
    SDKDStudent,
    SDKDTeacher,
    load_traffic,
    spatiotemporal_dataset,
)
from sdkd_plugin.data import TrafficData, simulate_traffic
from sdkd_plugin.report import (
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
from sdkd_plugin.report.figures import band_bars, binned_spectrum, error_spectra, series

# After the adapter, which makes tsl importable where its compiled extensions are absent.
import pytorch_lightning as pl  # isort: skip
from pytorch_lightning.loggers.logger import DummyLogger  # isort: skip
from tsl.data import SpatioTemporalDataModule, SpatioTemporalDataset  # isort: skip
from tsl.data.datamodule.splitters import FixedIndicesSplitter, TemporalSplitter  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.engines import Predictor  # isort: skip
from tsl.metrics.torch import MaskedMAE, MaskedMSE  # isort: skip

WINDOW = HORIZON = 12
AT = {"15": 2, "30": 5, "60": 11}
SETTINGS = {"all labels": 1.0, "a quarter of the labels": 0.25}
STUDENTS = ("student alone", "plain-MSE distillation", "SDKD")


@dataclass(frozen=True)
class Preset:
    """Sizes of an experiment. The windows are split in time: 70, 10 and 20 %."""

    teacher_steps: int
    student_steps: int
    teacher: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    teacher_lr: float = 4e-3
    student_lr: float = 5e-3
    batch_size: int = 32
    validations: int = 10
    cutoff: float = 0.25
    kd_weight: float = 1.0


PRESETS = {
    "quick": Preset(
        teacher_steps=650,
        student_steps=500,
        teacher={"patch_size": 12, "hops": 2},
    ),
    "paper": Preset(
        teacher_steps=40_000,
        student_steps=40_000,
        teacher={"hidden_size": 96, "n_layers": 3},
        batch_size=64,
        validations=50,
    ),
}


class BestWeights(pl.Callback):
    """Keeps the weights with the least validation error, in memory."""

    def __init__(self) -> None:
        self.error = math.inf
        self.interrupted = False
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare after each validation."""
        error = float(trainer.callback_metrics["val_mae"])
        if error < self.error:
            self.error = error
            state = cast(nn.Module, module.model).state_dict()
            self.weights = {name: value.detach().clone() for name, value in state.items()}

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, error: BaseException
    ) -> None:
        """Remember Ctrl-C: Lightning ends the program in a way of its own, or even goes on."""
        self.interrupted = isinstance(error, KeyboardInterrupt)


def check_traffic(data: TrafficData, batch_size: int) -> None:
    """Refuse traffic of another time step, or too little of it for the split.

    Raises:
        UserError: naming what the data have and what is expected.
    """
    step = data.index[1] - data.index[0]
    if step != pd.Timedelta(minutes=5):
        raise UserError(
            f"the readings are {step} apart, expected 5 minutes: the horizons of this example are."
        )
    # A quarter of the training windows, 70 % of all but a few, must make a batch.
    least = round(batch_size / 0.25 / 0.7) + 6 * (WINDOW + HORIZON)
    if len(data.index) < least:
        raise UserError(f"there are {len(data.index)} time steps, expected at least {least}.")


class Experiment:
    """The windows, split and scaled, and how a model is made, trained and scored on them."""

    def __init__(self, preset: Preset, data: TrafficData, device: torch.device) -> None:
        self.preset, self.data, self.device = preset, data, device
        check_traffic(data, preset.batch_size)
        self.bands = Bands.split(preset.cutoff)
        self.transform = GraphTransform.from_edges(
            data.edge_index, data.edge_weight, len(data.node_ids)
        )
        # Fitted once, on the readings of the training period, for teacher and students alike.
        # tsl takes the validation share of what the test leaves: 10 % of all.
        self.split = TemporalSplitter(val_len=0.125, test_len=0.2)
        self.scaler = StandardScaler(axis=(0, 1))
        module = SpatioTemporalDataModule(
            spatiotemporal_dataset(data, window=WINDOW, horizon=HORIZON),
            scalers={"target": self.scaler},
            splitter=self.split,
            batch_size=preset.batch_size,
        )
        module.setup()
        self.module = module
        self.dataset: SpatioTemporalDataset = module.torch_dataset
        batches = list(module.test_dataloader())
        self.truth = torch.cat([batch.y for batch in batches])
        self.mask = torch.cat([batch.mask for batch in batches])
        self.batches = batches

    def lesson(self, share: float, *, only_labelled: bool) -> SpatioTemporalDataModule:
        """Training windows with labels for the first ``share`` of the training period.

        Readings without labels still are inputs. With ``only_labelled`` the windows that have no
        label at all are left out.
        """
        targets = self.target_steps(self.split.train_idxs)
        last = targets[round(share * len(targets)) - 1, -1]
        labelled = torch.ones_like(self.data.mask)
        labelled[last + 1 : self.target_steps(self.split.val_idxs)[0, 0]] = False
        dataset = spatiotemporal_dataset(
            self.data, window=WINDOW, horizon=HORIZON, labelled=labelled
        )
        dataset.add_scaler("target", self.scaler)
        training = np.asarray(self.split.train_idxs)
        if only_labelled:
            training = training[targets[:, 0] <= last]
        module = SpatioTemporalDataModule(
            dataset,
            splitter=FixedIndicesSplitter(
                training.tolist(), self.split.val_idxs, self.split.test_idxs
            ),
            batch_size=self.preset.batch_size,
        )
        module.setup()
        return module

    def target_steps(self, windows: Any) -> np.ndarray:
        """Time steps of the targets of some windows, ``(windows, horizon)``."""
        return np.asarray(self.dataset.get_horizon_indices(windows))

    def model(self, network: type[nn.Module], options: dict[str, Any], seed: int) -> nn.Module:
        """A model for this graph and these windows."""
        torch.manual_seed(seed)
        sizes = {"window": WINDOW, "horizon": HORIZON, "n_nodes": self.dataset.n_nodes}
        return network(input_size=1, exog_size=2, **sizes, **options)

    def train(
        self, predictor: Predictor, module: SpatioTemporalDataModule, steps: int, seed: int
    ) -> None:
        """Train with Lightning; keep the weights with the least validation error."""
        best = BestWeights()
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=math.ceil(steps / len(module.train_dataloader())),
            val_check_interval=max(1, steps // self.preset.validations),
            check_val_every_n_epoch=None,
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            logger=DummyLogger(),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            gradient_clip_val=5.0,
            callbacks=[best],
        )
        torch.manual_seed(seed)
        try:
            trainer.fit(predictor, datamodule=module)
        finally:
            if best.interrupted:
                raise KeyboardInterrupt
        if not best.weights:
            raise RuntimeError("training diverged: there is no finite validation error.")
        predictor.model.load_state_dict(best.weights)
        predictor.model.to(self.device).eval()

    @torch.no_grad()
    def forecast(self, predictor: Predictor) -> Tensor:
        """The forecast of all test windows, in miles an hour."""
        predictor.to(self.device).eval()
        forecasts = []
        for batch in self.module.test_dataloader():
            forecasts.append(predictor.predict_batch(batch.to(self.device)).cpu())
        return torch.cat(forecasts)

    def persistence(self) -> Tensor:
        """Every step of the forecast is the last reading."""
        readings = self.data.filled()
        first = torch.from_numpy(self.target_steps(self.split.test_idxs)[:, 0])
        return readings[first - 1][:, None, :, None].expand(-1, HORIZON, -1, -1)

    def historical_average(self) -> Tensor:
        """The sensor's mean at that time of the day over the training period."""
        end = int(self.target_steps(self.split.train_idxs).max()) + 1
        clock = np.asarray(self.data.index.hour * 60 + self.data.index.minute)
        seen = pd.DataFrame(self.data.speed.where(self.data.mask, torch.nan)[:end].numpy())
        means = seen.groupby(clock[:end]).mean().reindex(np.unique(clock))
        table = means.fillna(seen.mean()).fillna(seen.stack().mean())
        steps = self.target_steps(self.split.test_idxs)
        return (
            torch.from_numpy(table.loc[clock[steps.ravel()]].to_numpy())
            .float()
            .reshape(*steps.shape, -1, 1)
        )

    def scores(self, forecast: Tensor) -> dict[str, float]:
        """Masked errors on the test windows, in miles an hour."""
        scores: dict[str, float] = {}
        for minutes, at in {"average": None, **AT}.items():
            mae, mse = MaskedMAE(at=at), MaskedMSE(at=at)
            mae.update(forecast, self.truth, self.mask)
            mse.update(forecast, self.truth, self.mask)
            scores[f"mae_{minutes}"] = float(mae.compute())
            scores[f"rmse_{minutes}"] = math.sqrt(float(mse.compute()))
        # Where nothing was observed there is no error to decompose.
        error = torch.where(self.mask, forecast - self.truth, 0)
        bands = self.transform.sample_band_energy(error, self.bands).sum(0) / self.mask.sum()
        return scores | {f"band_{i}": float(value) for i, value in enumerate(bands)}

    def cost(self, model: nn.Module) -> dict[str, float]:
        """Parameters, and time of one forecast of one window."""
        batch = next(iter(self.module.test_dataloader(batch_size=1))).to(self.device)
        return {
            "parameters": parameter_count(model),
            "milliseconds": milliseconds_a_forecast(
                model, inputs=dict(batch.input), device=self.device
            ),
        }


def run_experiment(preset: Preset, options: argparse.Namespace) -> None:
    """The whole comparison: data, teacher, students, table, pictures."""
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}, expected at least 1.")
    device = choose_device(options.device)
    run = Run(options.out)
    if options.data is None:
        data = simulate_traffic(seed=0)
    else:
        try:
            data = load_traffic(options.data, start=options.start, missing=options.missing)
        except ValueError as error:
            raise UserError(f"--data {error}") from error
    print(f"Traffic: {data.source}; {data.speed.shape[1]} sensors, {data.speed.shape[0]} steps.")
    experiment = Experiment(preset, data, device)

    fit = {"loss_fn": MaskedMAE(), "metrics": {"mae": MaskedMAE()}, "scale_target": True}
    teacher = experiment.model(SDKDTeacher, preset.teacher, seed=0)
    lesson = experiment.lesson(1.0, only_labelled=True)
    steps = preset.teacher_steps
    predictor = Predictor(model=teacher, **fit, **optimisation(preset.teacher_lr, steps, lesson))
    print("Training the teacher.")
    experiment.train(predictor, lesson, steps, seed=0)

    forecasts = {
        "persistence": experiment.persistence(),
        "historical average": experiment.historical_average(),
        "teacher": experiment.forecast(predictor),
    }
    rows: list[dict[str, Any]] = []
    for setting, share in SETTINGS.items():
        for name, forecast in list(forecasts.items())[:3]:
            cost = experiment.cost(teacher) if name == "teacher" else {}
            row = {"setting": setting, "seed": 0, "model": name}
            rows.append(row | experiment.scores(forecast) | cost)
        for seed in range(options.seeds):
            for name in STUDENTS:
                student = experiment.model(SDKDStudent, preset.student, seed)
                lesson = experiment.lesson(share, only_labelled=name == "student alone")
                steps = preset.student_steps
                predictor_options = fit | optimisation(preset.student_lr, steps, lesson)
                if name == "student alone":
                    predictor = Predictor(model=student, **predictor_options)
                else:
                    # SDKD's own default gives the high band twice the weight of the low one.
                    predictor = DistillationPredictor(
                        teacher,
                        copy.deepcopy(experiment.transform),  # it moves its own to the device
                        experiment.bands,
                        weighting=(1.0, 1.0) if name == "plain-MSE distillation" else None,
                        kd_weight=preset.kd_weight,
                        model=student,
                        **predictor_options,
                    )
                print(f"Training: {name}, {setting}, seed {seed}.")
                experiment.train(predictor, lesson, steps, seed)
                forecast = experiment.forecast(predictor)
                row = {"setting": setting, "seed": seed, "model": name}
                rows.append(row | experiment.scores(forecast) | experiment.cost(student))
                forecasts.setdefault(f"{name}, {setting}", forecast)
                weights = f"{name} {setting} seed {seed}.safetensors".lower().replace(" ", "_")
                run.weights(f"weights/{weights}", student)
    settings = {"data": data.source, "preset": options.preset, "seeds": options.seeds}
    settings |= {"device": str(device), **asdict(preset)}
    report(run, experiment, pd.DataFrame(rows), forecasts, settings)


def optimisation(lr: float, steps: int, lesson: SpatioTemporalDataModule) -> dict[str, Any]:
    """AdamW with a learning rate that falls along a cosine, an epoch at a time as tsl has it."""
    epochs = math.ceil(steps / len(lesson.train_dataloader()))
    return {
        "optim_class": torch.optim.AdamW,
        "optim_kwargs": {"lr": lr, "weight_decay": 1e-3},
        "scheduler_class": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_kwargs": {"T_max": epochs},
    }


COLUMNS = {
    "mae_average": ("MAE", ".3f"),
    **{f"mae_{minutes}": (f"MAE {minutes} min", ".3f") for minutes in AT},
    **{f"rmse_{minutes}": (f"RMSE {minutes} min", ".3f") for minutes in AT},
    "band_0": ("low-band MSE", ".2f"),
    "band_1": ("high-band MSE", ".2f"),
    "parameters": ("parameters", ",.0f"),
    "milliseconds": ("ms a forecast", ".2f"),
}


def report(
    run: Run,
    experiment: Experiment,
    rows: pd.DataFrame,
    forecasts: dict[str, Tensor],
    settings: dict[str, Any],
) -> None:
    """Write the tables and the pictures, and print the table and where all lies."""
    preset, data = experiment.preset, experiment.data
    lines = [
        f"Traffic speeds, {WINDOW} steps in, the next {HORIZON} out, in miles an hour; "
        f"{data.source}.",
        f"Mean over {settings['seeds']} seed(s) (± standard deviation) on the last 20 % of the "
        f"windows; the first 70 % are for training, 10 % for validation; masked errors at the "
        f"horizons. Every student takes {preset.student_steps} steps of batch "
        f"{preset.batch_size}; the weights with the least validation MAE count. One teacher, "
        f"trained on all labels for {preset.teacher_steps} steps. Low band: below "
        f"{preset.cutoff:g} of the graph's highest frequency. With a quarter of the labels the "
        "readings of the whole training period still are inputs. Both distilled students count "
        f"the teacher {preset.kd_weight:g} times; plain-MSE distillation has equal band weights, "
        f"SDKD twice the weight on the high band. Times: one window on {experiment.device}, to be "
        "compared within this table only.",
        "",
        format_table(rows, index=["setting", "model"], columns=COLUMNS),
        "",
    ]
    lines += compare(rows, STUDENTS, column="mae_average", heading="MAE")
    text = "\n".join(lines) + "\n"
    run.settings(settings)
    run.rows("results.csv", rows)
    run.text("table.md", text)

    quarter = list(SETTINGS)[1]
    shown = {
        "teacher": forecasts["teacher"],
        **{name: forecasts[f"{name}, {quarter}"] for name in STUDENTS},
    }
    run.figure("series.png", sensor_series(experiment, shown))
    errors = {
        name: torch.where(experiment.mask, forecast - experiment.truth, 0)
        for name, forecast in shown.items()
    }
    spectra = {
        name: binned_spectrum(*experiment.transform.spectrum(error))
        for name, error in errors.items()
    }
    run.figure(
        "error_spectra.png", error_spectra(spectra, experiment.bands.edges, "(miles an hour)²")
    )
    for setting in SETTINGS:
        bars = band_bars(
            band_means(rows[rows.setting == setting], ["teacher", *STUDENTS]), f"MSE, {setting}"
        )
        run.figure(f"band_errors_{setting.replace(' ', '_')}.png", bars)
    print(text)
    print(f"Table, settings, figures and students' weights: {run.folder}")


def sensor_series(experiment: Experiment, shown: dict[str, Tensor]) -> Any:
    """The last day at the sensors with the most variable, the median and the steadiest speeds."""
    at = AT["60"]
    truth, mask = experiment.truth[:, at, :, 0], experiment.mask[:, at, :, 0]
    day = slice(max(0, len(truth) - 288), None)
    order = truth[day].std(0).argsort(descending=True)
    sensors = [int(order[i * (len(order) - 1) // 2]) for i in range(3)]
    hours = np.arange(len(truth[day])) / 12
    return series(
        hours,
        truth[day][:, sensors].T.numpy(),
        mask[day][:, sensors].T.numpy(),
        {name: f[day, at][:, sensors, 0].T.numpy() for name, f in shown.items()},
        [f"sensor {experiment.data.node_ids[i]}, forecast 60 minutes before" for i in sensors],
        "miles an hour",
    )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Distil a GraphMixer from a GraphAlterNet.")
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default: 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", help="folder with traffic files, or metr_la; else simulated")
    parser.add_argument("--start", help="first time of a csv pair, such as 2012-03-01")
    parser.add_argument("--missing", choices=["none", "zeros", "nan"], default="none")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/metr_la"), help="default: %(default)s"
    )
    options = parser.parse_args()
    # What they say at lower levels is of no use to whom runs an example.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("tsl").setLevel(logging.ERROR)
    with command_line_errors(parser.prog):
        run_experiment(PRESETS[options.preset], options)


if __name__ == "__main__":
    main()
