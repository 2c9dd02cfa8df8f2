"""Behind torch-spatiotemporal (``tsl``): models, the distillation predictor, traffic data sets.

Importing this makes tsl importable where its compiled extensions are absent, and imports it.
"""

from sdkd_plugin.adapters.tsl._host import STANDINS  # before all that imports the host
from sdkd_plugin.adapters.tsl.data import load_traffic, spatiotemporal_dataset
from sdkd_plugin.adapters.tsl.models import SDKDStudent, SDKDTeacher
from sdkd_plugin.adapters.tsl.predictor import DistillationPredictor

__all__ = [
    "STANDINS",
    "DistillationPredictor",
    "SDKDStudent",
    "SDKDTeacher",
    "load_traffic",
    "spatiotemporal_dataset",
]
