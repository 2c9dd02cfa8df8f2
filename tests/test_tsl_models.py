"""Models behind tsl: its own in both roles of a distillation, ours where covariates are missing."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from sdkd_plugin import GraphTransform, LatentPair
from sdkd_plugin.adapters.tsl import DistillationPredictor, SDKDStudent, SDKDTeacher

import pytorch_lightning as pl  # isort: skip
from pytorch_lightning.loggers.logger import DummyLogger  # isort: skip
from tsl.data import SpatioTemporalDataset  # isort: skip
from tsl.data.loader import StaticGraphLoader  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip
from tsl.nn import models as tsl_models  # isort: skip
from tsl.nn.models import BaseModel  # isort: skip


def _load(name: str) -> ModuleType:
    """A helper module of this folder, which is not on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.get(name) or importlib.util.module_from_spec(spec)
    if name not in sys.modules:
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module


operations = _load("tsl_sparse_operations")
NODES, WINDOW, HORIZON = operations.N_NODES, operations.WINDOW, operations.HORIZON
EDGES = torch.tensor([[0, 1, 2, 3, 2], [1, 2, 3, 0, 0]])
WEIGHT = torch.linspace(0.2, 1, 5)

# A tap of each forecaster of tsl, by module path; None where no module's output has a node axis.
TAPS = {
    "AGCRNModel": "readout.readout",
    "ARModel": "linear.readout",
    "DCRNNModel": "readout.readout",
    "EvolveGCNModel H": "readout.readout",
    "EvolveGCNModel O": "readout.readout",
    "FCRNNModel": None,
    "GRUGCNModel mean": "readout.readout",
    "GRUGCNModel gcn": "readout.readout",
    "GatedGraphNetworkModel": "readout.0",
    "GraphWaveNetModel": "readout",
    "RNNEncGCNDecModel": "decoder.readout",
    "RNNModel": "readout.readout",
    "STCNModel": "readout.readout",
    "STIDModel": "readout.readout",
    "TCNModel": "readout.5",
    "TransformerModel": "readout.0",
    "VARModel": None,
}
IMPUTERS = {
    "BiRNNImputerModel",
    "GRINModel",
    "RNNImputerModel",
    "SPINHierarchicalModel",
    "SPINModel",
}


def loader(name: str) -> StaticGraphLoader:
    generator = torch.Generator().manual_seed(0)
    index = pd.date_range("2012-03-01", periods=24, freq="5min")
    speed = pd.DataFrame(torch.randn(24, NODES, generator=generator).numpy(), index=index)
    u = torch.randn(24, 2, generator=generator)
    if name == "STIDModel":  # its covariates are places in a table
        u = (u > 0).long()
    dataset = SpatioTemporalDataset(
        target=speed,
        connectivity=(EDGES, WEIGHT),
        covariates={"u": u},
        window=WINDOW,
        horizon=HORIZON,
    )
    return StaticGraphLoader(dataset, batch_size=4)


def fit_a_step(predictor: pl.LightningModule, batches: StaticGraphLoader) -> pl.Trainer:
    trainer = pl.Trainer(
        fast_dev_run=True,
        accelerator="cpu",
        logger=DummyLogger(),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(predictor, batches, batches)
    return trainer


def test_every_model_of_tsl_is_among_those_tried():
    public = {name for name in tsl_models.classes if name != "BaseModel"}
    assert public == {name.split()[0] for name in operations.MODELS}
    assert set(operations.MODELS) == TAPS.keys() | IMPUTERS


@pytest.mark.parametrize("name", TAPS)
def test_a_model_of_tsl_teaches_and_learns(name: str):
    batches, tap = loader(name), TAPS[name]
    wise, learner = (operations.build_model(name).float().train() for _ in range(2))
    with torch.no_grad():
        for p in wise.parameters():
            p.mul_(0.5)
    taught, before = (
        {key: value.clone() for key, value in model.state_dict().items()}
        for model in (wise, learner)
    )
    predictor = DistillationPredictor(
        wise,
        GraphTransform.from_edges(EDGES, WEIGHT, NODES),
        latents=[] if tap is None else [LatentPair(tap, tap)],
        example=dict(next(iter(batches)).input.items()),
        model=learner,
        loss_fn=MaskedMAE(),
        optim_class=torch.optim.SGD,
        optim_kwargs={"lr": 1e-2},
    )
    logged = fit_a_step(predictor, batches).callback_metrics
    assert torch.isfinite(logged["train_loss"])
    assert logged["train_loss"] > logged["train_task"]
    assert tap is None or logged[f"train_kd_{tap}<-{tap}"] > 0
    assert all(torch.equal(value, taught[key]) for key, value in wise.state_dict().items())
    assert any(not torch.equal(value, before[key]) for key, value in learner.state_dict().items())


@pytest.mark.parametrize("kind", [SDKDStudent, SDKDTeacher])
def test_ours_are_base_models_of_tsl(kind: type[nn.Module]):
    assert issubclass(kind, BaseModel)
    assert kind.return_type is Tensor
    model = kind(
        input_size=1, window=WINDOW, horizon=HORIZON, n_nodes=NODES, exog_size=2
    ).eval()  # fmt: skip
    x, u = torch.randn(2, WINDOW, NODES, 1), torch.randn(2, WINDOW, 2)
    forecast = model.predict(x=x, edge_index=EDGES, edge_weight=WEIGHT, u=u)
    assert forecast.shape == (2, HORIZON, NODES, 1)
    per_node = u[:, :, None].expand(-1, -1, NODES, -1)
    torch.testing.assert_close(model(x, EDGES, WEIGHT, per_node), forecast)
    with pytest.raises(ValueError, match="`u` is None, expected covariates"):
        model.predict(x=x, edge_index=EDGES)


@pytest.mark.parametrize("kind", [SDKDStudent, SDKDTeacher])
def test_graphs_laid_side_by_side_are_forecast_each_by_itself(kind: type[nn.Module]):
    torch.manual_seed(0)
    model = kind(input_size=1, window=WINDOW, horizon=HORIZON, n_nodes=NODES, exog_size=2).eval()
    x, u = torch.randn(3, WINDOW, NODES, 1), torch.randn(3, WINDOW, NODES, 2)
    # The last graph has edges of its own.
    edges = [EDGES, EDGES, EDGES[:, :3]]
    weights = [WEIGHT, WEIGHT.flip(0), WEIGHT[:3]]
    expected = [
        model(x[i : i + 1], edges[i], weights[i], u[i : i + 1]) for i in range(3)
    ]  # fmt: skip
    got = model(
        torch.cat(list(x), 1)[None],
        torch.cat([each + i * NODES for i, each in enumerate(edges)], 1),
        torch.cat(weights),
        torch.cat(list(u), 1)[None],
    )
    torch.testing.assert_close(got, torch.cat(expected, 2))
    assert not torch.allclose(
        got[:, :, :NODES], model(x[:1], EDGES[:, :1], None, u[:1])
    )  # the edges matter
    across = torch.tensor([[0], [NODES]])
    with pytest.raises(ValueError, match=f"`x` has {2 * NODES} nodes, expected {NODES}"):
        model(torch.randn(1, WINDOW, 2 * NODES, 1), across, None, torch.randn(1, WINDOW, 2))
