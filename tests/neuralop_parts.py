"""Small models, fields, losses and runs of neuraloperator's trainer."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import AdaptiveWeighting, Bands, DistillationLoss, GridTransform, LatentPair
from sdkd_plugin.adapters.neuralop import (
    REGISTERED,
    ResumableState,
    TrainerLoss,
    distillation_dataset,
)

from neuralop import Trainer  # isort: skip
from neuralop.models import FNO  # isort: skip

CHANNELS = {"in_channels": 2, "out_channels": 3}
LATENT = LatentPair("latent", "latent")


def unet(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return REGISTERED["sdkd_unet"](width=width, depth=1, **CHANNELS)


def fno(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return FNO(n_modes=(4, 4), hidden_channels=width, n_layers=1, **CHANNELS)


def fields(n: int = 12, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, size, size, generator=generator)
    return x, x.sum(1, keepdim=True).roll(1, -1).expand(-1, 3, -1, -1).contiguous()


def distillation(student: nn.Module, teacher: object = None, **options: object) -> DistillationLoss:
    domain = GridTransform((8, 8)), Bands.split(0.4)
    loss = DistillationLoss(teacher or unet(seed=9, width=6), *domain, **options)
    return loss.fit_latents(student, fields(1)[0]) if loss.latents else loss


def measuring(student: nn.Module) -> DistillationLoss:
    """With a projector and measured weights: what the host would not save."""
    return distillation(student, weighting=AdaptiveWeighting(2, decay=0.9), latents=[LATENT])


def train(student: nn.Module, loss: Callable[..., Tensor], data: object = None, **options) -> dict:
    """By the host's trainer, for two epochs in batches of 5, 5 and 2 samples; its metrics."""
    names = ("n_epochs", "data_processor", "device", "mixed_precision")
    made = {name: options.pop(name) for name in names if name in options}
    trainer = Trainer(model=student, **{"n_epochs": 2, **made})
    if state := options.pop("state", None):
        options["regularizer"] = state(trainer)
    beside = loss.loss.parameters() if isinstance(loss, TrainerLoss) else []
    optimizer = options.pop("optimizer", torch.optim.AdamW)([*student.parameters(), *beside], 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    shuffling, tests = options.pop("shuffling", None), options.pop("tests", {})
    if not isinstance(data, DataLoader):
        data = data or distillation_dataset(*fields())
        data = DataLoader(data, 5, shuffle=shuffling is not None, generator=shuffling)
    return trainer.train(data, tests, optimizer, scheduler, training_loss=loss, **options)


def assert_same(mine: nn.Module, other: nn.Module) -> None:
    for name, value in mine.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), name


def l1(out: Tensor, y: Tensor, mask: Tensor | None = None, **sample: object) -> Tensor:
    return ((out - y).abs() if mask is None else (out - y).abs()[mask]).sum()


def run(epochs: int, kind: str = "unet", *, with_state: bool = True, **options) -> SimpleNamespace:
    """A run of the host's trainer that is always made alike, with the totals of its steps."""
    made = SimpleNamespace(loss=None, steps=[], shuffling=torch.Generator().manual_seed(3))
    made.student = fno() if kind == "fno" else unet()
    if kind != "fno":  # its forecast draws random numbers while it trains
        noise = lambda network, x: (F.dropout(x[0], 0.1, network.training),)  # noqa: E731
        made.student.network.register_forward_pre_hook(noise)
    if kind != "plain":
        distilled = (measuring if kind == "unet" else distillation)(made.student)
        made.loss = TrainerLoss(distilled, made.student, on_step=made.steps.append)

    def state(trainer: Trainer) -> ResumableState | None:
        made.trainer, made.state = trainer, ResumableState(trainer, made.loss, [made.shuffling])
        return made.state if with_state else None

    options |= {"n_epochs": epochs, "shuffling": made.shuffling, "state": state}
    train(made.student, made.loss or l1, **options)
    made.totals = [terms.total.item() for terms in made.steps]
    return made
