"""Traffic forecasting as a tsl experiment: a teacher, a student alone, and a distilled student.

An hour of readings in, the next hour out, at every sensor. The shape is that of tsl's own traffic
experiment: groups for dataset, model, optimizer, scheduler and logger, tsl's data module, scaler,
masked metrics and callbacks. A trained teacher is kept, found and reused.

    python examples/metr_la.py                                     # no data at hand: simulated
    python examples/metr_la.py dataset=csv dataset.root=FOLDER     # T-GCN's files, such as Los-loop
    python examples/metr_la.py dataset=la                          # METR-LA, downloaded by tsl
    python examples/metr_la.py stage=distill sdkd/distill=adaptive # with the teacher found
    python examples/metr_la.py --help
"""

import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import Subset

from sdkd_plugin._checks import check_choice
from sdkd_plugin.adapters.tsl import (
    DataCard,
    DistillationPredictor,
    DistillOptions,
    Forecaster,
    PlainPredictor,
    check_hparams,
    get_dataset,
    get_model_class,
    get_optimizer_class,
    get_scheduler_class,
    has_forecaster,
    load_forecaster,
    refuse_targets,
    save_forecaster,
)
from sdkd_plugin.adapters.tsl.experiment import LOGGERS, Experiment, make_logger
from sdkd_plugin.data.store import parameters_key
from sdkd_plugin.report import (
    Run,
    UserError,
    command_line_errors,
    compare,
    format_table,
    milliseconds_a_forecast,
    parameter_count,
)
from sdkd_plugin.report.figures import series
from sdkd_plugin.taps import tap_path

# After the adapter, which makes tsl importable where its compiled extensions are absent.
from tsl.data import SpatioTemporalDataModule, SpatioTemporalDataset  # isort: skip
from tsl.data.loader import StaticGraphLoader  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.engines import Predictor  # isort: skip
from tsl.metrics.torch import MaskedMAE, MaskedMAPE, MaskedMSE  # isort: skip

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "distilled student"
STAGES = {
    "teacher": (TEACHER,),
    "student": (ALONE,),
    "distill": (TEACHER, DISTILLED),
    "all": (TEACHER, ALONE, DISTILLED),
}
MINUTES = (15, 30, 60)
# What a teacher's weights depend on; another value means another teacher in the library.
TEACHER_SETTINGS = (
    "seed",
    "window",
    "horizon",
    "stride",
    "batch_size",
    "grad_clip_val",
    "scale_target",
    "limit_train_batches",
)


@dataclass(frozen=True)
class Traffic:
    """The windows, split and scaled, and what models and tables need to know of them."""

    module: SpatioTemporalDataModule
    windows: SpatioTemporalDataset
    card: DataCard
    at: dict[int, int]
    source: str

    @property
    def sizes(self) -> dict[str, Any]:
        """What models are told of the data, those that ask."""
        return {
            "n_nodes": self.windows.n_nodes,
            "input_size": self.windows.n_channels,
            "output_size": self.windows.n_channels,
            "horizon": self.windows.horizon,
            "window": self.windows.window,
            "exog_size": self.windows.input_map.u.shape[-1],
        }


@contextmanager
def config_errors() -> Iterator[None]:
    """What the library says of a configuration is the user's, in one line."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def check_config(cfg: DictConfig) -> None:
    """Refuse names that are not known before anything is loaded or trained.

    Raises:
        ValueError: listing those that are.
    """
    refuse_targets(OmegaConf.to_container(cfg))
    check_choice("stage", cfg.stage, STAGES)
    if cfg.logger is not None:
        check_choice("logger.backend", cfg.logger.get("backend"), LOGGERS)
    check_choice("dataset.connectivity.layout", cfg.dataset.connectivity.layout, ["edge_index"])
    for training in (cfg, cfg.teacher):
        get_model_class(training.model.name)
        get_optimizer_class(training.optimizer.name)
        if training.get("lr_scheduler") is not None:
            get_scheduler_class(training.lr_scheduler.name)
    DistillOptions.from_config(cfg.sdkd.distill)


def check_models(cfg: DictConfig, traffic: Traffic) -> None:
    """Refuse options of models, optimizers and taps now, and not when a teacher has been trained.

    Raises:
        ValueError: naming the option, and those there are.
    """
    stages, pairs = STAGES[cfg.stage], DistillOptions.from_config(cfg.sdkd.distill).pairs
    trainings = []
    if TEACHER in stages and cfg.sdkd.distill.teacher is None:
        trainings.append((cfg.teacher, [pair.teacher for pair in pairs]))
    if set(stages) & {ALONE, DISTILLED}:
        trainings.append((cfg, [pair.student for pair in pairs]))
    for training, taps in trainings:
        network = forecaster(cfg, training, traffic).make()
        optimizer = get_optimizer_class(training.optimizer.name)
        check_hparams("optimizer.hparams", optimizer, training.optimizer.hparams)
        if training.get("lr_scheduler") is not None:
            scheduler = get_scheduler_class(training.lr_scheduler.name)
            check_hparams("lr_scheduler.hparams", scheduler, training.lr_scheduler.hparams)
        for tap in taps if DISTILLED in stages else ():
            tap_path(network, tap)


def load_data(cfg: DictConfig) -> Traffic:
    """The data set of the configuration, in windows, as tsl's experiment does it.

    Raises:
        ValueError: if there are too few readings for the split.
    """
    dataset = get_dataset(cfg.dataset.name, cfg.dataset.get("options"))
    least = 8 * (cfg.window + cfg.horizon) + 2 * cfg.batch_size
    if len(dataset) < least:
        raise ValueError(
            f"there are {len(dataset)} time steps, expected at least {least} for windows of "
            f"{cfg.window} and {cfg.horizon} steps in batches of {cfg.batch_size}."
        )
    windows = SpatioTemporalDataset(
        target=dataset.dataframe(),
        mask=dataset.mask,
        connectivity=dataset.get_connectivity(**cfg.dataset.connectivity),
        covariates={"u": dataset.datetime_encoded("day").values},
        horizon=cfg.horizon,
        window=cfg.window,
        stride=cfg.stride,
    )
    module = SpatioTemporalDataModule(
        dataset=windows,
        scalers={"target": StandardScaler(axis=(0, 1))},
        splitter=dataset.get_splitter(**cfg.dataset.splitting),
        batch_size=cfg.batch_size,
        workers=cfg.workers,
    )
    module.setup()
    step = (dataset.index[1] - dataset.index[0]) / pd.Timedelta(minutes=1)
    at = {m: round(m / step) - 1 for m in MINUTES if m % step == 0 and m / step <= cfg.horizon}
    return Traffic(module, windows, DataCard.of(windows, dataset.nodes), at, dataset.name)


def forecaster(cfg: DictConfig, training: DictConfig, traffic: Traffic) -> Forecaster:
    """How the model of a training is made."""
    hparams: Any = OmegaConf.to_container(training.model.hparams, resolve=True)
    notes = {"data": traffic.source, "seed": cfg.seed, "epochs": training.epochs}
    return Forecaster(training.model.name, traffic.sizes, hparams, traffic.card, notes)


def predictor_options(cfg: DictConfig, training: DictConfig, traffic: Traffic) -> dict[str, Any]:
    """The arguments of tsl's ``Predictor``, for a training or just for a test."""
    metrics = {"mae": MaskedMAE(), "mse": MaskedMSE(), "mape": MaskedMAPE()}
    for minutes, at in traffic.at.items():
        metrics[f"mae_at_{minutes}"] = MaskedMAE(at=at)
        metrics[f"mse_at_{minutes}"] = MaskedMSE(at=at)
        metrics[f"mape_at_{minutes}"] = MaskedMAPE(at=at)
    options = {
        "optim_class": get_optimizer_class(training.optimizer.name),
        "optim_kwargs": OmegaConf.to_container(training.optimizer.hparams, resolve=True),
        "loss_fn": MaskedMAE(),
        "metrics": metrics,
        "scale_target": cfg.scale_target,
    }
    if training.get("lr_scheduler") is not None:
        options["scheduler_class"] = get_scheduler_class(training.lr_scheduler.name)
        options["scheduler_kwargs"] = OmegaConf.to_container(
            training.lr_scheduler.hparams, resolve=True
        )
    return options


def make_trainer(cfg: DictConfig, name: str, training: DictConfig) -> pl.Trainer:
    """Lightning's trainer with the callbacks of tsl's experiment."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    folder = Path(cfg.run.dir) / "checkpoints" / name.replace(" ", "_")
    return pl.Trainer(
        max_epochs=training.epochs,
        default_root_dir=cfg.run.dir,
        logger=make_logger(
            cfg.logger,
            name=f"{cfg.run.name} {name}",
            folder=cfg.run.dir,
            tags=[*cfg.tags, name],
            settings=settings,
        )
        or DummyLogger(),
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        gradient_clip_val=cfg.grad_clip_val,
        limit_train_batches=cfg.limit_train_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=cfg.progress,
        enable_model_summary=False,
        callbacks=[
            EarlyStopping(monitor="val_mae", patience=training.patience, mode="min"),
            ModelCheckpoint(dirpath=folder, save_top_k=1, monitor="val_mae", mode="min"),
        ],
    )


def train(cfg: DictConfig, name: str, training: DictConfig, predictor: Predictor, dm: Any) -> None:
    """Train; keep the weights with the least validation error."""
    print(f"Training: {name}.")
    with config_errors():
        trainer = make_trainer(cfg, name, training)
    pl.seed_everything(cfg.seed, verbose=False)
    try:
        trainer.fit(predictor, datamodule=dm)
    finally:
        # Lightning ends the program in a way of its own.
        if trainer.interrupted:
            raise KeyboardInterrupt
    checkpoint = cast(ModelCheckpoint, trainer.checkpoint_callback)
    best, score = checkpoint.best_model_path, checkpoint.best_model_score
    # Lightning counts NaN as infinite, and keeps the weights all the same.
    if score is None or not bool(torch.isfinite(score)):
        raise UserError(f"the training of the {name} diverged: lower the learning rate.")
    predictor.load_model(best)
    predictor.eval()
    shutil.rmtree(Path(best).parent)  # the weights are kept as safetensors


def library_folder(cfg: DictConfig) -> Path:
    """Where the library keeps a teacher of just these data and settings."""
    settings: dict[str, Any] = {name: cfg[name] for name in TEACHER_SETTINGS}
    for name in ("dataset", "teacher"):
        settings[name] = OmegaConf.to_container(cfg[name], resolve=True)
    del settings["teacher"]["library"]
    (settings["dataset"].get("options") or {}).pop("progress", None)
    name = f"{cfg.dataset.name}_{cfg.teacher.model.name}_{parameters_key(settings)[:12]}"
    return Path(cfg.teacher.library) / name


def find_teacher(cfg: DictConfig, traffic: Traffic) -> nn.Module:
    """The teacher of the configuration's folder or of the library, or one trained and put there.

    Raises:
        UserError: if that of the folder does not fit the data, or its files are damaged.
    """
    if cfg.sdkd.distill.teacher is not None:
        with config_errors():
            network, _ = load_forecaster(cfg.sdkd.distill.teacher, traffic.card)
        print(f"Teacher: that of {cfg.sdkd.distill.teacher}.")
        return network
    folder = library_folder(cfg)
    if has_forecaster(folder):
        with config_errors():
            network, _ = load_forecaster(folder, traffic.card)
        print(f"Teacher: found in {folder}.")
        return network
    card = forecaster(cfg, cfg.teacher, traffic)
    pl.seed_everything(cfg.seed, verbose=False)
    with config_errors():
        network = card.make()
    options = predictor_options(cfg, cfg.teacher, traffic)
    train(cfg, TEACHER, cfg.teacher, PlainPredictor(model=network, **options), traffic.module)
    save_forecaster(folder, network, card)
    print(f"Teacher: saved in {folder}.")
    return network


def train_student(
    cfg: DictConfig, traffic: Traffic, name: str, teacher: nn.Module | None
) -> nn.Module:
    """A student of the configuration, alone where there is no teacher."""
    pl.seed_everything(cfg.seed, verbose=False)
    card = forecaster(cfg, cfg, traffic)
    windows = traffic.windows
    with config_errors():
        network = card.make()
        options = predictor_options(cfg, cfg, traffic) | {"model": network}
        if teacher is None:
            predictor = PlainPredictor(**options)
        else:
            distill = DistillOptions.from_config(cfg.sdkd.distill).predictor_arguments(
                windows.edge_index, windows.edge_weight, windows.n_nodes
            )
            example = dict(next(iter(traffic.module.train_dataloader())).input)
            predictor = DistillationPredictor(teacher, **distill, example=example, **options)
    train(cfg, name, cfg, predictor, traffic.module)
    save_forecaster(Path(cfg.run.dir) / name.replace(" ", "_"), network, card)
    return network


def score(cfg: DictConfig, traffic: Traffic, network: nn.Module) -> dict[str, float]:
    """Errors on the test windows, in the units of the data, and cost."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = PlainPredictor(model=network, **predictor_options(cfg, cfg, traffic))
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    (test,) = trainer.test(predictor, datamodule=traffic.module, verbose=False)
    scores: dict[str, float] = {}
    for minutes in ("", *(f"_at_{m}" for m in traffic.at)):
        scores[f"mae{minutes}"] = test[f"test_mae{minutes}"]
        scores[f"rmse{minutes}"] = math.sqrt(test[f"test_mse{minutes}"])
        scores[f"mape{minutes}"] = 100 * test[f"test_mape{minutes}"]
    batch = next(iter(traffic.module.test_dataloader(batch_size=1))).to(device)
    inputs: dict[str, Tensor] = dict(batch.input)
    scores["milliseconds"] = milliseconds_a_forecast(
        predictor.to(device).eval(), inputs=inputs, device=device
    )
    return scores | {"parameters": float(parameter_count(network))}


@torch.no_grad()
def sensor_series(traffic: Traffic, networks: dict[str, nn.Module]) -> Any:
    """The last day of the test at the sensors of the most variable, median and steadiest readings.

    Each model's forecast of the farthest horizon of the table, made that long before.
    """
    minutes, at = list(traffic.at.items())[-1]
    hours_apart = minutes / (at + 1) / 60 * traffic.windows.stride
    windows = range(len(traffic.module.testset))[-round(24 / hours_apart) :]
    batches = list(StaticGraphLoader(Subset(traffic.module.testset, windows), batch_size=64))
    truth = torch.cat([b.y[:, at, :, 0] for b in batches])
    seen = torch.cat(
        [(b.mask if "mask" in b else torch.ones_like(b.y))[:, at, :, 0] for b in batches]
    )
    order = truth.std(0).argsort(descending=True)
    sensors = order[[0, len(order) // 2, -1]].tolist()
    forecasts = {}
    for name, network in networks.items():
        predictor = PlainPredictor(model=network.cpu()).eval()
        forecast = torch.cat([predictor.predict_batch(b)[:, at, :, 0] for b in batches])
        forecasts[name] = forecast[:, sensors].T.numpy()
    return series(
        np.arange(len(truth)) * hours_apart,
        truth[:, sensors].T.numpy(),
        seen[:, sensors].T.numpy().astype(bool),
        forecasts,
        [f"sensor {traffic.card.node_ids[i]}, forecast {minutes} minutes before" for i in sensors],
        "units of the data",
    )


def report(cfg: DictConfig, traffic: Traffic, rows: pd.DataFrame, run: Run) -> None:
    """Write and print the table."""
    columns = {"mae": ("MAE", ".3f"), "rmse": ("RMSE", ".3f"), "mape": ("MAPE %", ".2f")}
    for minutes in traffic.at:
        columns |= {
            f"{error}_at_{minutes}": (f"{heading.split()[0]} {minutes} min", style)
            for error, (heading, style) in list(columns.items())[:3]
        }
    columns |= {"parameters": ("parameters", ",.0f"), "milliseconds": ("ms a forecast", ".2f")}
    lines = [
        f"{traffic.source}: {traffic.windows.n_nodes} sensors, {cfg.window} steps in, {cfg.horizon}"
        " out. Masked errors on the test windows, the last in time, in the units of the data, at "
        f"the horizons and as a mean over all. Seed {cfg.seed}; weights with the least validation "
        f"MAE; {cfg.teacher.epochs} epochs at most for the teacher, {cfg.epochs} for a student. "
        "Times: one window, to be compared within this table only.",
        "",
        format_table(rows, index=["model"], columns=columns),
        "",
    ]
    models = [name for name in (ALONE, DISTILLED) if name in set(rows.model)]
    lines += compare(rows, models, column="mae", heading="MAE")
    text = "\n".join(lines) + "\n"
    run.rows("results.csv", rows)
    run.text("table.md", text)
    print(text)
    print(f"Table, configuration, picture and weights: {run.folder}")


def run_stages(cfg: DictConfig) -> pd.DataFrame:
    """The stages of the configuration: data, models, table.

    Raises:
        UserError: if the configuration, the data or a teacher's folder are not as they should be.
    """
    run = Run(cfg.run.dir)
    with config_errors():
        check_config(cfg)
        traffic = load_data(cfg)
        check_models(cfg, traffic)
    print(f"Traffic: {traffic.source}; {traffic.windows.n_nodes} sensors.")
    stages = STAGES[cfg.stage]
    networks = {TEACHER: find_teacher(cfg, traffic)} if TEACHER in stages else {}
    for name in stages:
        if name != TEACHER:
            teacher = networks[TEACHER] if name == DISTILLED else None
            networks[name] = train_student(cfg, traffic, name, teacher)
    rows = pd.DataFrame(
        [
            {"setting": cfg.dataset.name, "seed": cfg.seed, "model": name}
            | score(cfg, traffic, network)
            for name, network in networks.items()
        ]
    )
    if traffic.at:
        run.figure("series.png", sensor_series(traffic, networks))
    report(cfg, traffic, rows, run)
    return rows


def run_traffic(cfg: DictConfig) -> None:
    """What tsl's ``Experiment`` runs: bad input is one line and exit code 2."""
    with command_line_errors("metr_la.py"):
        run_stages(cfg)


if __name__ == "__main__":
    # What they say at lower levels is of no use to whom runs an example.
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("tsl").setLevel(logging.ERROR)
    Experiment(run_fn=run_traffic, config_path="conf", config_name="metr_la").run()
