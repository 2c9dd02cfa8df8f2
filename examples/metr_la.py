"""Traffic as a tsl experiment: a teacher, which is kept, and students with and without it.

python examples/metr_la.py                                  # without data: simulated
python examples/metr_la.py dataset=csv dataset.root=FOLDER  # T-GCN's files, such as Los-loop
python examples/metr_la.py dataset=la preset=paper          # METR-LA, downloaded by tsl
python examples/metr_la.py stage=distill sdkd/distill=adaptive
"""

import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from sdkd_plugin.adapters import tsl as sdkd  # first: it makes tsl importable
from sdkd_plugin.adapters.tsl.experiment import Experiment
from sdkd_plugin.model_folder import has_model, load_model, save_model
from sdkd_plugin.report import command_line_errors, format_table, parameter_count

from tsl.data import SpatioTemporalDataModule, SpatioTemporalDataset, preprocessing  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip

ALONE, PLAIN, SDKD = "student alone", "plain-MSE distillation", "SDKD"
STAGES = {"teacher": [], "student": [ALONE], "distill": [PLAIN, SDKD], "all": [ALONE, PLAIN, SDKD]}
ERRORS = {"mae": None, "mae_step_3": 2, "mae_step_6": 5, "mae_step_12": 11}


def windows_of(cfg: DictConfig) -> tuple[SpatioTemporalDataModule, Any, list[Any]]:
    """The readings in windows, split in time and scaled, and the sensors' ids."""
    dataset = sdkd.get_dataset(cfg.dataset.name, cfg.dataset.get("options"))
    print(f"Traffic: {dataset.name}")
    split = dataset.get_splitter(**cfg.dataset.splitting)
    scaler = {"target": preprocessing.StandardScaler(axis=(0, 1))}
    windows = SpatioTemporalDataset(
        dataset.dataframe(),
        mask=dataset.mask,
        connectivity=dataset.get_connectivity(**cfg.dataset.connectivity),
        covariates={"u": dataset.datetime_encoded("day").values},
        window=cfg.window,
        horizon=cfg.horizon,
    )
    sdkd.number_windows(windows)  # so that the teacher can forecast all of them ahead
    module = SpatioTemporalDataModule(windows, scaler, splitter=split, batch_size=cfg.batch_size)
    module.setup()
    return module, windows, list(dataset.nodes)


def predictor_options(training: Any) -> dict[str, Any]:
    """Arguments of a predictor: loss, metrics, optimizer and scheduler."""
    optimizer, scheduler = training["optimizer"], training["lr_scheduler"]
    options: dict[str, Any] = {"optim_class": sdkd.get_optimizer_class(optimizer["name"])}
    options |= {"scheduler_class": sdkd.get_scheduler_class(scheduler["name"])}
    options |= {"optim_kwargs": optimizer["hparams"], "scheduler_kwargs": scheduler["hparams"]}
    metrics = {name: MaskedMAE(at=step) for name, step in ERRORS.items()}
    return options | {"loss_fn": MaskedMAE(), "metrics": metrics, "scale_target": True}


def train(cfg: DictConfig, name: str, epochs: int, predictor: Any, module: Any) -> dict[str, Any]:
    """Train, go back to the least validation error, and test: a row of the table."""
    folder = Path(cfg.run.dir, name.replace(" ", "_"))
    best = ModelCheckpoint(folder / "best", monitor="val_mae")
    stop = EarlyStopping("val_mae", patience=cfg.patience)
    log = CSVLogger(folder)
    trainer = pl.Trainer(max_epochs=epochs, logger=log, callbacks=[best, stop], **cfg.trainer)
    trainer.fit(predictor, datamodule=module)
    if best.best_model_path:
        predictor.load_model(best.best_model_path)
    errors = trainer.test(predictor, datamodule=module, verbose=False)[0]
    return {"model": name, "parameters": parameter_count(predictor.model), **errors}


@command_line_errors("metr_la.py")
def run_traffic(cfg: DictConfig) -> None:
    """Data, teacher, students, table."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    sdkd.refuse_targets(plain)
    if cfg.stage not in STAGES:
        raise ValueError(f"`stage` is {cfg.stage!r}, expected one of {list(STAGES)}.")
    module, windows, ids = windows_of(cfg)
    graph = windows.edge_index, windows.edge_weight, len(ids)
    pair = plain["teacher"]["model"], plain["model"]
    cards = [sdkd.model_card(m["name"], m["hparams"], windows, ids) for m in pair]
    of_teacher, of_student = cards
    key = repr([plain[each] for each in ("dataset", "teacher", "window", "horizon", "seed")])
    kept = f"{cfg.teacher.library}/{cfg.dataset.name}-{zlib.crc32(key.encode()):08x}"
    folder = cfg.sdkd.distill.teacher or kept
    found = cfg.sdkd.distill.teacher or has_model(folder)
    teacher = load_model(folder, of_teacher)[0] if found else of_teacher.make()
    _ = of_student.make(), sdkd.loss_from_config(cfg.sdkd.distill, teacher, *graph)
    options, rows = predictor_options(plain), []  # what is wrong so far is refused before training
    if cfg.stage != "student":
        print(f"Teacher: {'found' if found else 'trained and kept'} in {folder}")
        predictor = sdkd.PlainPredictor(model=teacher, **predictor_options(plain["teacher"]))
        rows.append(train(cfg, "teacher", 0 if found else cfg.teacher.epochs, predictor, module))
        if not found:
            save_model(folder, teacher, of_teacher)
    for name in STAGES[cfg.stage]:
        pl.seed_everything(cfg.seed, verbose=False)
        student = of_student.make()
        predictor = sdkd.PlainPredictor(model=student, **options)
        if name != ALONE:
            config = cfg.sdkd.distill if name == SDKD else {"weighting": [1.0, 1.0]}
            loss = sdkd.loss_from_config(config, teacher, *graph)
            if loss.latents:
                loss.fit_latents(student, **next(iter(module.train_dataloader())).input)
            predictor = sdkd.DistillationPredictor(loss, model=student, **options)
            predictor.precompute(module)
        rows.append(train(cfg, name, cfg.epochs, predictor, module))
        save_model(Path(cfg.run.dir, name.replace(" ", "_")), student, of_student)
    columns = {f"test_{name}": (name.upper().replace("_", " "), ".3f") for name in ERRORS}
    columns["parameters"] = ("parameters", ",.0f")
    print(format_table(pd.DataFrame(rows), index=["model"], columns=columns))


if __name__ == "__main__":
    Experiment(run_traffic, str(Path(__file__).with_name("conf")), "metr_la").run()
