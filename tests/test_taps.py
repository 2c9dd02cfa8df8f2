"""Taps: looking up a place in a model, and reading its activation."""

import copy

import pytest
import torch
from small import one_process  # noqa: F401  # a fixture
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdkd_plugin import TapReader
from sdkd_plugin.taps import tap_path

ZEROS, ONES = torch.zeros(2, 6, 3), torch.ones(2, 6, 3)


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
        return self.side(latent) if sideways else self.decoder(self.memory(latent)[0])


@pytest.fixture
def model() -> Encoded:
    return Encoded()


def test_named_taps_and_module_paths_are_found_and_others_listed(model: Encoded):
    assert tap_path(model, "latent") == "encoder.1"
    assert tap_path(model, "encoder.0") == "encoder.0"
    with pytest.raises(ValueError, match=r"`Encoded` has no tap 'latant'; it names \['latent'\]"):
        tap_path(model, "latant")
    with pytest.raises(ValueError, match=r"no tap 'encoder.7'.* such as \[.*'encoder.1'"):
        TapReader(model, ["latent", "encoder.7"])
    with pytest.raises(ValueError, match=r"it names \[\], .* such as \['0'"):
        tap_path(nn.Sequential(nn.ReLU()), "latent")


@pytest.mark.usefixtures("one_process")
def test_a_model_in_distributed_data_parallel_keeps_its_tap_names(model: Encoded):
    parallel = DistributedDataParallel(model)
    for name in ("latent", "encoder.1", "module.encoder.1"):
        assert tap_path(parallel, name) == "module.encoder.1"
        with TapReader(parallel, [name]) as taps:
            parallel(ONES)
        assert torch.equal(taps.read()[name], model.encoder(ONES))
    with pytest.raises(ValueError, match=r"`Encoded` has no tap 'latant'; it names \['latent'\]"):
        tap_path(parallel, "latant")


def test_reads_the_last_call_with_its_gradient_and_hands_it_over(model: Encoded):
    expected = model(ONES)
    with TapReader(model, ["latent", "encoder.0"]) as taps:
        model(ZEROS)
        assert torch.equal(model(ONES), expected)
        activations = taps.read()
        with pytest.raises(ValueError, match=r"the tap 'latent' .* was not reached .*: call the"):
            taps.read()
    assert set(activations) == {"latent", "encoder.0"}
    assert torch.equal(activations["latent"], model.encoder(ONES))
    activations["latent"].sum().backward()
    assert model.encoder[0].weight.grad is not None


def test_leaves_no_hook_also_where_the_model_fails(model: Encoded):
    reader = TapReader(model, ["latent"])
    with reader as taps:
        taps.attach()  # a second time changes nothing
        assert len(taps.handles) == 1
        model(ONES)
    assert not any(module._forward_hooks for module in model.modules())
    assert list(reader.read()) == ["latent"]
    with pytest.raises(RuntimeError), reader:
        model(torch.ones(2, 6, 9))
    assert not any(module._forward_hooks for module in model.modules())


def test_activations_that_are_not_there_or_no_tensor(model: Encoded):
    for sideways, message in (
        (True, "'memory' .* was not reached in the forward pass of `Encoded`"),
        (False, "'memory' .* gives a tuple, expected a tensor: tap a module inside"),
    ):
        with TapReader(model, ["memory"]) as taps:
            model(ONES, sideways=sideways)
        with pytest.raises(ValueError, match=message):
            taps.read()


def test_a_copy_of_a_tapped_model_does_not_write_into_the_originals_taps():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with TapReader(model, ["0"]) as taps:
        copied = copy.deepcopy(model)
        expected = model(torch.ones(1, 2))
        copied(torch.zeros(5, 2))
    assert torch.equal(taps.read()["0"].relu(), expected)
