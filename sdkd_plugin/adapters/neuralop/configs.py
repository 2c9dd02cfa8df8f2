"""Configs of neuraloperator's own kind for the registered models, made from their signatures."""

import inspect
import os
import typing
from pathlib import Path
from typing import Any

from zencfg import ConfigBase
from zencfg.bunch import Bunch

from sdkd_plugin._checks import check_choice
from sdkd_plugin.adapters.neuralop.models import NETWORKS
from sdkd_plugin.data.plain_yaml import read_yaml


class SDKDModelConfig(ConfigBase):  # type: ignore[metaclass]  # pydantic's is private
    """What all registered models take; ``get_model`` reads it as a config's ``model``.

    ``data_channels`` are the model's ``in_channels``. A model's own class, such as `UNetConfig`,
    adds the model's options with their defaults.

    Example:
        >>> from neuralop import get_model
        >>> class Experiment(ConfigBase):
        ...     model: SDKDModelConfig = UNetConfig(data_channels=2, out_channels=1)
        >>> type(get_model(Experiment().to_dict())).__name__
        'SDKDUNet'
    """

    model_arch: str
    data_channels: int = 10
    out_channels: int = 10


def _config_class(arch: str) -> Any:
    network = NETWORKS[arch]
    options = inspect.signature(network).parameters.values()
    types = typing.get_type_hints(network.__init__)
    members: dict[str, Any] = {p.name: p.default for p in options if p.default is not p.empty}
    own = {p.name: types[p.name] for p in options if p.name not in ("in_channels", "out_channels")}
    members |= {"model_arch": arch, "__annotations__": {"model_arch": str, **own}}
    members |= {"__module__": __name__, "__doc__": f"Options of ``{arch}``, a registered model."}
    kind: Any = type(SDKDModelConfig)
    return kind(f"{network.__name__}Config", (SDKDModelConfig,), members)


CONFIGS = {arch: _config_class(arch) for arch in NETWORKS}
"""The config classes by the registered models' names."""

STAlterNetConfig, SimVPConfig, UNetConfig, ResNetConfig, MLPMixerConfig = CONFIGS.values()


def read_config(source: str | os.PathLike[str]) -> Bunch:
    """A config for ``neuralop.get_model``: a model's defaults, or a YAML file of your own.

    Args:
        source: the name of a registered model, or a file with a section ``model``.

    Returns:
        the defaults or the file's content; set what your data need, such as
        ``config.model.data_channels`` and, for ``sdkd_mlp_mixer``, ``config.model.shape``.

    Raises:
        ValueError: if there is no such file or model, or the file names no ``model_arch``.

    Example:
        >>> read_config("sdkd_unet").model.padding
        'periodic'
    """
    path = Path(source)
    if not path.is_file():
        check_choice("source", str(source), CONFIGS)
        fields = CONFIGS[str(source)].model_fields.items()
        return Bunch({"model": {name: f.default for name, f in fields if not f.is_required()}})
    content = read_yaml(path)
    model = content.get("model")
    if not isinstance(model, dict) or "model_arch" not in model:
        raise ValueError(
            f"`source` {path} has no `model` with a `model_arch`, expected e.g. "
            "'model: {model_arch: sdkd_unet, data_channels: 10, out_channels: 10}'."
        )
    return Bunch(content)
