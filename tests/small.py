"""Small models and fields that the tests of the losses and the core share."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdkd_plugin import Bands, DistillationLoss, GridTransform, LatentPair, SDKDDistiller

GRID = (8, 9)
BANDS = Bands.split(0.3)
LATENTS = [LatentPair("0", "0"), LatentPair("0", "3", weight=0.5, bands=Bands.dyadic(3))]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@contextmanager
def medium_precision() -> Iterator[None]:
    """Products of float32 in fewer digits, where the processor has them."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def batch(seed: int = 0, n: int = 5) -> tuple[Tensor, Tensor]:
    return random(n, 2, *GRID, seed=2 * seed), random(n, 3, *GRID, seed=2 * seed + 1)


X, Y = batch()


def refusals(*cases: tuple, of: Callable | None = None) -> Callable:
    """A test that each call, or ``of`` with each arguments, is refused with a message's pattern."""

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(("call", "message"), cases)
    def test(call: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call() if of is None else of(**call)

    return test


def net(width: int = 4, seed: int = 2, *, regularised: bool = False) -> nn.Sequential:
    """Conv - (BatchNorm, Dropout) or two activations - Conv - Conv, with weights of its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm2d(width), nn.Dropout(0.3)] if regularised else [nn.Tanh(), nn.ReLU()]
        return nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            *middle,
            nn.Conv2d(width, width, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(width, 3, 3, padding=1),
        )


def teacher_net() -> nn.Sequential:
    return net(7, seed=1, regularised=True)


def make_loss(**options: object) -> DistillationLoss:
    given = {"teacher": teacher_net(), "transform": GridTransform(GRID), "bands": BANDS}
    return DistillationLoss(**(given | options))


def make(**options: object) -> SDKDDistiller:
    given = {"teacher": teacher_net(), "student": net(), "transform": GridTransform(GRID)}
    return SDKDDistiller(**(given | {"bands": BANDS} | options))


def with_latents(**options: object) -> SDKDDistiller:
    return make(**({"latents": LATENTS, "example": {"x": X[:2]}} | options))


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float = 1e-2,
) -> list[float]:
    """Adam steps on the losses of the numbers 0, 1, ...; the losses."""
    optimiser, values = torch.optim.Adam(parameters, rate), []
    for i in range(steps):
        value = loss(i)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    return values


def train(distiller: SDKDDistiller, steps: int) -> list[float]:
    return descend(distiller.parameters(), lambda i: distiller.step(*batch(i)).total, steps)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Whether tensors are equal bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Recorded(nn.Module):
    """Remembers the inputs of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.model(x)


class GraphLayer(nn.Module):
    """A graph network ``(batch, time, nodes, features)``."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encode = nn.Linear(1, width)
            self.decode = nn.Linear(width, 1)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        latent = self.encode(x)
        messages = latent[..., edge_index[0], :]
        if edge_weight is not None:
            messages = messages * edge_weight[:, None]
        around = torch.zeros_like(latent).index_add(-2, edge_index[1], messages)
        return self.decode(torch.tanh(latent + around))


def random_graph() -> dict[str, Tensor]:
    """Thirty weighted edges between ten nodes."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 10, (2, 30), generator=generator)
    return {"edge_index": edges, "edge_weight": torch.rand(30, generator=generator)}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
