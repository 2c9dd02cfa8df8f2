"""The registered models as neuraloperator models: its configs, its checks, its checkpoints."""

import importlib
import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import Dataset

from sdkd_plugin import GridTransform, SDKDDistiller
from sdkd_plugin.adapters.neuralop import REGISTERED, configs, read_config

from neuralop import get_model  # isort: skip
from neuralop.models import FNO  # isort: skip
from zencfg import ConfigBase, make_config_from_nested_dict  # isort: skip
from zencfg.bunch import Bunch  # isort: skip

SMALL = {
    "sdkd_stalternet": {"width": 4, "depth": 1, "heads": 1},
    "sdkd_simvp": {"width": 4, "latent_width": 8, "depth": 1},
    "sdkd_unet": {"width": 4, "depth": 1},
    "sdkd_resnet": {"width": 4, "depth": 1},
    "sdkd_mlp_mixer": {"width": 4, "depth": 1, "shape": [32, 32]},
}
CHANNELS = {"data_channels": 2, "out_channels": 3}


def make(arch: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = {"model_arch": arch, **CHANNELS, **SMALL[arch], **options}
    return get_model(Bunch({"model": config}))


def fields(*shape: int) -> Tensor:
    return torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))


class Experiment(ConfigBase):
    model: configs.SDKDModelConfig


@pytest.mark.parametrize("arch", SMALL)
def test_from_zencfg_classes(arch):
    shape = {"shape": [32, 32]} if arch == "sdkd_mlp_mixer" else {}
    config = Experiment(model=configs.CONFIGS[arch](**CHANNELS, **shape)).to_dict()
    before = Bunch(config)
    model = get_model(config)
    assert type(model) is REGISTERED[arch]
    assert model(fields(32, 32)).shape == (2, 3, 32, 32)
    assert config == before


@pytest.mark.parametrize("arch", SMALL)
def test_from_a_name(arch):
    config = read_config(arch)
    assert config.model.model_arch == arch
    config.model.update({**CHANNELS, **SMALL[arch]})
    assert get_model(config)(fields(32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("arch", SMALL)
def test_classes_and_names_have_the_models_defaults(arch):
    kind, shape = configs.CONFIGS[arch], {}
    assert getattr(configs, kind.__name__) is kind
    signature = inspect.signature(REGISTERED[arch]).parameters.items()
    required = inspect.Parameter.empty
    expected = {name: p.default for name, p in signature if p.default is not required}
    expected |= {"model_arch": arch, "data_channels": 10, "out_channels": 10}
    assert read_config(arch).model == expected
    if arch == "sdkd_mlp_mixer":
        shape = {"shape": [64, 64]}
        with pytest.raises(ValueError, match="shape"):
            kind()
    assert kind(**shape).to_dict() == {"_config_name": kind.__name__, **expected, **shape}


def test_a_class_checks_its_options(as_shipped):
    with pytest.raises(ValueError, match="widht"):
        configs.UNetConfig(widht=3)
    with pytest.raises(TypeError, match="periodic"):
        configs.UNetConfig(padding="circular")


def test_a_class_is_chosen_by_name_and_changed_like_any_config_of_the_host():
    nested = {"model": {"_config_name": "UNetConfig", "width": 5, **CHANNELS}}
    config = make_config_from_nested_dict(
        type("Own", (Experiment,), {"model": configs.ResNetConfig()}), nested
    )
    assert get_model(config.to_dict()).network(fields(8, 8)).shape == (2, 3, 8, 8)


def test_patching_widens_the_input_as_the_host_does():
    config = Bunch({"model": {"model_arch": "sdkd_unet", **CHANNELS}, "patching": {"levels": 2}})
    assert get_model(config)(torch.zeros(1, 6, 8, 8)).shape == (1, 3, 8, 8)


def test_a_config_of_ones_own(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"model": {"model_arch": "sdkd_unet", **CHANNELS}}))
    assert type(get_model(read_config(file))) is REGISTERED["sdkd_unet"]


def test_configs_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"`source` is 'sdkd_unit', .* Did you mean 'sdkd_unet'"):
        read_config("sdkd_unit")
    (tmp_path / "empty.yaml").write_text("width: 3\n")
    with pytest.raises(ValueError, match=r"empty\.yaml has no `model` with a `model_arch`"):
        read_config(tmp_path / "empty.yaml")


def test_a_missing_option_is_named():
    config = Bunch({"model": {"model_arch": "sdkd_mlp_mixer", **CHANNELS}})
    with pytest.raises(ValueError, match=r"`shape` of 'sdkd_mlp_mixer' is missing .* add it"):
        get_model(config)
    with pytest.raises(ValueError, match=r"`in_channels` of 'sdkd_unet' .*`data_channels`"):
        REGISTERED["sdkd_unet"](out_channels=1)


# neuraloperator's own checks of its models, of these


class Grids(Dataset):
    """In place of the vectors that the host's own tests train on."""

    def __init__(self, n_examples: int) -> None:
        self.x = torch.randn(n_examples, 2, 32, 32)
        self.y = self.x.sum(1, keepdim=True).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.x) // 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


# The host's tests give the host's losses all of a sample, of which these then warn.
@pytest.mark.filterwarnings("ignore:.*received unexpected keyword arguments:UserWarning")
@pytest.mark.parametrize("arch", ["sdkd_resnet", "sdkd_mlp_mixer"])
@pytest.mark.parametrize(
    "name",
    [
        "test_model_checkpoint_saves",
        "test_model_checkpoint_and_resume",
        "test_load_from_checkpoint",
    ],
)
def test_the_hosts_own_trainer_tests(arch, name, tmp_path, monkeypatch):
    with warnings.catch_warnings():  # it sets filters
        tests = importlib.import_module("neuralop.training.tests.test_trainer")

    class Dummy:
        from_checkpoint = REGISTERED[arch].from_checkpoint

        def __new__(cls, features: int) -> nn.Module:
            return make(arch)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tests, "DummyModel", Dummy)
    monkeypatch.setattr(tests, "DummyDataset", Grids)
    getattr(tests, name)()


# Checkpoints


def test_a_checkpoint_is_read_without_its_pickle(tmp_path):
    model = make("sdkd_mlp_mixer", patch=8).eval()
    model.save_checkpoint(tmp_path, "model")
    (tmp_path / "model_metadata.pkl").write_bytes(b"anything")
    again = REGISTERED["sdkd_mlp_mixer"].from_checkpoint(tmp_path, "model").eval()
    assert torch.equal(again(fields(32, 32)), model(fields(32, 32)))


def test_a_checkpoint_keeps_the_defaults_it_was_made_with(tmp_path):
    model = make("sdkd_unet")
    model.save_checkpoint(tmp_path, "model")
    metadata = torch.load(tmp_path / "model_state_dict.pt", weights_only=True)["_metadata"]
    assert metadata["padding"] == "periodic"
    assert metadata["width"] == 4


def test_the_checkpoint_of_another_model_or_version_is_refused(tmp_path, monkeypatch):
    make("sdkd_resnet").save_checkpoint(tmp_path, "model")
    message = r"checkpoint is of the model 'sdkd_resnet' in version '1', expected 'sdkd_unet' in"
    with pytest.raises(ValueError, match=message):
        REGISTERED["sdkd_unet"].from_checkpoint(tmp_path, "model")
    with pytest.raises(ValueError, match=message):
        make("sdkd_unet").load_checkpoint(tmp_path, "model")
    model = make("sdkd_unet")
    monkeypatch.setitem(model._init_kwargs, "_version", "0.9")
    model.save_checkpoint(tmp_path, "model")
    with pytest.raises(ValueError, match=r"'sdkd_unet' in version '0\.9', expected .* '1'"):
        REGISTERED["sdkd_unet"].from_checkpoint(tmp_path, "model")


def test_sizes_of_numpy_are_saved_as_plain_ones(tmp_path, as_shipped):
    shape = tuple(np.array([32, 32]))
    model = make("sdkd_mlp_mixer", width=np.int64(6), shape=shape).eval()
    model.save_checkpoint(tmp_path, "model")
    again = REGISTERED["sdkd_mlp_mixer"].from_checkpoint(tmp_path, "model").eval()
    assert torch.equal(again(fields(32, 32)), model(fields(32, 32)))


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_a_foreign_pickle_is_refused_unexecuted(tmp_path):
    touched = tmp_path / "touched"
    torch.save({"_metadata": Payload(touched)}, tmp_path / "model_state_dict.pt")
    with pytest.raises(ValueError, match=r"model_state_dict\.pt cannot .* not unpickled") as said:
        REGISTERED["sdkd_unet"].from_checkpoint(tmp_path, "model")
    assert "weights_only" not in str(said.value)
    assert not touched.exists()
    torch.load(tmp_path / "model_state_dict.pt", weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_broken_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "model_state_dict.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"as weights and plain values: .* not unpickled") as said:
        REGISTERED["sdkd_unet"].from_checkpoint(tmp_path, "model")
    assert "weights_only" not in str(said.value)


def test_weights_without_options_are_refused_but_load(tmp_path):
    model = make("sdkd_unet")
    state = {k: v for k, v in model.state_dict().items() if k != "_metadata"}
    torch.save(state, tmp_path / "model_state_dict.pt")
    with pytest.raises(ValueError, match="not the options of their model"):
        REGISTERED["sdkd_unet"].from_checkpoint(tmp_path, "model")
    model.load_checkpoint(tmp_path, "model")
    torch.save([1], tmp_path / "model_state_dict.pt")
    with pytest.raises(ValueError, match="holds a list, expected the weights by name"):
        model.load_checkpoint(tmp_path, "model")


def test_an_unknown_option_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    model = make("sdkd_unet")
    monkeypatch.setitem(model._init_kwargs, "widht", 4)
    model.save_checkpoint(tmp_path, "model")
    with pytest.raises(ValueError, match=r"`sdkd_unet option` is 'widht'"):
        REGISTERED["sdkd_unet"].from_checkpoint(tmp_path, "model")


def test_loading_changes_no_state_that_was_given():
    model = make("sdkd_unet")
    state = model.state_dict()
    names = list(state)
    model.load_state_dict(state)
    assert list(state) == names
    assert "_metadata" in names


def test_as_part_of_a_distiller_the_model_adds_weights_alone():
    teacher = FNO(n_modes=(4, 4), in_channels=2, out_channels=3, hidden_channels=4, n_layers=1)
    distiller = SDKDDistiller(teacher, make("sdkd_unet"), GridTransform((32, 32)))
    state = distiller.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    distiller.load_state_dict(state)
