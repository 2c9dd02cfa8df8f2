"""Answers the teachers gave once, for tsl's windows: the same training as asking each time."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

from sdkd_plugin import GraphTransform, LatentPair
from sdkd_plugin.adapters.tsl import (
    DistillationPredictor,
    SDKDStudent,
    SDKDTeacher,
    number_windows,
    spatiotemporal_dataset,
)
from sdkd_plugin.data import TrafficData

import pytorch_lightning as pl  # isort: skip
from pytorch_lightning.loggers.logger import DummyLogger  # isort: skip
from tsl.data import SpatioTemporalDataModule  # isort: skip
from tsl.data.datamodule.splitters import TemporalSplitter  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip

NODES = 4
SIZES = {"input_size": 1, "window": 6, "horizon": 3, "n_nodes": NODES, "exog_size": 2}


def windows(*, numbered: bool = True, shift: float = 0.0) -> SpatioTemporalDataModule:
    generator = torch.Generator().manual_seed(0)
    speed = 50 + shift * torch.arange(NODES) + torch.randn(150, NODES, generator=generator)
    ring = torch.arange(NODES)
    dataset = spatiotemporal_dataset(
        TrafficData(
            speed=speed,
            mask=torch.rand(150, NODES, generator=generator) > 0.1,
            edge_index=torch.stack([ring, ring.roll(-1)]),
            edge_weight=torch.ones(NODES),
            node_ids=tuple("abcd"),
            index=pd.date_range("2012-03-01", periods=150, freq="5min"),
            source="a test",
        ),
        window=6,
        horizon=3,
    )
    if numbered:
        number_windows(dataset)
    module = SpatioTemporalDataModule(
        dataset,
        scalers={"target": StandardScaler(axis=(0, 1))},
        splitter=TemporalSplitter(val_len=0.1, test_len=0.2),
        batch_size=16,
    )
    module.setup()
    return module


def predictor(module: SpatioTemporalDataModule, **options: object) -> DistillationPredictor:
    torch.manual_seed(3)
    teachers = [
        SDKDTeacher(hidden_size=8, emb_size=4, n_layers=1, n_heads=2, patch_size=3, **SIZES)
        for _ in range(2)
    ]
    student: nn.Module = SDKDStudent(hidden_size=8, emb_size=4, n_layers=1, **SIZES)
    ring = torch.arange(NODES)
    transform = GraphTransform.from_edges(
        torch.stack([ring, ring.roll(-1)]), torch.ones(NODES), NODES
    )
    return DistillationPredictor(
        teachers,
        transform,
        aggregation="camkd",
        latents=[LatentPair("latent", "latent_low", 0.1)],
        example=dict(module.torch_dataset[torch.arange(2)].input.items()),
        model=student,
        loss_fn=MaskedMAE(),
        optim_class=torch.optim.Adam,
        optim_kwargs={"lr": 1e-2},
        scale_target=True,
        **options,
    )


def train(predictor: DistillationPredictor, module: SpatioTemporalDataModule) -> dict:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=2,
        limit_val_batches=0,
        accelerator="cpu",
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(predictor, module)
    return predictor.state_dict()


def test_known_answers_train_as_asking_at_every_step():
    module = windows()
    asking, knowing = predictor(module), predictor(module)
    knowing.ask_teachers(module)
    calls = []
    for teacher in knowing.distiller.teachers:
        teacher.register_forward_hook(lambda *_: calls.append(1))
    expected = copy.deepcopy(train(asking, module))
    known = train(knowing, module)
    assert not calls
    for name, value in expected.items():
        torch.testing.assert_close(known[name], value, atol=1e-5, rtol=1e-4)


def test_the_number_of_a_window_is_its_first_step_and_no_input():
    batch = windows().torch_dataset[torch.tensor([0, 7, 11])]
    assert batch.first_step[:, 0, 0].tolist() == [0, 7, 11]
    assert "first_step" not in batch.input


def test_answers_refuse_what_they_were_not_asked():
    unnumbered = windows(numbered=False)
    with pytest.raises(ValueError, match="the batch has no 'first_step': number the data set"):
        predictor(unnumbered).ask_teachers(unnumbered)
    module = windows()
    known = predictor(module)
    known.ask_teachers(module)
    step = torch.tensor([int(module.valset.indices[-1])])
    batch = module.torch_dataset[step]
    with pytest.raises(ValueError, match="were not asked about the window that begins at step"):
        known.training_step(batch, 0)
    other = windows(shift=5.0)
    with pytest.raises(ValueError, match="the readings of a window are not those"):
        known.training_step(next(iter(other.train_dataloader())), 0)
    with pytest.raises(ValueError, match="has 'first_step' already"):
        number_windows(module.torch_dataset)
