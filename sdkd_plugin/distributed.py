"""Several processes: what is trained or measured beside the student is the same on all of them.

DistributedDataParallel wraps the student alone, and copies buffers from the first process.
"""

from datetime import timedelta

from torch import Tensor, nn
from torch import distributed as dist

from sdkd_plugin.losses import AbstractWeighting

PATIENCE = timedelta(minutes=10)
"""How long processes wait for one that takes no step, with gloo."""


class DistributedSync:
    """Keeps the projectors and measured weights of a loss the same on all processes.

    Projectors start with the first process's weights, and their gradients are averaged, as
    DistributedDataParallel does for the student. The loss must have the same parts on all
    processes.
    """

    def __init__(self, loss: nn.Module) -> None:
        self._joined = False
        self._loss = loss

    def join(self) -> None:
        """Copy the first process's state, once; nothing with a single process."""
        if self._joined or not several_processes():
            return
        self._joined = True
        for value in self._loss.state_dict().values():
            dist.broadcast(value, src=0)
        for parameter in self._loss.parameters():
            parameter.register_post_accumulate_grad_hook(_average_gradient)


def average_measurements(loss: nn.Module) -> None:
    """Average over the processes what a loss's weightings measured; nothing with a single one.

    Raises:
        RuntimeError: with gloo, naming the processes that did not come within `PATIENCE`.
    """
    if not several_processes():
        return
    parts = [module for module in loss.modules() if isinstance(module, AbstractWeighting)]
    if values := [value for part in parts for value in part.state_dict().values()]:
        if dist.get_backend() == "gloo":
            # Names the process that is stopped, which no collective does.
            dist.monitored_barrier(timeout=PATIENCE)
        for value in values:
            _average(value)


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _average_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        _average(parameter.grad)


def _average(value: Tensor) -> None:
    # gloo has no mean of its own.
    dist.all_reduce(value)
    value /= dist.get_world_size()
