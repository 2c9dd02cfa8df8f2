"""Behind neuraloperator: its model registry, its `Trainer`, its data processors.

Importing this registers the grid models as neuraloperator models (``sdkd_unet`` and so on).
"""

from sdkd_plugin.adapters.neuralop import _host  # noqa: F401  # before all that imports the host
from sdkd_plugin.adapters.neuralop.configs import read_config
from sdkd_plugin.adapters.neuralop.data import load_navier_stokes
from sdkd_plugin.adapters.neuralop.exporting import real_spectral_conv
from sdkd_plugin.adapters.neuralop.inheriting import inherit
from sdkd_plugin.adapters.neuralop.models import REGISTERED, get_model_class
from sdkd_plugin.adapters.neuralop.resuming import ResumableState
from sdkd_plugin.adapters.neuralop.training import TrainerLoss, distillation_dataset
from sdkd_plugin.adapters.neuralop.units import Renormalized

__all__ = [
    "REGISTERED",
    "Renormalized",
    "ResumableState",
    "TrainerLoss",
    "distillation_dataset",
    "get_model_class",
    "inherit",
    "load_navier_stokes",
    "read_config",
    "real_spectral_conv",
]
