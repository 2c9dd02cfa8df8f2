"""Models as files: what the file computes, what is refused, and that the model stays as it was."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from small import net, random, refusals, same
from torch import Tensor, nn

from sdkd_plugin.adapters import tsl as sdkd_tsl
from sdkd_plugin.adapters.neuralop import real_spectral_conv
from sdkd_plugin.export import OnnxModel, export_model, quantize_onnx
from sdkd_plugin.models import GraphAlterNet, GraphMixer, MLPMixer, ResNet, SimVP, STAlterNet, UNet

from neuralop.layers.spectral_convolution import SpectralConv  # isort: skip
from neuralop.models import FNO, TFNO  # isort: skip

BAR = 1e-4
GRID = {"in_channels": 3, "out_channels": 2}
GRAPH = {"horizon": 4, "window": 6, "n_nodes": 5, "exog_size": 2}
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
TSL = {"input_size": 1, "output_size": 1, "exog_size": 2, "horizon": 4}


def fields(*shape: int) -> dict[str, Tensor]:
    return {"x": random(2, 3, *shape)}


def readings() -> dict[str, Tensor]:
    inputs = {"x": random(2, 6, 5, 1), "u": random(2, 6, 2, seed=1)}
    return inputs | {"edge_index": EDGES, "edge_weight": torch.rand(6)}


def tsl_model(name: str, **options: object) -> nn.Module:
    return sdkd_tsl.get_model_class(name)(**TSL, hidden_size=8, **options)


CASES = {
    "UNet": (lambda: UNet(**GRID, width=4, coordinates=True), fields(9, 8)),
    "UNet, bounded": (lambda: UNet(**GRID, width=4, padding="reflect"), fields(9, 8)),
    "ResNet": (lambda: ResNet(**GRID, width=4), fields(9, 8)),
    "MLPMixer": (lambda: MLPMixer(**GRID, shape=(8, 12), width=8), fields(8, 12)),
    "STAlterNet": (lambda: STAlterNet(**GRID, width=4, depth=1), fields(9, 8)),
    "SimVP": (lambda: SimVP(**(GRID | {"out_channels": 6}), width=4, depth=2), fields(32, 32)),
    "SimVP, gated": (lambda: SimVP(**GRID, width=4, translator="gated"), fields(48, 40)),
    "GraphMixer": (lambda: GraphMixer(**GRAPH), readings()),
    "GraphAlterNet": (lambda: GraphAlterNet(**GRAPH, hidden_size=8), readings()),
    "FNO": (lambda: FNO((4, 6), **GRID, hidden_channels=6), fields(9, 8)),
    "TFNO": (lambda: TFNO((4, 6), **GRID, hidden_channels=6, rank=0.5), fields(8, 9)),
    "RNN": (lambda: tsl_model("rnn"), readings()),
    "GRU-GCN": (lambda: tsl_model("grugcn"), readings()),
    "TCN": (lambda: tsl_model("tcn"), readings()),
}


@pytest.mark.parametrize("name", CASES)
def test_an_onnx_file_forecasts_as_its_model(name, tmp_path):
    make, inputs = CASES[name]
    assert export_model(make(), inputs, tmp_path / "model.onnx") <= BAR
