"""Does distillation pay on given data, and with which options? One harness for all comparisons."""

from sdkd_plugin.study.comparison import study
from sdkd_plugin.study.result import Result
from sdkd_plugin.study.task import Arm, Samples, Task, standard_arms
from sdkd_plugin.study.tasks import (
    apebench_task,
    navier_stokes_task,
    rayleigh_benard_task,
    taxibj_task,
    traffic_task,
    weatherbench_task,
)

__all__ = [
    "Arm",
    "Result",
    "Samples",
    "Task",
    "apebench_task",
    "navier_stokes_task",
    "rayleigh_benard_task",
    "standard_arms",
    "study",
    "taxibj_task",
    "traffic_task",
    "weatherbench_task",
]
