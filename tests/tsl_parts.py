"""Small traffic, models and trainers that the tests behind tsl share."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sdkd_plugin import DistillationLoss, GraphTransform
from sdkd_plugin.adapters.tsl import (
    DistillationPredictor,
    SDKDStudent,
    SDKDTeacher,
    SeededDataModule,
    number_windows,
)

import pytorch_lightning as pl  # isort: skip
from pytorch_lightning.callbacks import ModelCheckpoint  # isort: skip
from pytorch_lightning.loggers.logger import DummyLogger  # isort: skip
from tsl.data import SpatioTemporalDataset  # isort: skip
from tsl.data.datamodule.splitters import TemporalSplitter  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip

NODES, STEPS = 5, 120
SIZES = {"input_size": 1, "window": 6, "horizon": 3, "n_nodes": NODES, "exog_size": 2}
RING = torch.stack([torch.arange(NODES), torch.arange(NODES).roll(-1)])
WEIGHT = torch.linspace(0.2, 1, NODES)
FIT = {
    "loss_fn": MaskedMAE(),
    "metrics": {"mae": MaskedMAE()},
    "optim_class": torch.optim.Adam,
    "optim_kwargs": {"lr": 1e-2},
}


def windows(
    *,
    observed: Tensor | None = None,
    gaps: bool = False,
    covariates: bool = True,
    numbered: bool = False,
    shift: float = 0.0,
    **options: Any,
) -> SeededDataModule:
    generator = torch.Generator().manual_seed(0)
    speed = 50 + 10 * torch.sin(torch.arange(STEPS) / 20)[:, None]
    speed = speed + torch.randn(STEPS, NODES, generator=generator) + shift * torch.arange(NODES)
    if observed is None:
        observed = torch.rand(STEPS, NODES, generator=generator) > 0.1
    index = pd.date_range("2012-03-01", periods=STEPS, freq="5min")
    dataset = SpatioTemporalDataset(
        target=pd.DataFrame(speed.numpy(), index=index),
        mask=observed.numpy()[..., None],
        connectivity=(RING, WEIGHT),
        covariates={"u": torch.randn(STEPS, 2, generator=generator)} if covariates else None,
        window=6,
        horizon=3,
    )
    if gaps:  # unobserved targets are NaN, while the readings of the windows are filled
        dataset.add_covariate("filled", speed[..., None].float(), "t n f", add_to_input_map=False)
        dataset.set_input_map(x=["filled"], u=["u"])
        dataset.target[~observed[..., None]] = torch.nan
    if numbered:
        number_windows(dataset)
    return SeededDataModule(
        dataset,
        scalers={} if gaps else {"target": StandardScaler(axis=(0, 1))},
        splitter=TemporalSplitter(val_len=0.1, test_len=0.2),
        batch_size=16,
        **options,
    )


def student(dropout: float = 0.0, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden_size": 8, "emb_size": 4, "n_layers": 1, "dropout": dropout}
    return SDKDStudent(**options, **{**SIZES, **sizes})


def teacher(seed: int = 9) -> nn.Module:
    torch.manual_seed(seed)
    return SDKDTeacher(hidden_size=8, emb_size=4, n_layers=1, n_heads=2, patch_size=3, **SIZES)


def transform() -> GraphTransform:
    return GraphTransform.from_edges(RING, WEIGHT, NODES)


def loss_of(*teachers: nn.Module, **options: Any) -> DistillationLoss:
    """A loss with one teacher or the given ones."""
    return DistillationLoss(teachers or teacher(), transform(), **options)


def predictor(
    learner: nn.Module | None = None, loss: DistillationLoss | None = None, **options: Any
) -> DistillationPredictor:
    learner = student() if learner is None else learner
    return DistillationPredictor(loss or loss_of(), model=learner, **{**FIT, **options})


def trainer(epochs: int = 2, callbacks: tuple = (), **options: Any) -> pl.Trainer:
    checkpointing = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    return pl.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "logger": DummyLogger(),
            "enable_checkpointing": checkpointing,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            **options,
        }
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def first_batch(module: SeededDataModule) -> Any:
    module.setup()
    return next(iter(module.train_dataloader()))
