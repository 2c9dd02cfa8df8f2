"""Teachers, data and comparisons that the tests of the cache share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdkd_plugin import (
    DistillationLoss,
    GridTransform,
    LatentPair,
)

GRID = GridTransform((8, 8))
X = torch.randn(22, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = X.roll(1, -1)
ALL = torch.arange(len(X))
TAPS = [LatentPair("0", "0")]


class Teacher(nn.Sequential):
    """Counts its calls, over all copies."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Teacher.calls += 1
        return super().forward(x)


def net(seed: int = 0, kind: type = nn.Sequential) -> nn.Module:
    torch.manual_seed(seed)
    conv = [nn.Conv2d(a, b, 3, padding=1, padding_mode="circular") for a, b in ((1, 4), (4, 1))]
    return kind(conv[0], nn.GELU(), conv[1])


def loss_of(*teachers: Any, **options: Any) -> DistillationLoss:
    return DistillationLoss(teachers or net(1, Teacher), GRID, **options)


def batches(x: Tensor = X, size: int = 4, **more: Any) -> list[dict[str, Any]]:
    return [{"x": part, **more} for part in x.split(size)]


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a.forecast, b.forecast)
        and a.latents.keys() == b.latents.keys()
        and all(torch.equal(a.latents[tap], b.latents[tap]) for tap in a.latents)
        for a, b in zip(one, other, strict=True)
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
