"""The systems of the ablation: data, teachers, student, and how long each trains.

Here live the sizes, chosen once. The data themselves are in `_ablation_data`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from _ablation_data import NavierStokes, Problem, Traffic
from torch import nn

from sdkd_plugin import models

NetworkName = Literal["GraphAlterNet", "GraphMixer", "STAlterNet", "SimVP", "UNet"]


@dataclass(frozen=True)
class Network:
    """A model of this package and its options."""

    name: NetworkName
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, problem: Problem, seed: int) -> nn.Module:
        """The model for a problem, with the weights of a seed."""
        torch.manual_seed(seed)
        network: type[nn.Module] = getattr(models, self.name)
        return network(**problem.sizes, **self.options).to(problem.training.x.device)


@dataclass(frozen=True)
class Training:
    """Adam, its rate falling along a cosine; the weights with the least validation error count."""

    steps: int
    lr: float
    batch_size: int
    validations: int = 10


@dataclass(frozen=True)
class System:
    """One column of experiments.

    Attributes:
        data: what is forecast.
        teachers: the first teaches all rows, the others those with several teachers.
        student: of every row.
        teaching: how teachers are trained, on all labels.
        learning: how students are trained.
        kd_weight: what the teacher counts for against the labels.
        cutoff: between the low and the high band.
    """

    data: NavierStokes | Traffic
    teachers: tuple[Network, ...]
    student: Network
    teaching: Training
    learning: Training
    kd_weight: float
    cutoff: float = 0.25


def turbulence(viscosity: float, *, full: bool) -> System:
    """Navier-Stokes at one viscosity."""
    data = (
        NavierStokes(viscosity, 64, 256, training=960, validation=120, test=120)
        if full
        else NavierStokes(viscosity, 32, 64, training=120, validation=30, test=50)
    )
    width, depth, latent_width = (64, 4, 256) if full else (16, 3, 64)
    return System(
        data,
        teachers=(
            Network("STAlterNet", {"width": width, "depth": depth, "coordinates": True}),
            Network(
                "SimVP",
                {"width": 16 if full else 8, "latent_width": latent_width, "coordinates": True},
            ),
        ),
        student=Network("UNet", {"width": 16 if full else 8, "coordinates": True}),
        teaching=Training(20_000 if full else 800, 1e-3 if full else 2e-3, batch_size=10),
        # On a CPU many small batches teach more in the same time than a few large ones.
        learning=Training(10_000 if full else 800, 3e-3, batch_size=10 if full else 4),
        kd_weight=10.0,
    )


def traffic(*, full: bool) -> System:
    """The Los-loop week."""
    return System(
        Traffic(),
        teachers=(
            Network("GraphAlterNet", {} if full else {"patch_size": 12, "hops": 2}),
            Network("GraphMixer", {"hidden_size": 96, "emb_size": 16, "n_layers": 3}),
        ),
        student=Network("GraphMixer"),
        teaching=Training(4_000 if full else 600, 4e-3, batch_size=32),
        learning=Training(4_000 if full else 500, 5e-3, batch_size=32),
        kd_weight=1.0,
    )


SYSTEMS: dict[str, dict[str, System]] = {
    preset: {
        "ns_1e-3": turbulence(1e-3, full=full),
        "ns_1e-5": turbulence(1e-5, full=full),
        "traffic": traffic(full=full),
    }
    for preset, full in {"quick": False, "full": True}.items()
}
"""By preset and by the name that ``--systems`` takes."""
