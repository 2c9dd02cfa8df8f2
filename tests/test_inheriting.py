"""A student FNO cut out of a teacher FNO."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sdkd_plugin import DistillationLoss, GridTransform
from sdkd_plugin.adapters.neuralop import inherit

from neuralop.models import FNO, TFNO  # isort: skip


def fno(hidden: int = 12, modes: tuple[int, ...] = (8, 8), seed: int = 0, **options: Any) -> FNO:
    torch.manual_seed(seed)
    sizes = {"in_channels": 1, "out_channels": 1, "n_layers": 2, **options}
    return FNO(n_modes=modes, hidden_channels=hidden, **sizes)


def fields() -> tuple[Tensor, Tensor]:
    """Smooth fields, and what diffusion and a local nonlinearity make of them."""
    noise = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    k = torch.fft.fftfreq(16)[:, None] * 16, torch.fft.rfftfreq(16) * 16
    square = k[0] ** 2 + k[1] ** 2
    x = 3 * torch.fft.irfft2(torch.fft.rfft2(noise) / (1 + square))
    diffused = torch.fft.irfft2(torch.fft.rfft2(x) * torch.exp(-0.05 * square))
    return x, diffused + 0.3 * x.roll(2, -1) ** 2


@pytest.fixture(scope="module")
def trained() -> FNO:
    teacher, (x, y) = fno(), fields()
    optimiser = torch.optim.Adam(teacher.parameters(), 5e-3)
    for _ in range(100):
        optimiser.zero_grad()
        error = (teacher(x) - y).square().mean()
        error.backward()
        optimiser.step()
    assert error < 0.05 * y.var()
    return teacher


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "group_norm", "channel_mlp_skip": "linear", "n_layers": 1},
        {"separable": True, "positional_embedding": None, "fno_skip": "identity"},
        {"use_channel_mlp": False, "lifting_channel_ratio": 0},
        {"complex_data": True},
        {"modes": (6,)},
        {"modes": (4, 4, 4)},
    ],
    ids=str,
)
def test_of_equal_sizes_it_is_the_teacher_and_smaller_ones_are_finite(options: dict[str, Any]):
    teacher, other = fno(seed=1, **options), fno(seed=2, **options)
    before = [p.clone() for p in other.parameters()]
    x = torch.randn(2, 1, *[8] * len(options.get("modes", (8, 8))))
    x = x.to(torch.complex64) if options.get("complex_data") else x
    assert torch.equal(inherit(teacher, other)(x), teacher(x))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    fewer = {**options, "modes": tuple(n - 2 for n in options.get("modes", (8, 8)))}
    smaller = inherit(teacher, fno(hidden=4, seed=3, **fewer))
    assert torch.isfinite(torch.view_as_real(smaller(x).to(torch.complex64))).all()


def test_fewer_modes_filter_the_spectral_convolution():
    # A field of no frequency above 1 passes the same modes of both.
    teacher = fno()
    student = inherit(teacher, fno(modes=(4, 4)))
    angle = 2 * torch.pi * torch.arange(16) / 16
    x = (angle[:, None].cos() + angle.sin()).expand(1, 12, -1, -1)
    mine, theirs = (model.fno_blocks.convs[0](x) for model in (student, teacher))
    torch.testing.assert_close(mine, theirs)


def test_channels_without_weight_are_those_left_out():
    teacher, x = fno(hidden=8), torch.randn(2, 1, 16, 16)
    # The other channels are as many as the teacher's: 16, 16 and 4.
    ratios = {"lifting_channel_ratio": 3.2, "projection_channel_ratio": 3.2}
    small = fno(hidden=5, seed=1, channel_mlp_expansion=0.8, **ratios)
    dead = torch.tensor([1, 4, 6])
    with torch.no_grad():
        for p in teacher.parameters():
            for axis in range(min(2, p.ndim)):
                if p.shape[axis] == 8:
                    p.index_fill_(axis, dead, 0)
    torch.testing.assert_close(inherit(teacher, small)(x), teacher(x))


def test_a_trained_teachers_student_starts_better_than_at_random(trained: FNO):
    x, _ = fields()
    target = trained(x).detach()
    errors = []
    for model in (inherit(trained, fno(hidden=10, seed=5)), fno(hidden=10, seed=5)):
        errors.append((model(x).detach() - target).square().mean().item())
    assert errors[0] < 0.4 * errors[1]


def test_at_half_the_size_it_is_ahead_after_some_steps_of_distillation(trained: FNO):
    x, _ = fields()
    loss = DistillationLoss(trained, GridTransform((16, 16)))
    ends = []
    for seed in (5, 6):
        fresh = fno(hidden=6, modes=(6, 6), seed=seed)
        for student in (inherit(trained, fresh), fresh):
            optimiser = torch.optim.Adam(student.parameters(), 5e-3)
            for _ in range(20):
                optimiser.zero_grad()
                error = loss(student(x), x).total
                error.backward()
                optimiser.step()
            ends.append(float(error.detach()))
    assert max(ends[::2]) < min(ends[1::2])


@pytest.mark.usefixtures("as_shipped")
def test_what_cannot_be_cut_is_refused():
    tucker = TFNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=4)
    for teacher, student, message in [
        (fno(hidden=4), fno(hidden=8), "`student` has 8 hidden channels, .* teacher's 4"),
        (fno(modes=(4, 4)), fno(), "`student` has 8 modes along an axis, .* teacher's 4"),
        (fno(), fno(n_layers=3), r"`teacher` and `student` differ in \{'n_layers': \('2', '3'\)"),
        (fno(), fno(norm="group_norm"), "differ in {'norm'"),
        (tucker, fno(), "`teacher` has factorization='Tucker'"),
        (torch.nn.ReLU(), fno(), "`teacher` is of type ReLU, expected FNO"),
    ]:
        with pytest.raises(ValueError, match=message):
            inherit(teacher, student)
