"""Configs of neuraloperator's own kind for the registered models: zencfg classes, and YAML.

Here live one zencfg class a model, and reading the YAML files beside `sdkd_plugin.conf`, one a
model with the same defaults. What the options mean is said by the models.
"""

import os
from pathlib import Path
from typing import Literal

import yaml
from zencfg import ConfigBase
from zencfg.bunch import Bunch

from sdkd_plugin._checks import check_choice
from sdkd_plugin.models.blocks import Padding

_FOLDER = Path(__file__).parents[2] / "conf" / "neuralop"


class SDKDModelConfig(ConfigBase):  # type: ignore[metaclass]  # pydantic's is private
    """What all registered models take; ``get_model`` reads it as a config's ``model``.

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
    padding: Padding = "periodic"


class STAlterNetConfig(SDKDModelConfig):
    """Of ``sdkd_stalternet``, a teacher."""

    model_arch: str = "sdkd_stalternet"
    width: int = 32
    depth: int = 4
    heads: int = 4
    n_downsampling: int = 2
    mlp_ratio: int = 2
    order: Literal["parallel", "serial"] = "parallel"
    coordinates: bool = False


class SimVPConfig(SDKDModelConfig):
    """Of ``sdkd_simvp``, a teacher."""

    model_arch: str = "sdkd_simvp"
    in_frames: int | None = None
    out_frames: int | None = None
    width: int = 16
    latent_width: int = 128
    depth: int = 3
    n_downsampling: int = 2
    translator: Literal["inception", "gated"] = "inception"
    coordinates: bool = False


class UNetConfig(SDKDModelConfig):
    """Of ``sdkd_unet``, a student."""

    model_arch: str = "sdkd_unet"
    width: int = 12
    depth: int = 2
    coordinates: bool = False


class ResNetConfig(SDKDModelConfig):
    """Of ``sdkd_resnet``, a student."""

    model_arch: str = "sdkd_resnet"
    width: int = 28
    depth: int = 4
    downsample: bool = True
    coordinates: bool = False


class MLPMixerConfig(SDKDModelConfig):
    """Of ``sdkd_mlp_mixer``, a student of one grid: ``shape`` has no default."""

    model_arch: str = "sdkd_mlp_mixer"
    shape: list[int]
    patch: int = 4
    width: int = 40
    depth: int = 3
    mlp_ratio: int = 4


def read_config(source: str | os.PathLike[str]) -> Bunch:
    """A config for ``neuralop.get_model``, from YAML.

    Args:
        source: a file, or the name of a registered model for the one that comes with it.

    Returns:
        the file's content; set what your data need, such as ``config.model.data_channels``.

    Raises:
        ValueError: if there is no such file or model, or the file has no ``model`` with a
            ``model_arch``.

    Example:
        >>> from neuralop import get_model
        >>> config = read_config("sdkd_unet")
        >>> config.model.data_channels = 2
        >>> type(get_model(config)).__name__
        'SDKDUNet'
    """
    path = Path(source)
    if not path.is_file():
        check_choice("source", str(source), sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        path = _FOLDER / f"{source}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or "model_arch" not in model:
        raise ValueError(
            f"`source` {path} has no `model` with a `model_arch`, expected e.g. "
            "'model: {model_arch: sdkd_unet, data_channels: 10, out_channels: 10}'."
        )
    return Bunch(content)
