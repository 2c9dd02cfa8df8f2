"""The grid models, registered as neuraloperator models under names that begin with ``sdkd_``.

Here live the registration, and checkpoints that are read without unpickling anything. Configs of
the host's kind are in `configs`.
"""

import copy
import inspect
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from neuralop.models.base_model import BaseModel
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice
from sdkd_plugin.models import MLPMixer, ResNet, SimVP, STAlterNet, UNet

VERSION = "1"
"""Of the models' layers: raise it when weights saved before would mean something else."""

_METADATA = "_metadata"
_CONFIG_NAME = "_config_name"


def register(name: str, network: Callable[..., nn.Module]) -> type[BaseModel]:
    """Make a neuraloperator model of a grid model, for `get_model`, its trainer and checkpoints.

    The model takes the network's own keyword arguments. Its forward ignores whatever else is in
    a sample, as the host's ``Trainer`` passes all of it. Its checkpoints are the host's files, but
    reading them unpickles nothing: the options come from the weights' file, where the host keeps
    them too, and the host's pickle beside it is not opened.

    Args:
        name: under which the host finds it, in lower case.
        network: makes the network from keyword arguments.

    Returns:
        the registered class.

    Raises:
        ValueError: if the name is taken; from the class, if an option is unknown or missing; from
            its loading, if a checkpoint is of another model or version, or holds anything but
            tensors and plain values.
    """
    if name.lower() in BaseModel._models:
        taken = BaseModel._models[name.lower()]
        raise ValueError(
            f"`name` is {name!r}, which neuraloperator has registered for "
            f"{taken.__module__}.{taken.__qualname__}: choose another."
        )
    signature = inspect.signature(network)

    class Model(BaseModel, name=name):  # type: ignore[call-arg]  # untyped host
        _version = VERSION
        # The host reads it, and so records the defaults too: a checkpoint outlives their change.
        __signature__ = signature

        def __init__(self, **options: Any) -> None:
            super().__init__()
            # zencfg leaves the name of a config class among its values.
            options.pop(_CONFIG_NAME, None)
            _check_options(name, options, signature.parameters.values())
            self.network = network(**options)

        @property
        def taps(self) -> dict[str, str]:
            """Tap names and module paths, the network's own."""
            taps = cast(dict[str, str], self.network.taps)
            return {tap: f"network.{path}" for tap, path in taps.items()}

        def forward(self, x: Tensor, **sample: Any) -> Tensor:
            """Forecast, from ``x`` alone."""
            forecast: Tensor = self.network(x)
            return forecast

        def state_dict(
            self,
            destination: dict[str, Any] | None = None,
            prefix: str = "",
            keep_vars: bool = False,
        ) -> dict[str, Any]:
            """The weights, and the host's metadata where the model is not part of another."""
            # As a part, the host's models would write their metadata among the whole's weights,
            # which the whole then refuses to load.
            arguments: Any = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
            if prefix:
                return nn.Module.state_dict(self, **arguments)
            return super().state_dict(**arguments)

        def load_state_dict(
            self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
        ) -> Any:
            """As torch's, and refuses the weights of another model or version."""
            # Not a dict of its items: torch's own versions of the modules are in an attribute.
            state = copy.copy(state_dict)
            metadata = cast(dict[str, Any], state).pop(_METADATA, None)
            if metadata is not None:
                _check_metadata(metadata, name)
            return nn.Module.load_state_dict(self, state, strict=strict, assign=assign)

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
            metadata = state.get(_METADATA)
            if not isinstance(metadata, Mapping):
                raise ValueError(
                    f"`save_folder`/`save_name` {_state_path(save_folder, save_name)} has weights "
                    "but not the options of their model: make the model yourself and call its "
                    "`load_checkpoint`."
                )
            _check_metadata(metadata, name)
            options = {
                option: value
                for option, value in metadata.items()
                if option not in ("_name", "_version", "args")
            }
            model = cls(**options)
            model.load_state_dict(state)
            return model

    Model.__name__ = Model.__qualname__ = f"SDKD{network.__name__}"
    Model.__doc__ = f"`{network.__name__}` as the neuraloperator model {name!r}."
    return Model


def _check_options(
    name: str, options: Mapping[str, Any], parameters: Iterable[inspect.Parameter]
) -> None:
    parameters = list(parameters)
    for option in options:
        check_choice(f"{name} option", option, [p.name for p in parameters])
    for parameter in parameters:
        if parameter.default is inspect.Parameter.empty and parameter.name not in options:
            meaning = {
                "shape": "the sizes (nx, ny) of the one grid that this model can run on",
                "in_channels": "input frames times variables (`data_channels` in a config)",
                "out_channels": "forecast frames times variables",
            }.get(parameter.name, "a value")
            raise ValueError(
                f"`{parameter.name}` of {name!r} is missing, expected {meaning}: it has no "
                "default, so add it to the model's section of the config."
            )


def _state_path(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}_state_dict.pt"


def _read_state(
    folder: str | os.PathLike[str], name: str, map_location: Any = None
) -> dict[str, Any]:
    path = _state_path(folder, name)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    # What torch raises of a pickle it will not execute, of a broken archive, and of an empty file.
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the checkpoint {path} is not one that can be read safely, expected a file of tensors "
            "and plain values: it is broken, or holds other objects, which were not executed. Save "
            "it again with the model's own `save_checkpoint`, and give the model plain options."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"the checkpoint {path} holds a {type(state).__name__}, expected the weights by name: "
            "save the model with its own `save_checkpoint`."
        )
    return state


def _check_metadata(metadata: Mapping[str, Any], name: str) -> None:
    saved, version = metadata.get("_name"), metadata.get("_version")
    if saved != name:
        raise ValueError(
            f"the checkpoint is of the model {saved!r}, expected {name!r}: load it with the class "
            "of that name, or give the folder of this model's own checkpoint."
        )
    if version != VERSION:
        raise ValueError(
            f"the checkpoint is of version {version!r} of {name!r}, expected {VERSION!r}: load it "
            "with the release of sdkd_plugin that wrote it, or train again."
        )


REGISTERED: dict[str, type[BaseModel]] = {
    name: register(name, network)
    for name, network in {
        "sdkd_stalternet": STAlterNet,
        "sdkd_simvp": SimVP,
        "sdkd_unet": UNet,
        "sdkd_resnet": ResNet,
        "sdkd_mlp_mixer": MLPMixer,
    }.items()
}
"""The registered classes by name."""
