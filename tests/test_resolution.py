"""Teacher and student at different resolutions: only the frequencies that both have count."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from sdkd_plugin import AtResolution, Bands, GridTransform, LatentPair, SDKDDistiller, TeacherOutput
from sdkd_plugin.spectral.crop import complete_frequencies, crop_frequencies, resample_frequencies

PAIRS = [
    ((8,), (12,), "periodic"),
    ((9,), (7,), "periodic"),
    ((8, 8), (16, 12), "periodic"),
    ((16, 9), (7, 9), "periodic"),
    ((6, 8), (8, 6), "periodic"),
    ((5, 6, 8), (8, 6, 5), "periodic"),
    ((8,), (12,), "reflect"),
    ((9, 8), (6, 10), "reflect"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(grid: GridTransform, boundary: str) -> Tensor:
    """One continuous function without high frequencies, sampled on a grid."""
    field = torch.ones((), dtype=torch.float64)
    for axis, size in enumerate(grid.shape):
        at = torch.arange(size, dtype=torch.float64)
        if boundary == "periodic":
            wave = (
                0.5 + torch.cos(2 * math.pi * at / size + axis) + torch.sin(4 * math.pi * at / size)
            )
        else:
            wave = (
                0.5
                + torch.cos(math.pi * (at + 0.5) / size)
                - torch.cos(3 * math.pi * (at + 0.5) / size)
            )
        field = field[..., None] * wave
    return field


@pytest.mark.parametrize(("first", "second", "boundary"), PAIRS)
def test_a_band_limited_field_is_the_same_function_on_both_grids(first, second, boundary):
    grids = [GridTransform(shape, boundary) for shape in (first, second)]
    fields = [smooth(grid, boundary) for grid in grids]
    for i in (0, 1):
        resampled = resample_frequencies(fields[i], grids[i], grids[1 - i])
        torch.testing.assert_close(resampled, fields[1 - i], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("first", "second", "boundary"), PAIRS)
def test_resampling_is_a_projection_and_completing_keeps_the_rest(first, second, boundary):
    source, target = GridTransform(first, boundary), GridTransform(second, boundary)
    x, rest = random(2, *first), random(2, *second, seed=1)
    there = resample_frequencies(x, source, target)
    back = resample_frequencies(there, target, source)
    torch.testing.assert_close(resample_frequencies(back, source, target), there)
    completed = complete_frequencies(x, rest, source, target)
    torch.testing.assert_close(resample_frequencies(completed, target, source), back)
    # What x cannot say is what `rest` says.
    known = resample_frequencies(resample_frequencies(rest, target, source), source, target)
    torch.testing.assert_close(completed - there, rest - known)
    assert torch.equal(complete_frequencies(rest, rest, target, target), rest)


def reference(student: Tensor, teacher: Tensor, edges: tuple, weights: tuple) -> Tensor:
    """The loss by plain double sums over the wavenumbers that both have, in one dimension."""
    n, m = student.shape[-1], teacher.shape[-1]
    total = torch.zeros((), dtype=torch.float64)
    for k in range(-(n // 2), n // 2 + 1):
        if abs(k) >= min(n, m) / 2:
            continue
        waves = [
            torch.exp(-2j * math.pi * k * torch.arange(size, dtype=torch.float64) / size)
            for size in (n, m)
        ]
        mine, theirs = (
            (field * wave).mean(-1) for field, wave in zip((student, teacher), waves, strict=True)
        )
        band = sum(abs(k) / (n / 2) >= edge for edge in edges)
        total = total + weights[band] * ((mine - theirs).abs() ** 2).mean()
    return total


@pytest.mark.parametrize("size", [6, 9, 16, 24])
def test_the_loss_is_that_of_the_shared_frequencies(size: int):
    """Band edges mean the student's frequencies, whatever the teacher's resolution."""
    student, x = nn.Conv1d(2, 3, 3, padding=1).double(), random(4, 2, 12)
    theirs = random(4, 3, size, seed=1)
    weights = (1.0, 3.0)
    distiller = SDKDDistiller(
        nn.Conv1d(2, 3, 1),
        student,
        GridTransform((12,)),
        Bands.split(0.4),
        weighting=weights,
        resolutions="shared",
    )
    terms = distiller.step(x, outputs=[TeacherOutput(theirs, {})])
    expected = reference(student(x), theirs, (0.4,), weights)
    torch.testing.assert_close(terms.total, expected, atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(terms.total, student.weight)
    (of_reference,) = torch.autograd.grad(expected, student.weight)
    torch.testing.assert_close(gradient, of_reference, atol=1e-10, rtol=0)


def test_teachers_of_several_resolutions_teach_together():
    torch.manual_seed(0)
    teachers = [
        nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular"),
        AtResolution(nn.Conv2d(2, 1, 3, padding=1), (16, 16)),
        AtResolution(nn.Conv2d(2, 1, 3, padding=1), (6, 6)),
    ]
    student = nn.Conv2d(2, 1, 3, padding=1)
    x, y = torch.randn(4, 2, 12, 12), torch.randn(4, 1, 12, 12)
    for aggregation in ("mean", "aekd", "camkd"):
        distiller = SDKDDistiller(
            teachers,
            student,
            GridTransform((12, 12)),
            aggregation=aggregation,
            resolutions="shared",
        )
        terms = distiller.step(x, y)
        terms.total.backward()
        assert terms.total.isfinite()
        torch.testing.assert_close(terms.teacher_weights.sum(), torch.tensor(1.0))


def test_a_student_at_half_the_resolution_learns_what_its_teacher_does():
    """The teacher smooths at 32 points, the student sees 16 and learns the same smoothing."""
    torch.manual_seed(0)
    teacher = nn.Conv1d(1, 1, 5, padding=2, padding_mode="circular", bias=False)
    nn.init.constant_(teacher.weight, 0.2)
    student = nn.Conv1d(1, 1, 7, padding=3, padding_mode="circular", bias=False)
    distiller = SDKDDistiller(
        AtResolution(teacher, (32,)),
        student,
        GridTransform((16,)),
        weighting=(1.0, 1.0),
        resolutions="shared",
    )
    optimiser = torch.optim.Adam(distiller.parameters(), 3e-2)
    errors = []
    for _ in range(300):
        terms = distiller.step(torch.randn(16, 1, 16))
        optimiser.zero_grad()
        terms.total.backward()
        optimiser.step()
        errors.append(float(terms.frequency.sum()))
    assert sum(errors[-20:]) < 0.02 * sum(errors[:20])


def test_a_wrapped_teachers_taps_are_its_own():
    class Tapped(nn.Sequential):
        taps = {"latent": "0"}  # noqa: RUF012  # as a model names them

    teacher = AtResolution(Tapped(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 1, 1)), (16,))
    student = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Conv1d(2, 1, 1))
    x = torch.randn(3, 1, 8)
    distiller = SDKDDistiller(
        teacher,
        student,
        GridTransform((8,)),
        latents=[LatentPair("0", "latent")],
        resolutions="shared",
        example={"x": x},
    )
    terms = distiller.step(x)
    assert terms.features["0<-latent"] > 0


def test_other_differences_than_the_resolution_are_refused():
    student = nn.Conv2d(2, 3, 1)
    x = torch.randn(4, 2, 8, 8)
    distiller = SDKDDistiller(
        nn.Conv2d(2, 5, 1), student, GridTransform((8, 8)), resolutions="shared"
    )
    with pytest.raises(ValueError, match=re.escape("shape (4, 5, 8, 8), expected (4, 3, 8, 8)")):
        distiller.step(x)
    answer = TeacherOutput(torch.randn(4, 5, 16, 16), {})
    with pytest.raises(ValueError, match=re.escape("shape (4, 5, 16, 16), expected (4, 3, 8, 8)")):
        distiller.step(x, outputs=[answer])


@pytest.mark.usefixtures("as_shipped")
def test_at_resolution_refuses():
    with pytest.raises(ValueError, match="`boundary` is 'mirror', expected one of"):
        AtResolution(nn.Identity(), (8,), "mirror")
    with pytest.raises(ValueError, match=re.escape("`x` has shape (8, 8), expected a batch axis")):
        AtResolution(nn.Identity(), (8, 8))(torch.ones(8, 8))


def test_resampling_and_completing_have_the_right_gradients():
    grids = GridTransform((6, 8)), GridTransform((8, 5))
    x, rest = random(1, 6, 8).requires_grad_(), random(1, 8, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: complete_frequencies(a, b, *grids), (x, rest))


def test_cropping_agrees_with_resampling_on_the_shared_grid():
    source, target = GridTransform((12, 10)), GridTransform((7, 10))
    x = random(2, 12, 10)
    torch.testing.assert_close(
        resample_frequencies(x, source, target), crop_frequencies(x, source, target)
    )


def test_a_teacher_at_one_resolution_teaches_at_another_through_the_hosts_trainer():
    """A U-Net with zero padding, bound to its 32 x 32, teaches one that sees 16 x 16."""
    from neuralop import Trainer
    from torch.utils.data import DataLoader

    from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss, distillation_dataset
    from sdkd_plugin.data import navier_stokes

    fields = navier_stokes(6, resolution=16, solver_resolution=32, duration=4.0, cache=False)
    x, y = fields[:, :2], fields[:, 2:4]
    torch.manual_seed(0)
    sizes = {"in_channels": 2, "out_channels": 2}
    teacher = AtResolution(REGISTERED["sdkd_unet"](width=8, padding="zeros", **sizes), (32, 32))
    student = REGISTERED["sdkd_unet"](width=6, **sizes)
    distiller = SDKDDistiller(
        teacher,
        student,
        GridTransform((16, 16)),
        latents=[LatentPair("latent", "latent", weight=0.1)],
        resolutions="shared",
        example={"x": x[:1]},
    )
    told = []
    optimizer = torch.optim.Adam(distiller.parameters(), 3e-3)
    Trainer(model=student, n_epochs=25).train(
        DataLoader(distillation_dataset(x, y, torch.zeros(6, dtype=torch.bool)), 6),
        {},
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        training_loss=TrainerLoss(distiller, on_step=told.append),
    )
    assert float(told[-1].frequency.sum()) < 0.3 * float(told[0].frequency.sum())
    assert all(float(terms.task) == 0 for terms in told)


def test_another_resolution_is_refused_unless_it_is_meant():
    """A teacher that loses a column, or transposes, is a mistake."""
    x = torch.randn(4, 2, 8, 12)
    for teacher in (nn.Conv2d(2, 3, (1, 2)), Transposing(nn.Conv2d(2, 3, 1))):
        distiller = SDKDDistiller(teacher, nn.Conv2d(2, 3, 1), GridTransform((8, 12)))
        with pytest.raises(ValueError, match=r"expected \(4, 3, 8, 12\).*resolutions='shared'"):
            distiller.step(x)


class Transposing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_teacher_cannot_say_costs_nothing(boundary, dtype, device):
    """A student that agrees with a coarser teacher has no loss, whatever else it forecasts."""
    fine, coarse = GridTransform((12, 10), boundary), GridTransform((6, 7), boundary)
    mine = random(3, 2, 12, 10).to(device, dtype)
    theirs = resample_frequencies(mine.float(), fine.to(device), coarse.to(device))
    student = nn.Conv2d(2, 2, 1).to(device)
    distiller = SDKDDistiller(nn.Conv2d(2, 2, 1), student, fine, resolutions="shared").to(device)
    terms = distiller.terms(mine, mine, outputs=[TeacherOutput(theirs, {})])
    assert float(terms.frequency.sum()) < 1e-10
