"""Taps: looking a place in a model up, and reading what it gives."""

import pytest
import torch
from torch import Tensor, nn

from sdkd_plugin import TapReader
from sdkd_plugin.taps import tap_path


class Encoded(nn.Module):
    """Names a tap, has a branch that may be skipped, and a module that returns a pair."""

    taps = {"latent": "encoder.1"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.memory = nn.GRU(5, 4, batch_first=True)
        self.side = nn.Linear(5, 2)
        self.decoder = nn.Linear(4, 3)

    def forward(self, x: Tensor, sideways: bool = False) -> Tensor:
        latent = self.encoder(x)
        if sideways:
            return self.side(latent)
        return self.decoder(self.memory(latent)[0])


@pytest.fixture
def model() -> Encoded:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoded()


def test_a_named_tap_and_a_module_path_are_found(model: Encoded):
    assert tap_path(model, "latent") == "encoder.1"
    assert tap_path(model, "encoder.0") == "encoder.0"


def test_an_unknown_tap_lists_those_that_exist(model: Encoded):
    with pytest.raises(ValueError, match=r"`Encoded` has no tap 'latant'; it names \['latent'\]"):
        tap_path(model, "latant")
    with pytest.raises(ValueError, match=r"no tap 'encoder.7'.* such as \[.*'encoder.1'"):
        TapReader(model, ["latent", "encoder.7"])
    with pytest.raises(ValueError, match=r"it names \[\], .* such as \['0'"):
        tap_path(nn.Sequential(nn.ReLU()), "latent")


def test_reads_what_the_module_gave_with_its_gradient(model: Encoded):
    x = torch.ones(2, 6, 3)
    with TapReader(model, ["latent", "encoder.0"]) as taps:
        model(x)
        activations = taps.read()
    assert set(activations) == {"latent", "encoder.0"}
    torch.testing.assert_close(activations["latent"], model.encoder(x))
    activations["latent"].sum().backward()
    assert model.encoder[0].weight.grad is not None


def test_reads_the_last_call_and_hands_it_over(model: Encoded):
    expected = model.encoder(torch.ones(2, 6, 3))
    with TapReader(model, ["latent"]) as taps:
        model(torch.zeros(2, 6, 3))
        model(torch.ones(2, 6, 3))
        assert torch.equal(taps.read()["latent"], expected)
        with pytest.raises(ValueError, match=r"the tap 'latent' .* was not reached .*call the"):
            taps.read()


def test_does_not_change_the_forecast_and_leaves_no_hook(model: Encoded):
    x = torch.ones(2, 6, 3)
    before = model(x)
    reader = TapReader(model, ["latent"])
    with reader as taps:
        taps.attach()  # a second time changes nothing
        assert torch.equal(model(x), before)
    assert all(not module._forward_hooks for module in model.modules())
    assert list(reader.read()) == ["latent"]


def test_detaches_when_the_model_fails(model: Encoded):
    with pytest.raises(RuntimeError), TapReader(model, ["latent"]):
        model(torch.ones(2, 6, 9))
    assert all(not module._forward_hooks for module in model.modules())


def test_a_tap_that_was_not_reached(model: Encoded):
    with TapReader(model, ["memory"]) as taps:
        model(torch.ones(2, 6, 3), sideways=True)
        with pytest.raises(ValueError, match=r"'memory' .* was not reached in the forward pass of"):
            taps.read()


def test_a_module_whose_output_is_no_tensor(model: Encoded):
    with TapReader(model, ["memory"]) as taps:
        model(torch.ones(2, 6, 3))
        with pytest.raises(ValueError, match=r"'memory' .* gives a tuple, expected a tensor"):
            taps.read()
