"""The grid models, registered as neuraloperator models under names that begin with ``sdkd_``."""

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from neuralop.models.base_model import BaseModel
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice
from sdkd_plugin._plain import load_plain
from sdkd_plugin.models import MLPMixer, ResNet, SimVP, STAlterNet, UNet
from sdkd_plugin.models.registry import register_host

VERSION = "1"  # of the layers: raise it when weights saved before would mean something else

NETWORKS: dict[str, type[nn.Module]] = {
    "sdkd_stalternet": STAlterNet,
    "sdkd_simvp": SimVP,
    "sdkd_unet": UNet,
    "sdkd_resnet": ResNet,
    "sdkd_mlp_mixer": MLPMixer,
}

# What zencfg and the host leave among the options.
_NO_OPTIONS = ("_config_name", "_name", "_version", "args")


def register(name: str, network: Callable[..., Any]) -> type[BaseModel]:
    """Make a neuraloperator model of a grid model, for `get_model`, its trainer and checkpoints.

    The model takes the network's keyword arguments, and its forward ignores the rest of a sample,
    since the host's ``Trainer`` passes all of it. Its checkpoints are the host's files, but the
    options are read from the weights' file, where the host keeps them too; nothing is unpickled.

    Raises:
        ValueError: if the name is taken; from the class, if an option is unknown or missing; from
            its loading, if a checkpoint is of another model or version, or not plain.
    """
    if taken := BaseModel._models.get(name.lower()):
        raise ValueError(
            f"`name` is {name!r}, which neuraloperator has registered for "
            f"{taken.__module__}.{taken.__qualname__}: choose another."
        )
    signature = inspect.signature(network)

    class Model(BaseModel, name=name):  # type: ignore[call-arg]  # untyped host
        _version = VERSION
        _init_kwargs: dict[str, Any]
        # The host reads it, and so records the defaults too: a checkpoint outlives their change.
        __signature__ = signature

        def __init__(self, **options: Any) -> None:
            super().__init__()
            options = {key: value for key, value in options.items() if key not in _NO_OPTIONS}
            _check_options(name, options, signature)
            # NumPy's numbers in a checkpoint could not be read without unpickling.
            self._init_kwargs = {key: _plain(value) for key, value in self._init_kwargs.items()}
            self.network = network(**options)
            self.taps = {tap: f"network.{path}" for tap, path in self.network.taps.items()}

        def forward(self, x: Tensor, **sample: Any) -> Tensor:
            """Forecast, from ``x`` alone."""
            return self.network(x)

        def state_dict(self, *, prefix: str = "", **options: Any) -> dict[str, Any]:
            """The weights, and the host's metadata where the model is not part of another."""
            # The whole would refuse to load a part's metadata among its weights.
            if prefix:
                return nn.Module.state_dict(self, prefix=prefix, **options)
            return super().state_dict(**options)

        def load_state_dict(self, state_dict: Mapping[str, Any], **options: Any) -> Any:
            """As torch's, and refuses the weights of another model or version."""
            # Not a dict of its items: torch's own versions of the modules are in an attribute.
            state = copy.copy(state_dict)
            if (metadata := cast(dict[str, Any], state).pop("_metadata", None)) is not None:
                _check_metadata(metadata, name)
            return nn.Module.load_state_dict(self, state, **options)

        def load_checkpoint(
            self, save_folder: str | os.PathLike[str], save_name: str, map_location: Any = None
        ) -> None:
            """Load the weights of a checkpoint into this model."""
            self.load_state_dict(_read_state(save_folder, save_name, map_location))

        @classmethod
        def from_checkpoint(
            cls, save_folder: str | os.PathLike[str], save_name: str, map_location: Any = None
        ) -> "Model":
            """The model of a checkpoint, from its weights' file alone."""
            state = _read_state(save_folder, save_name, map_location)
            if not isinstance(metadata := state.get("_metadata"), Mapping):
                raise ValueError(
                    f"{save_name!r} in {save_folder} has weights but not the options of their "
                    "model: make the model yourself and call its `load_checkpoint`."
                )
            _check_metadata(metadata, name)
            model = cls(**{key: v for key, v in metadata.items() if key not in _NO_OPTIONS})
            model.load_state_dict(state)
            return model

    Model.__name__ = Model.__qualname__ = f"SDKD{network.__name__}"
    Model.__doc__ = f"`{network.__name__}` as the neuraloperator model {name!r}."
    return Model


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _check_options(name: str, options: Mapping[str, Any], signature: inspect.Signature) -> None:
    for option in options:
        check_choice(f"{name} option", option, signature.parameters)
    for option, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(
                f"`{option}` of {name!r} is missing and has no default: add it to the model's "
                "section of the config (where `data_channels` stands for `in_channels`)."
            )


def _read_state(folder: str | os.PathLike[str], name: str, map_location: Any) -> dict[str, Any]:
    path = Path(folder) / f"{name}_state_dict.pt"
    state = load_plain(path, map_location)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected the weights by name.")
    return state


def _check_metadata(metadata: Mapping[str, Any], name: str) -> None:
    saved, version = metadata.get("_name"), metadata.get("_version")
    if (saved, version) != (name, VERSION):
        raise ValueError(
            f"the checkpoint is of the model {saved!r} in version {version!r}, expected {name!r} "
            f"in version {VERSION!r}: load it with the class and the release that wrote it."
        )


def get_model_class(name: str) -> type[nn.Module]:
    """The neuraloperator model of a registered name, such as ``fno``; a ValueError lists them."""
    check_choice("model", name, BaseModel._models)
    return cast(type[nn.Module], BaseModel._models[name])


REGISTERED = {name: register(name, network) for name, network in NETWORKS.items()}
"""The registered classes by name."""

register_host("neuralop", get_model_class)
