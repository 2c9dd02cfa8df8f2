"""Behind neuraloperator: its model registry, its `Trainer`, its data processors.

Importing this registers the grid models as neuraloperator models (``sdkd_unet`` and so on).
"""

from sdkd_plugin.adapters.neuralop import _host  # noqa: F401  # before all that imports the host
from sdkd_plugin.adapters.neuralop.models import REGISTERED
from sdkd_plugin.adapters.neuralop.training import TrainerLoss, distillation_dataset

__all__ = ["REGISTERED", "TrainerLoss", "distillation_dataset"]
