"""Traffic as a tsl experiment: a teacher, which is kept, and students with and without it.

An hour of readings in, the next hour out. Error bars: `benchmarks/traffic_week.py`.

    python examples/metr_la.py                                  # without data: simulated
    python examples/metr_la.py dataset=csv dataset.root=FOLDER  # T-GCN's files, such as Los-loop
    python examples/metr_la.py dataset=la preset=paper          # METR-LA, downloaded by tsl
    python examples/metr_la.py stage=distill sdkd/distill=adaptive
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from sdkd_plugin.adapters import tsl as sdkd
from sdkd_plugin.adapters.tsl.experiment import Experiment
from sdkd_plugin.report import format_table, parameter_count

# After the adapter, which makes tsl importable where its compiled extensions are absent.
from tsl.data import SpatioTemporalDataModule, SpatioTemporalDataset  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip

ALONE, PLAIN, SDKD = "student alone", "plain-MSE distillation", "SDKD"
STAGES = {"teacher": [], "student": [ALONE], "distill": [PLAIN, SDKD], "all": [ALONE, PLAIN, SDKD]}


def windows_of(cfg: DictConfig) -> tuple[SpatioTemporalDataModule, sdkd.DataCard]:
    """The readings in windows, split in time and scaled, and what a model must know of them."""
    dataset = sdkd.get_dataset(cfg.dataset.name, cfg.dataset.get("options"))
    windows = SpatioTemporalDataset(
        target=dataset.dataframe(),
        mask=dataset.mask,
        connectivity=dataset.get_connectivity(**cfg.dataset.connectivity),
        covariates={"u": dataset.datetime_encoded("day").values},
        window=cfg.window,
        horizon=cfg.horizon,
    )
    sdkd.number_windows(windows)  # so that the teacher can forecast all of them ahead
    module = SpatioTemporalDataModule(
        windows,
        scalers={"target": StandardScaler(axis=(0, 1))},
        splitter=dataset.get_splitter(**cfg.dataset.splitting),
        batch_size=cfg.batch_size,
    )
    module.setup()
    return module, sdkd.DataCard.of(windows, dataset.nodes)


def train(
    cfg: DictConfig, training: DictConfig, model: Any, module: Any, loss: Any = None, *, epochs: int
) -> dict[str, float]:
    """Train a model, distilled if there is a loss; its test errors at least validation error."""
    plain: Any = OmegaConf.to_container(training, resolve=True)
    steps = {minutes: minutes // 5 - 1 for minutes in (15, 30, 60)}  # readings every five minutes
    options = {
        "model": model,
        "loss_fn": MaskedMAE(),
        "metrics": {"mae": MaskedMAE(), **{f"mae_{m}": MaskedMAE(at=i) for m, i in steps.items()}},
        "scale_target": True,
        "optim_class": sdkd.get_optimizer_class(training.optimizer.name),
        "optim_kwargs": plain["optimizer"]["hparams"],
        "scheduler_class": sdkd.get_scheduler_class(training.lr_scheduler.name),
        "scheduler_kwargs": plain["lr_scheduler"]["hparams"],
    }
    predictor = sdkd.PlainPredictor(**options)
    if loss is not None:
        predictor = sdkd.DistillationPredictor(loss, **options)
        predictor.precompute(module)
    best = ModelCheckpoint(dirpath=f"{cfg.run.dir}/best", monitor="val_mae", mode="min")
    trainer = pl.Trainer(
        max_epochs=epochs,
        logger=CSVLogger(cfg.run.dir, name="logs"),
        gradient_clip_val=cfg.grad_clip_val,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        callbacks=[best, EarlyStopping(monitor="val_mae", patience=cfg.patience)],
    )
    trainer.fit(predictor, datamodule=module)
    if best.best_model_path:
        predictor.load_model(best.best_model_path)
    return dict(trainer.test(predictor, datamodule=module, verbose=False)[0])


def run_traffic(cfg: DictConfig) -> None:
    """Data, teacher, students, table."""
    sdkd.refuse_targets(OmegaConf.to_container(cfg))
    module, data = windows_of(cfg)
    graph = module.torch_dataset.edge_index, module.torch_dataset.edge_weight, len(data.node_ids)
    sizes = {"window": data.window, "horizon": data.horizon, "exog_size": data.covariates}
    sizes |= {"n_nodes": graph[2], "input_size": 1}
    of_teacher, of_student = (
        sdkd.ModelCard(each["name"], sizes, each["hparams"], data)
        for each in (OmegaConf.to_container(c.model, resolve=True) for c in (cfg.teacher, cfg))
    )
    rows, teacher = [], None
    if cfg.stage != "student":
        folder = cfg.sdkd.distill.teacher or f"{cfg.teacher.library}/{cfg.dataset.name}"
        kept = sdkd.has_forecaster(folder)
        print(f"Teacher: {'found' if kept else 'trained and kept'} in {folder}")
        teacher = sdkd.load_forecaster(folder, data)[0] if kept else of_teacher.make()
        scores = train(cfg, cfg.teacher, teacher, module, epochs=0 if kept else cfg.teacher.epochs)
        rows.append({"model": "teacher", "parameters": parameter_count(teacher), **scores})
        if not kept:
            sdkd.save_forecaster(folder, teacher, of_teacher)
    for name in STAGES[cfg.stage]:
        pl.seed_everything(cfg.seed, verbose=False)
        student, loss = of_student.make(), None
        if name != ALONE:
            config = cfg.sdkd.distill if name == SDKD else {"weighting": [1.0, 1.0]}
            loss = sdkd.loss_from_config(config, teacher, *graph)
            if loss.latents:
                loss.fit_latents(student, **next(iter(module.train_dataloader())).input)
        scores = train(cfg, cfg, student, module, loss, epochs=cfg.epochs)
        rows.append({"model": name, "parameters": parameter_count(student), **scores})
        sdkd.save_forecaster(Path(cfg.run.dir) / name.replace(" ", "_"), student, of_student)
    columns = {"parameters": ("parameters", ",.0f"), "test_mae": ("MAE", ".3f")}
    columns |= {f"test_mae_{minutes}": (f"MAE {minutes} min", ".3f") for minutes in (15, 30, 60)}
    print(format_table(pd.DataFrame(rows), index=["model"], columns=columns))


if __name__ == "__main__":
    Experiment(run_fn=run_traffic, config_path="conf", config_name="metr_la").run()
