"""Behind torch-spatiotemporal (``tsl``): models, the distillation predictor, traffic data sets.

Importing this makes tsl importable where its compiled extensions are absent, and imports it.
"""

from sdkd_plugin.adapters.tsl._host import STANDINS  # before all that imports the host
from sdkd_plugin.adapters.tsl.checkpoint import PlainPredictor, load_weights
from sdkd_plugin.adapters.tsl.datasets import (
    DATASETS,
    TrafficDataset,
    get_dataset,
    load_traffic,
    spatiotemporal_dataset,
)
from sdkd_plugin.adapters.tsl.graphs import DisjointGraphs, SharedSensors
from sdkd_plugin.adapters.tsl.model_card import model_card
from sdkd_plugin.adapters.tsl.models import SDKDStudent, SDKDTeacher
from sdkd_plugin.adapters.tsl.predictor import DistillationPredictor
from sdkd_plugin.adapters.tsl.registry import (
    check_hparams,
    get_model_class,
    get_optimizer_class,
    get_scheduler_class,
    loss_from_config,
    make_model,
    refuse_targets,
)
from sdkd_plugin.adapters.tsl.resuming import SeededDataModule, SeededEpochs
from sdkd_plugin.adapters.tsl.sensors import OnSensors, match_sensors
from sdkd_plugin.adapters.tsl.windows import number_windows, window_inputs

__all__ = [
    "DATASETS",
    "STANDINS",
    "DisjointGraphs",
    "DistillationPredictor",
    "OnSensors",
    "PlainPredictor",
    "SDKDStudent",
    "SDKDTeacher",
    "SeededDataModule",
    "SeededEpochs",
    "SharedSensors",
    "TrafficDataset",
    "check_hparams",
    "get_dataset",
    "get_model_class",
    "get_optimizer_class",
    "get_scheduler_class",
    "load_traffic",
    "load_weights",
    "loss_from_config",
    "make_model",
    "match_sensors",
    "model_card",
    "number_windows",
    "refuse_targets",
    "spatiotemporal_dataset",
    "window_inputs",
]
