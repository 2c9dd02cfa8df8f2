"""Trained teachers: the attention branch carries lower frequencies than the convolution branch.

The tapped latents are compared after their mean over the samples is subtracted: biases and whatever
else is the same for every sample would decide the comparison, since attention adds much of it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sdkd_plugin.data import TrafficData, navier_stokes, simulate_traffic
from sdkd_plugin.models import GraphAlterNet, STAlterNet
from sdkd_plugin.models.stalternet import Order
from sdkd_plugin.spectral import Bands, GraphTransform, GridTransform
from sdkd_plugin.spectral.basis import AbstractBasisTransform
from sdkd_plugin.taps import TapReader

LOW, HIGH = "latent_low", "latent_high"


class Content(NamedTuple):
    """Frequency content of a latent: its mean frequency, and the share from 0.25 on."""

    mean_frequency: float
    high_share: float


def content(transform: AbstractBasisTransform, latent: Tensor) -> Content:
    frequencies, energy = transform.spectrum(latent - latent.mean(0, keepdim=True))
    frequencies = frequencies.to(energy)
    shares = energy / energy.sum()
    return Content(float(shares @ frequencies), float(shares @ Bands.split(0.25)(frequencies)[1]))


def branches(
    model: nn.Module,
    transform: AbstractBasisTransform,
    forecast: Callable[[], Tensor],
    also: Sequence[str] = (),
) -> dict[str, Content]:
    with TapReader(model, [LOW, HIGH, *also]) as taps:
        forecast()
    return {name: content(transform, latent) for name, latent in taps.read().items()}


def train(model: nn.Module, loss: Callable[[], Tensor], *, steps: int, peak_lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    model.eval()


def test_content_is_that_of_known_waves() -> None:
    grid = GridTransform((16, 16))
    wave = torch.cos(2 * torch.pi * torch.arange(16) / 16 * 4).expand(16, 16)
    amplitudes = torch.tensor([1.0, -1.0, 3.0, 2.0])[:, None, None, None]
    # Half the highest frequency along one axis of two, under a pattern that all samples share.
    fixed = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert content(grid, amplitudes * wave + fixed) == pytest.approx((0.5 / 2**0.5, 1.0))
    flat = amplitudes.expand(-1, 1, 16, 16)
    assert content(grid, flat + fixed) == pytest.approx((0.0, 0.0), abs=1e-6)


@pytest.fixture(scope="module")
def turbulence() -> Tensor:
    flow = {"resolution": 32, "solver_resolution": 64, "viscosity": 1e-4, "duration": 16.0}
    fields = navier_stokes(40, **flow, cache=False, progress=False)
    return fields / fields.std()


def trained_on_turbulence(
    fields: Tensor, *, seed: int, depth: int, order: Order, steps: int
) -> dict[str, Content]:
    """A teacher on a latent of 16 x 16 points, and what its branches carry on unseen fields."""
    training, unseen = fields[:32], fields[32:]
    torch.manual_seed(seed)
    sizes = {"in_channels": 4, "out_channels": 4, "width": 8, "heads": 2, "n_downsampling": 1}
    teacher = STAlterNet(**sizes, depth=depth, order=order, coordinates=True)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        samples = torch.randint(len(training), (8,), generator=generator)
        start = int(torch.randint(fields.shape[1] - 7, (), generator=generator))
        window = training[samples, start : start + 8]
        return nn.functional.mse_loss(teacher(window[:, :4]), window[:, 4:])

    train(teacher, loss, steps=steps, peak_lr=2e-3)
    x, y = torch.cat([unseen[:, :8], unseen[:, 8:]]).split(4, dim=1)
    with torch.no_grad():
        error = nn.functional.mse_loss(teacher(x), y)
        carried = branches(teacher, GridTransform((16, 16)), lambda: teacher(x))
    persistence = nn.functional.mse_loss(x[:, -1:].expand_as(y), y)
    print(f"error over persistence {float(error / persistence):.3f}; {carried}")
    assert error < 0.9 * persistence, "it has hardly learnt"
    return carried


def check_lower(carried: dict[str, Content]) -> None:
    assert carried[LOW].mean_frequency < carried[HIGH].mean_frequency
    assert carried[LOW].high_share < carried[HIGH].high_share


def test_attention_on_a_grid_carries_lower_frequencies(turbulence: Tensor) -> None:
    check_lower(trained_on_turbulence(turbulence, seed=0, depth=1, order="parallel", steps=250))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["parallel", "serial"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deeper_teachers_on_a_grid(turbulence: Tensor, order: Order, seed: int) -> None:
    check_lower(trained_on_turbulence(turbulence, seed=seed, depth=2, order=order, steps=300))


WINDOW, HORIZON = 12, 12


@pytest.fixture(scope="module")
def traffic() -> TrafficData:
    return simulate_traffic(n_sensors=60, days=3, progress=False)


def trained_on_traffic(data: TrafficData, *, seed: int, steps: int) -> dict[str, Content]:
    """A teacher with two blocks, and what its branches carry on the unseen last fifth."""
    readings = data.filled()
    windows = ((readings - readings.mean()) / readings.std()).unfold(0, WINDOW + HORIZON, 1)
    windows = windows.mT.unsqueeze(-1)
    training, unseen = windows[: len(windows) * 4 // 5], windows[-32 * 4 :: 4]
    torch.manual_seed(seed)
    # With the default of two hops the order did not hold for two of three seeds: powers of P are
    # low-pass filters too.
    options = {"hidden_size": 32, "hops": 1}
    teacher = GraphAlterNet(n_nodes=60, window=WINDOW, horizon=HORIZON, **options)
    generator = torch.Generator().manual_seed(seed)

    def forecast(x: Tensor) -> Tensor:
        return teacher(x, data.edge_index, data.edge_weight)

    def loss() -> Tensor:
        window = training[torch.randint(len(training), (16,), generator=generator)]
        return nn.functional.l1_loss(forecast(window[:, :WINDOW]), window[:, WINDOW:])

    train(teacher, loss, steps=steps, peak_lr=4e-3)
    x, y = unseen[:, :WINDOW], unseen[:, WINDOW:]
    over_nodes = [f"blocks.{block}.low.over_nodes" for block in range(len(teacher.blocks))]
    transform = GraphTransform.from_edges(data.edge_index, data.edge_weight, 60)
    with torch.no_grad():
        error = nn.functional.l1_loss(forecast(x), y)
        carried = branches(teacher, transform, lambda: forecast(x), also=over_nodes)
    persistence = nn.functional.l1_loss(x[:, -1:].expand_as(y), y)
    print(f"error over persistence {float(error / persistence):.3f}; {carried}")
    assert error < 0.95 * persistence, "it has hardly learnt"
    return carried


def check_graph(carried: dict[str, Content]) -> None:
    check_lower(carried)
    # Attention over nodes is what makes the branch low; the identity around it, attention over
    # time and the MLP work on each node by itself and pass every frequency.
    for name in set(carried) - {LOW, HIGH}:
        assert carried[name].mean_frequency < carried[LOW].mean_frequency, name


def test_attention_on_a_graph_carries_lower_frequencies(traffic: TrafficData) -> None:
    check_graph(trained_on_traffic(traffic, seed=0, steps=120))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_longer_trained_teachers_on_a_graph(traffic: TrafficData, seed: int) -> None:
    check_graph(trained_on_traffic(traffic, seed=seed, steps=400))
