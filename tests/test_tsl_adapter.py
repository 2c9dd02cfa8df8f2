"""Behind tsl: models, data, and distillation by its predictor and Lightning."""

import copy
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from sdkd_plugin import Bands, GraphTransform, LatentPair
from sdkd_plugin.adapters.tsl import (
    DistillationPredictor,
    SDKDStudent,
    SDKDTeacher,
    load_traffic,
    spatiotemporal_dataset,
)
from sdkd_plugin.data import TrafficData

import pytorch_lightning as pl  # isort: skip
from pytorch_lightning.loggers.logger import DummyLogger  # isort: skip
from tsl.data import SpatioTemporalDataModule  # isort: skip
from tsl.data.datamodule.splitters import TemporalSplitter  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.engines import Predictor  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip
from tsl.nn.models import GRUGCNModel  # isort: skip

NODES = 5
SIZES = {"input_size": 1, "window": 6, "horizon": 3, "n_nodes": NODES, "exog_size": 2}
FIT = {
    "loss_fn": MaskedMAE(),
    "metrics": {"mae": MaskedMAE()},
    "optim_class": torch.optim.Adam,
    "optim_kwargs": {"lr": 1e-2},
}


@pytest.fixture(scope="module")
def traffic() -> TrafficData:
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(200)
    speed = 50 + 10 * torch.sin(steps / 20)[:, None] + torch.randn(200, NODES, generator=generator)
    mask = torch.rand(200, NODES, generator=generator) > 0.1
    ring = torch.arange(NODES)
    return TrafficData(
        speed=torch.where(mask, speed, torch.nan),
        mask=mask,
        edge_index=torch.stack([ring, ring.roll(-1)]),
        edge_weight=torch.linspace(0.2, 1, NODES),
        node_ids=tuple("abcde"),
        index=pd.date_range("2012-03-01", periods=200, freq="5min"),
        source="a test",
    )


def transform_of(traffic: TrafficData) -> GraphTransform:
    return GraphTransform.from_edges(traffic.edge_index, traffic.edge_weight, NODES)


def windows(traffic: TrafficData, **options: object) -> SpatioTemporalDataModule:
    return SpatioTemporalDataModule(
        spatiotemporal_dataset(traffic, window=6, horizon=3, **options),
        scalers={"target": StandardScaler(axis=(0, 1))},
        splitter=TemporalSplitter(val_len=0.1, test_len=0.2),
        batch_size=16,
    )


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SDKDStudent(hidden_size=8, emb_size=4, n_layers=1, **SIZES)


def teacher() -> nn.Module:
    torch.manual_seed(9)
    return SDKDTeacher(hidden_size=8, emb_size=4, n_layers=1, n_heads=2, patch_size=3, **SIZES)


def fit(predictor: Predictor, module: SpatioTemporalDataModule, **options: object) -> pl.Trainer:
    torch.manual_seed(5)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(predictor, datamodule=module)
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("scale_target", [False, True])
def test_kd_weight_zero_trains_as_tsls_predictor_does(traffic, scale_target):
    options = {**FIT, "scale_target": scale_target}
    plain, distilled = student(), student()
    fit(Predictor(model=plain, **options), windows(traffic))
    predictor = DistillationPredictor(
        teacher(), transform_of(traffic), kd_weight=0.0, model=distilled, **options
    )
    fit(predictor, windows(traffic))
    assert same(weights(plain), weights(distilled))
    assert not same(weights(student()), weights(plain))


def test_the_teacher_is_not_trained_saved_or_counted(traffic):
    wise = teacher()
    before = copy.deepcopy(wise.state_dict())
    learner = student()
    predictor = DistillationPredictor(wise, transform_of(traffic), model=learner, **FIT)
    trainer = fit(predictor, windows(traffic))
    assert same(before, wise.state_dict())
    assert {name.split(".")[0] for name in predictor.state_dict()} == {"model"}
    assert {id(p) for p in predictor.parameters()} == {id(p) for p in learner.parameters()}
    assert not {"teacher", "transform", "weighting"} & set(predictor.hparams)
    logged = set(trainer.callback_metrics)
    assert {"train_task", "train_kd_band_0", "train_kd_band_1", "val_mae"} <= logged


def test_the_student_comes_closer_to_its_teacher(traffic):
    module = windows(traffic)
    module.setup()
    batch = next(iter(module.val_dataloader()))
    wise, learner = teacher(), student()

    def distance() -> float:
        with torch.no_grad():
            difference = wise(**batch.input) - learner(**batch.input)
        return float(difference.square().mean())

    before = distance()
    predictor = DistillationPredictor(
        wise, transform_of(traffic), kd_weight=50.0, model=learner, **FIT
    )
    fit(predictor, module)
    assert distance() < 0.5 * before


def test_the_distillation_term_is_unmasked_and_in_scaled_units(traffic):
    module = windows(traffic)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    wise, learner = teacher(), student()
    bands = Bands.split(0.5)
    predictor = DistillationPredictor(
        wise, transform_of(traffic), bands, weighting=(1.0, 1.0), model=learner, **FIT
    )
    trainer = fit(predictor, module)
    with torch.no_grad():
        expected = (learner(**batch.input) - wise(**batch.input)).square().mean()
        task = predictor.loss_fn(predictor.predict_batch(batch), batch.y, batch.mask)
        predictor.trainer, trainer.fit_loop.epoch_loop._results = trainer, None
        terms = predictor.distiller.terms(learner(**batch.input), task=task, **batch.input)
    assert not bool(batch.mask.all())
    torch.testing.assert_close(terms.frequency.sum(), expected)
    torch.testing.assert_close(terms.total, task + expected)


def test_a_batch_without_any_label_leaves_the_task_out(traffic):
    unseen = torch.zeros(200, NODES, dtype=torch.bool)
    unseen[190:] = True  # labels in the test windows alone
    wise, learner = teacher(), student()
    predictor = DistillationPredictor(wise, transform_of(traffic), model=learner, **FIT)
    module = windows(traffic, labelled=unseen)
    module.mask_scaling = False
    trainer = fit(predictor, module)
    assert float(trainer.callback_metrics["train_task"]) == 0
    assert not same(weights(student()), weights(learner))
    assert all(p.isfinite().all() for p in learner.parameters())


def test_tsls_own_model_learns_and_latents_have_any_layout(traffic):
    module = windows(traffic)
    module.setup()
    example = dict(next(iter(module.train_dataloader())).input)
    torch.manual_seed(0)
    learner = GRUGCNModel(1, 8, 1, 3, exog_size=2, enc_layers=1, gcn_layers=1)
    predictor = DistillationPredictor(
        teacher(),
        transform_of(traffic),
        latents=[LatentPair("gcn_layers.0", "latent")],
        example=example,
        model=learner,
        **FIT,
    )
    projector = copy.deepcopy(predictor.latent_losses.state_dict())
    trainer = fit(predictor, module)
    assert "train_kd_gcn_layers.0<-latent" in trainer.callback_metrics
    assert not same(projector, predictor.latent_losses.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision(traffic, precision):
    learner = student()
    predictor = DistillationPredictor(teacher(), transform_of(traffic), model=learner, **FIT)
    fit(predictor, windows(traffic), precision=precision)
    assert all(p.isfinite().all() for p in learner.parameters())


def test_no_student_is_refused(traffic):
    with pytest.raises(ValueError, match="`model` and `model_class` are None, expected one"):
        DistillationPredictor(teacher(), transform_of(traffic), **FIT)


@pytest.mark.parametrize("make", [student, teacher])
def test_models_are_tsl_models(make):
    model = make()
    x, u = torch.randn(2, 6, NODES, 1), torch.randn(2, 6, 2)
    edges = torch.tensor([[0, 1], [1, 2]])
    assert model.predict(x=x, edge_index=edges, u=u).shape == (2, 3, NODES, 1)
    for path in model.taps.values():
        model.get_submodule(path)


def test_unknown_options_are_filtered_as_tsl_does():
    # Elsewhere: the type checks that pytest adds hide the signature from tsl.
    code = (
        "from sdkd_plugin.adapters.tsl import SDKDStudent, SDKDTeacher\n"
        "for model in (SDKDStudent, SDKDTeacher):\n"
        "    options = {'hidden_size': 8, 'unknown': 1}\n"
        "    model.filter_model_args_(options)\n"
        "    assert options == {'hidden_size': 8}, options\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_windows_hold_what_the_traffic_does(traffic):
    dataset = spatiotemporal_dataset(traffic, window=6, horizon=3)
    item = dataset[10]
    torch.testing.assert_close(item.input.x[..., 0], traffic.filled()[10:16])
    assert torch.equal(item.mask[..., 0], traffic.mask[16:19])
    observed = item.mask[..., 0]
    assert torch.equal(item.target.y[..., 0][observed], traffic.speed[16:19][observed])
    minutes = 5 * np.arange(10, 16)
    angle = torch.from_numpy(2 * np.pi * minutes / 1440).float()
    torch.testing.assert_close(item.input.u, torch.stack([angle.sin(), angle.cos()], 1))


def test_labels_can_be_hidden_without_hiding_readings(traffic):
    labelled = torch.ones(200, NODES, dtype=torch.bool)
    labelled[15:] = False
    item = spatiotemporal_dataset(traffic, window=6, horizon=3, labelled=labelled)[12]
    assert not bool(item.mask.any())
    torch.testing.assert_close(item.input.x[..., 0], traffic.filled()[12:18])
    with pytest.raises(ValueError, match=r"`labelled` has shape \(3, 5\), expected \(200, 5\)"):
        spatiotemporal_dataset(traffic, labelled=labelled[:3])


def test_traffic_is_found_in_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_traffic(tmp_path / "none")
    (tmp_path / "my_speed.csv").write_text("a,b\n" + "50.5,60\n" * 12)
    (tmp_path / "my_adj.csv").write_text("1,0.5\n0,1\n")
    with pytest.raises(ValueError, match="does not say when its readings were taken"):
        load_traffic(tmp_path)
    data = load_traffic(tmp_path, start="2012-03-01", missing="none", freq="15min")
    assert (data.index[1] - data.index[0]) == pd.Timedelta(minutes=15)
    assert data.speed.shape == (12, 2)
    assert data.edge_index.tolist() == [[0], [1]]
