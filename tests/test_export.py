"""Models as files: what the file computes, what is refused, and that the model stays as it was."""

import sys

import pytest
import torch
from small import random
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
    "TCN": (lambda: tsl_model("tcn"), readings()),
}


@pytest.mark.parametrize("name", CASES)
def test_an_onnx_file_forecasts_as_its_model(name, tmp_path):
    make, inputs = CASES[name]
    assert export_model(make(), inputs, tmp_path / "model.onnx") <= BAR


def test_a_graph_file_takes_other_batches_and_edges(tmp_path):
    model, inputs = GraphMixer(**GRAPH).eval(), readings()
    alter = GraphAlterNet(**GRAPH, hidden_size=8).eval()
    more = {"x": random(7, 6, 5, 1), "u": random(7, 6, 2)}
    more |= {"edge_index": EDGES[:, :4], "edge_weight": torch.rand(4)}
    few = {**inputs, "edge_index": EDGES[:, :1], "edge_weight": torch.ones(1)}
    for name, each, example in (("mixer", model, inputs), ("alter", alter, few)):
        export_model(each, example, tmp_path / f"{name}.onnx")
        graph = OnnxModel(tmp_path / f"{name}.onnx", threads=1)
        expected = each(**{k: v for k, v in more.items() if k in graph.names})
        torch.testing.assert_close(graph(**more), expected, rtol=1e-4, atol=1e-5)


def test_units_are_baked_in_and_the_model_is_as_before(tmp_path):
    model = UNet(**GRID, width=4).train()
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, 5 + 3 * random(2, 3, 8, 8)
    path = tmp_path / "model.pt2"
    assert export_model(model, x, path, x_units=(3.0, 5.0), y_units=(2.0, 1.0)) <= BAR
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    written = torch.export.load(path).module()
    expected = 2 * model((x[:1] - 5) / 3) + 1
    torch.testing.assert_close(written(x=x[:1]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (9, 8), (8, 9), (7, 5), (12,), (6, 6, 7)])
@pytest.mark.parametrize("modes", [4, 6])
def test_a_real_spectral_layer_equals_the_hosts(shape, modes):
    layer = SpectralConv(3, 2, n_modes=(modes,) * len(shape)).eval()
    x = random(2, 3, *shape)
    torch.testing.assert_close(real_spectral_conv(layer, x)(x), layer(x), rtol=1e-4, atol=1e-6)


def test_fewer_modes_than_the_weight_has():
    layer = SpectralConv(3, 2, n_modes=(6, 6), max_n_modes=(8, 8)).eval()
    x = random(2, 3, 16, 16)
    torch.testing.assert_close(real_spectral_conv(layer, x)(x), layer(x), rtol=1e-4, atol=1e-6)


def test_int8_of_a_convolutional_student(tmp_path):
    files = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    model, batches = UNet(**GRID, width=16), [fields(16, 16) for _ in range(4)]
    export_model(model, batches[0], files[0])
    found = quantize_onnx(*files, batches[:3], batches[3:])
    assert found.bytes_after < 0.5 * found.bytes_before
    assert 1e-4 < found.error < 0.2
    assert [each.name for each in tmp_path.iterdir() if each not in files] == []


class Random(nn.Module):
    """Draws numbers in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Branch(nn.Module):
    """Branches on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


X = torch.ones(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("model", "example", "name", "message"),
    [
        (nn.Conv2d(1, 1, 1), X, "a.bin", r"path's suffix.*'\.bin'"),
        (nn.Conv2d(1, 1, 1), {"y": X}, "a.onnx", "expected one named 'x'"),
        (Random(), X, "a.pt2", r"differs from the model by .* it is removed"),
        (Branch(), X, "a.pt2", "torch.export refuses this Branch"),
        (SpectralConv(1, 1, (2, 2), complex_data=True), X, "a.pt2", "`complex_data=True`"),
    ],
)
def test_what_cannot_be_exported_is_refused(model, example, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(model, example, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is needed.*\[export\]"):
        OnnxModel(tmp_path / "a.onnx")


def test_a_file_without_convolutions_is_not_quantised(tmp_path):
    files = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    export_model(nn.Linear(4, 4), {"x": random(2, 4)}, files[0])
    batches = [{"x": random(2, 4)}]
    with pytest.raises(ValueError, match="ship the float file"):
        quantize_onnx(*files, batches, batches)
    assert list(tmp_path.iterdir()) == [files[0]]
