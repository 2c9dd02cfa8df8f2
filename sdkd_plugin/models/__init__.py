"""Teachers and students: plain modules with named taps."""

from sdkd_plugin.models.graph_alternet import GraphAlterNet
from sdkd_plugin.models.graph_mixer import GraphMixer
from sdkd_plugin.models.mlp_mixer import MLPMixer
from sdkd_plugin.models.resnet import ResNet
from sdkd_plugin.models.simvp import SimVP
from sdkd_plugin.models.stalternet import STAlterNet
from sdkd_plugin.models.unet import UNet

__all__ = ["GraphAlterNet", "GraphMixer", "MLPMixer", "ResNet", "STAlterNet", "SimVP", "UNet"]
