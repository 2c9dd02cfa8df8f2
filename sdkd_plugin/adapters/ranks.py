"""What is trained or measured beside the student, kept the same on all processes.

Here live the few collectives that DistributedDataParallel does not do: it sees the student alone,
and takes buffers from the first process.
"""

from torch import Tensor, nn
from torch import distributed as dist

from sdkd_plugin.distiller import SDKDDistiller
from sdkd_plugin.losses import AbstractWeighting


class RankSync:
    """Keeps a distiller's projectors and measured weights the same on all processes.

    Projectors start as those of the first process, and their gradients are averaged, as
    DistributedDataParallel does for the student. Averages that weightings keep, of latents too, are
    averaged after every step.

    Args:
        distiller: the same on all processes but for its numbers.
    """

    def __init__(self, distiller: SDKDDistiller) -> None:
        self._joined = False
        self._parts = [module for module in distiller.children() if module is not distiller.student]

    def join(self) -> None:
        """Start as the first process; does nothing a second time, or with a single process."""
        if self._joined or not _several_ranks():
            return
        self._joined = True
        for module in self._parts:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_average_gradient)

    def average(self) -> None:
        """Average what the weighting measured in this step."""
        for part in self._parts:
            average_measurements(part)


def average_measurements(part: nn.Module) -> None:
    """Average over the processes what a part's weightings have measured; nothing with only one."""
    if not _several_ranks():
        return
    for module in part.modules():
        if isinstance(module, AbstractWeighting):
            for value in module.state_dict().values():
                _average(value)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _average_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        _average(parameter.grad)


def _average(value: Tensor) -> None:
    # gloo has no mean of its own.
    dist.all_reduce(value)
    value /= dist.get_world_size()
