"""Teacher and student at two resolutions: the frequencies that both have are compared."""

import copy
import math

import pytest
import torch
from small import descend, make_loss, random, refusals
from torch import Tensor, nn

from sdkd_plugin import AtResolution, Bands, GridTransform, LatentPair, SDKDDistiller, TeacherOutput
from sdkd_plugin.spectral.crop import resample_frequencies


def reference(student: Tensor, teacher: Tensor, cutoff: float, weights: tuple) -> Tensor:
    """The loss by plain double sums over the wavenumbers that both have, in one dimension."""
    n, m = student.shape[-1], teacher.shape[-1]
    total = torch.zeros((), dtype=torch.float64)
    for k in range(-(n // 2), n // 2 + 1):
        if abs(k) >= min(n, m) / 2:
            continue
        mine, theirs = (
            (field * torch.exp(-2j * math.pi * k * torch.arange(size).double() / size)).mean(-1)
            for field, size in ((student, n), (teacher, m))
        )
        weight = weights[abs(k) / (n / 2) >= cutoff]
        total = total + weight * ((mine - theirs).abs() ** 2).mean()
    return total


@pytest.mark.parametrize("size", [6, 9, 16, 24])
def test_the_loss_is_that_of_the_shared_frequencies(size: int):
    """Band edges are the student's frequencies, whatever the teacher's resolution."""
    forecast, theirs = (random(4, 3, n, seed=n, dtype=torch.float64) for n in (12, size))
    loss = make_loss(
        transform=GridTransform((12,)),
        bands=Bands.split(0.4),
        weighting=(1.0, 3.0),
        resolutions="shared",
    )
    total = loss(forecast.requires_grad_(), outputs=[TeacherOutput(theirs)]).total
    expected = reference(forecast, theirs, 0.4, (1.0, 3.0))
    torch.testing.assert_close(total, expected, atol=1e-10, rtol=0)
    gradients = (torch.autograd.grad(value, forecast)[0] for value in (total, expected))
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_missing_from_the_teachers_grid_add_nothing(boundary, dtype, device):
    fine, coarse = (GridTransform(n, boundary).to(device) for n in ((12, 10), (6, 7)))
    forecast = random(3, 2, 12, 10).to(device, dtype)
    theirs = resample_frequencies(forecast.float(), fine, coarse)
    loss = make_loss(transform=fine, resolutions="shared").to(device)
    terms = loss(forecast, outputs=[TeacherOutput(theirs)])
    assert float(terms.frequency.sum()) < 1e-10


class Tapped(nn.Sequential):
    taps = {"latent": "0"}  # noqa: RUF012  # as a model names them


def test_teachers_of_several_resolutions_with_latents():
    torch.manual_seed(0)
    models = [Tapped(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 1, 3, padding=1)) for _ in range(3)]
    teachers = [models[0], *map(AtResolution, models[1:], ((16, 16), (6, 6)))]
    x, y = torch.randn(4, 2, 12, 12), torch.randn(4, 1, 12, 12)
    for aggregation in ("mean", "aekd", "camkd"):
        distiller = SDKDDistiller(
            teachers,
            Tapped(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 1, 1)),
            GridTransform((12, 12)),
            aggregation=aggregation,
            resolutions="shared",
            latents=[LatentPair()],
            example={"x": x},
        )
        terms = distiller.step(x, y)
        terms.total.backward()
        assert terms.features["latent<-latent"] > 0
        torch.testing.assert_close(terms.teacher_weights.sum(), torch.tensor(1.0))
        coarse = distiller.loss.teachers[2](x)
        assert coarse.shape == (4, 1, 6, 6)
        grids = GridTransform((12, 12)), GridTransform((6, 6))
        torch.testing.assert_close(coarse, models[2](resample_frequencies(x, *grids)))


def test_a_student_at_half_the_resolution_learns_what_its_teacher_does():
    """The teacher smooths at 32 points, the student sees 16 and learns the same smoothing."""
    torch.manual_seed(0)
    options = {"padding_mode": "circular", "bias": False}
    teacher = nn.Conv1d(1, 1, 5, padding=2, **options)
    nn.init.constant_(teacher.weight, 0.2)
    distiller = SDKDDistiller(
        AtResolution(teacher, (32,)),
        nn.Conv1d(1, 1, 7, padding=3, **options),
        GridTransform((16,)),
        weighting=(1.0, 1.0),
        resolutions="shared",
    )
    errors = descend(
        distiller.parameters(), lambda i: distiller.step(torch.randn(16, 1, 16)).total, 300, 3e-2
    )
    assert sum(errors[-20:]) < 0.02 * sum(errors[:20])


def compare(resolutions: str, *shape: int) -> None:
    loss = make_loss(transform=GridTransform((8, 12)), resolutions=resolutions)
    loss(random(4, 3, 8, 12), outputs=[TeacherOutput(random(*shape))])


HINT = r"expected \(4, 3, 8, 12\) \(the student's forecast\); to distil from"
OTHER = r"has shape \(4, 5, {}\), expected \(4, 3, 8, 12\)"
test_refusals = refusals(
    # A teacher that loses a column, or transposes, is a mistake unless it is allowed.
    (lambda: compare("equal", 4, 3, 8, 11), HINT),
    (lambda: compare("equal", 4, 3, 12, 8), HINT),
    (lambda: compare("shared", 4, 5, 8, 12), OTHER.format("8, 12")),
    (lambda: compare("shared", 4, 5, 16, 16), OTHER.format("16, 16")),
    (lambda: AtResolution(nn.Identity(), (8,), "mirror"), "`boundary` is 'mirror', expected one"),
    (
        lambda: AtResolution(nn.Identity(), (8, 8))(torch.ones(8, 8)),
        r"`x` has shape \(8, 8\), expected a batch axis",
    ),
)


def test_the_grid_of_the_inputs_is_made_once(monkeypatch: pytest.MonkeyPatch):
    model = AtResolution(nn.Identity(), (8,))
    first = model(random(2, 1, 6))
    with monkeypatch.context() as patched:
        patched.setattr(GridTransform, "resized", None)
        assert torch.equal(copy.deepcopy(model).double()(random(2, 1, 6)), first)
    assert model(random(2, 1, 12)).shape == (2, 1, 8)
    assert torch.equal(model(random(2, 1, 6)), first)
