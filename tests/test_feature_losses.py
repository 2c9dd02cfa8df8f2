"""Feature losses against plain references and hand-computed values; spectra cropped to compare."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from sdkd_plugin import Bands, GridTransform
from sdkd_plugin.losses import ChannelProjector, FrequencyAlignedLoss
from sdkd_plugin.losses.features import (
    AbstractFeatureLoss,
    AttentionLoss,
    BoundaryLoss,
    FitNetsLoss,
    FrequencyFeatureLoss,
    attention_loss,
    attention_map,
    boundary_loss,
    fitnets_loss,
    make_feature_loss,
)
from sdkd_plugin.spectral import GraphTransform
from sdkd_plugin.spectral.crop import crop_frequencies, shared_frequencies, shared_grid

NAMES = ("frequency", "fitnets", "attention", "boundary")


def fields(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention_reference(student: np.ndarray, teacher: np.ndarray) -> float:
    """Attention transfer of ``(batch, channels, nx, ny)``, place by place."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        maps = []
        for feature in (s, t):
            places = [
                sum(v**2 for v in feature[:, i, j]) / feature.shape[0]
                for i in range(feature.shape[1])
                for j in range(feature.shape[2])
            ]
            norm = math.sqrt(sum(q**2 for q in places))
            maps.append([q / norm for q in places])
        total += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    return total / len(student)


def boundary_reference(student: np.ndarray, teacher: np.ndarray, margin: float) -> float:
    """Activation boundaries, element by element, as Heo et al. write it."""
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
        elif t > 0 and s <= margin:
            total += (s - margin) ** 2
    return total / student.size


# Against plain references.


def test_attention_equals_a_loop_over_places():
    student, teacher = fields(3, 4, 5, 2), fields(3, 6, 5, 2, seed=1)
    expected = attention_reference(student.numpy(), teacher.numpy())
    assert float(attention_loss(student, teacher, -3)) == pytest.approx(expected, abs=1e-10)
    last = [x.movedim(1, -1) for x in (student, teacher)]
    assert float(AttentionLoss(-1)(*last)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_boundary_equals_a_loop_over_elements(margin):
    student, teacher = 2 * fields(3, 4, 5), fields(3, 4, 5, seed=1)
    expected = boundary_reference(student.numpy(), teacher.numpy(), margin)
    assert float(BoundaryLoss(margin)(student, teacher)) == pytest.approx(expected, abs=1e-10)


def test_fitnets_equals_a_loop_over_channels():
    student, teacher = fields(3, 4, 5, 2), 3 * fields(3, 4, 5, 2, seed=1)
    loss = FitNetsLoss(4, channel_axis=-3).double()
    with torch.no_grad():
        loss.norm.weight.copy_(fields(4, seed=2))
        loss.norm.bias.copy_(fields(4, seed=3))
    s, t = student.numpy(), teacher.numpy()
    total = 0.0
    for c in range(4):
        values = s[:, c].ravel()
        normed = (values - values.mean()) / math.sqrt(values.var() + loss.norm.eps)
        regressed = loss.norm.weight[c].item() * normed + loss.norm.bias[c].item()
        total += sum((a - b) ** 2 for a, b in zip(regressed, t[:, c].ravel(), strict=True))
    assert loss(student, teacher).item() == pytest.approx(total / (t**2).sum(), abs=1e-10)
    loss.relative = False
    assert loss(student, teacher).item() == pytest.approx(total / t.size, abs=1e-10)


def test_frequency_feature_loss_is_in_units_of_the_teacher():
    student, teacher = fields(2, 3, 8), fields(2, 3, 8, seed=1)
    low, high = 0.5, 2.0
    loss = make_feature_loss(
        "frequency",
        GridTransform((8,)),
        channels=3,
        bands=Bands.split(0.4),
        weighting=(low, high),
    )
    power = np.abs(np.fft.fft((student - teacher).numpy(), norm="ortho")) ** 2
    frequency = np.abs(np.fft.fftfreq(8)) * 2
    weighted = (np.where(frequency < 0.4, low, high) * power).sum()
    expected = weighted / (teacher.numpy() ** 2).sum()
    assert float(loss(student, teacher)) == pytest.approx(expected, abs=1e-10)
    scaled = loss(100 * student, 100 * teacher)
    assert float(scaled) == pytest.approx(expected, abs=1e-10)


# Hand-computed values.


def test_attention_by_hand():
    # Mean squares (9, 16) and (1, 0): maps (9, 16) / sqrt(337) and (1, 0).
    student = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    expected = 2 - 2 * 9 / math.sqrt(337)
    assert float(attention_loss(student, teacher, -2)) == pytest.approx(expected, abs=1e-12)


def test_boundary_by_hand():
    student = torch.tensor([[-2.0, -0.5, 0.5, -0.5, 1.0, 2.0]])
    teacher = torch.tensor([[-1.0, -1.0, 0.0, 1.0, 1.0, 1.0]])
    # Element by element: 0, 0.5^2, 1.5^2, 1.5^2, 0, 0.
    assert float(boundary_loss(student, teacher)) == pytest.approx(4.75 / 6)


def test_fitnets_by_hand():
    student = torch.tensor([[1.0, -1.0], [3.0, 0.0]])
    assert float(fitnets_loss(student, torch.zeros(2, 2))) == pytest.approx(11 / 4)
    # Each channel of two samples is normed to -1 and 1, channel 0 upwards, channel 1 too.
    loss = FitNetsLoss(2, channel_axis=-1)
    teacher = torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
    assert loss(student, teacher).item() == pytest.approx(1.0, abs=1e-4)


# Gradients, zeros and extremes.


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    loss = make_feature_loss(name, GridTransform((4,)), channels=3).double()
    student, teacher = fields(2, 3, 4), fields(2, 3, 4, seed=1)
    # The boundary loss has a gradient, but no second one, at +-1: step away from there.
    student = torch.where((student.abs() - 1).abs() < 0.01, 0.5, student).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_zero_features_give_no_nan(name, zero):
    loss = make_feature_loss(name, GridTransform((4,)), channels=3)
    student, teacher = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    student = student * (zero == "teacher")
    teacher = teacher * (zero == "student")
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert bool(value.isfinite())
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
def test_attention_does_not_depend_on_scale(scale):
    student = fields(2, 3, 4, dtype=torch.float32)
    teacher = fields(2, 3, 4, seed=1, dtype=torch.float32)
    expected = attention_loss(student, teacher, -2)
    torch.testing.assert_close(attention_loss(scale * student, teacher, -2), expected)
    assert torch.allclose(attention_map(scale * student, -2).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_compared_in_float32(name):
    loss = make_feature_loss(name, GridTransform((8,)), channels=3)
    student, teacher = fields(2, 3, 8), fields(2, 3, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student.bfloat16(), teacher.bfloat16())
    exact = loss(student.float(), teacher.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.03, atol=0)


def test_every_sample_counts_in_the_boundary_loss():
    """The released code iterated a tensor where it expected a list: one sample counted."""
    student, teacher = fields(4, 3, 5), fields(4, 3, 5, seed=1)
    whole = [float(boundary_loss(student[i : i + 1], teacher[i : i + 1])) for i in range(4)]
    assert float(boundary_loss(student, teacher)) == pytest.approx(np.mean(whole), abs=1e-12)
    assert len(set(whole)) == 4


# The interface.


@pytest.mark.parametrize("name", NAMES)
def test_each_name_serves_grids_and_graphs_behind_a_projector(name):
    ring = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
    graph = GraphTransform.from_edges(ring, None, 5)
    cases = [
        (GridTransform((4, 6)), (2, 3, 4, 6), (2, 5, 4, 6)),
        (graph, (2, 7, 5, 3), (2, 7, 5, 5)),
    ]
    for transform, mine, theirs in cases:
        loss = make_feature_loss(name, transform, channels=5)
        assert isinstance(loss, AbstractFeatureLoss)
        student = fields(*mine, dtype=torch.float32).requires_grad_()
        teacher = fields(*theirs, seed=1, dtype=torch.float32)
        projector = ChannelProjector(3, 5, transform.channel_axis)
        projected = projector(student) if loss.needs_projector else student
        value = loss(projected, teacher)
        value.backward()
        assert value.shape == ()
        assert value.item() > 0
        assert float(student.grad.abs().sum()) > 0


def test_who_needs_a_projector():
    needs = {
        n: make_feature_loss(n, GridTransform((4,)), channels=2).needs_projector for n in NAMES
    }
    assert needs == {"frequency": True, "fitnets": True, "attention": False, "boundary": True}


def test_the_regressor_learns_an_affine_teacher():
    student = fields(8, 2, 16, dtype=torch.float32)
    mix = fields(3, 2, seed=1, dtype=torch.float32)
    teacher = 5 + torch.einsum("oc,bcx->box", mix, student)
    projector, loss = ChannelProjector(2, 3, -2), FitNetsLoss(3, -2)
    regressor = nn.ModuleList([projector, loss])
    optimizer = torch.optim.LBFGS(regressor.parameters(), max_iter=40, history_size=20)

    def closure():
        optimizer.zero_grad()
        value = loss(projector(student), teacher)
        value.backward()
        return value

    before = optimizer.step(closure).item()
    assert closure().item() < 1e-4 < before


def test_frequency_loss_is_wrapped_not_copied():
    inner = FrequencyAlignedLoss(GridTransform((4,)), Bands.split(0.5), (1.0, 1.0))
    assert FrequencyFeatureLoss(inner).loss is inner


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_feature_loss("atention", GridTransform((4,)), channels=2), "'attention'"),
        (
            lambda: make_feature_loss(
                "boundary", GridTransform((4,)), channels=2, bands=Bands.split(0.5)
            ),
            "only 'frequency' has bands",
        ),
        (lambda: make_feature_loss("fitnets", GridTransform((4,)), channels=0), "`channels` is 0"),
        (lambda: BoundaryLoss(0.0), r"`margin` is 0\.0"),
        (lambda: boundary_loss(torch.ones(1, 2), torch.ones(1, 3)), r"shape \(1, 2\), expected"),
        (lambda: fitnets_loss(torch.ones(1, 2), torch.ones(1, 3)), r"shape \(1, 2\), expected"),
        (
            lambda: attention_loss(torch.ones(1, 2, 4), torch.ones(1, 3, 5), -2),
            "but for the channels",
        ),
        (lambda: attention_map(torch.ones(1, 2, 4), 1), r"expected one of \[-2, -1\]"),
        (lambda: attention_map(torch.ones(1, 2, 4), -3), r"expected one of \[-2, -1\]"),
        (lambda: FitNetsLoss(3, -2)(torch.ones(1, 2, 4), torch.ones(1, 2, 4)), "project it"),
        (lambda: FitNetsLoss(2, -2)(torch.ones(1, 2, 1), torch.ones(1, 2, 1)), "larger batches"),
    ],
)
def test_bad_input_is_named(as_shipped, call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Latents of different resolutions.

SHAPES = [
    ((16,), (24,)),
    ((15,), (24,)),
    ((9,), (16,)),
    ((8, 12), (16, 12)),
    ((8, 15), (12, 9)),
    ((7, 8), (10, 16)),
    ((4, 6, 5), (8, 7, 10)),
    ((5, 6, 8), (6, 6, 12)),
]


def band_limited(shape, boundary, wavenumbers, amplitudes, phases) -> torch.Tensor:
    """Waves summed at the points of a grid: at j / n, or at the centres of cells."""
    shift = 0.5 if boundary == "reflect" else 0.0
    places = [(torch.arange(n, dtype=torch.float64) + shift) / n for n in shape]
    mesh = torch.meshgrid(*places, indexing="ij")
    total = torch.zeros(shape, dtype=torch.float64)
    for k, amplitude, phase in zip(wavenumbers, amplitudes, phases, strict=True):
        if boundary == "periodic":
            angle = 2 * math.pi * sum(ki * x for ki, x in zip(k, mesh, strict=True))
            total += amplitude * torch.cos(angle + phase)
        else:
            waves = [torch.cos(math.pi * abs(ki) * x) for ki, x in zip(k, mesh, strict=True)]
            total += amplitude * torch.stack(waves).prod(0)
    return total


def waves(limits, *, seed: int = 0):
    """Every wavenumber with |k_i| below its limit, with random amplitudes and phases."""
    ranges = [range(-math.ceil(limit) + 1, math.ceil(limit)) for limit in limits]
    wavenumbers = list(itertools.product(*ranges))
    generator = np.random.default_rng(seed)
    n = len(wavenumbers)
    return wavenumbers, generator.standard_normal(n), generator.uniform(0, 2 * math.pi, n)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
@pytest.mark.parametrize(("mine", "theirs"), SHAPES)
def test_a_band_limited_field_compares_equal_at_two_resolutions(mine, theirs, boundary):
    coarse = [min(n, m) for n, m in zip(mine, theirs, strict=True)]
    limits = [n / 2 if boundary == "periodic" else n for n in coarse]
    content = waves(limits)
    student, teacher = (band_limited(shape, boundary, *content) for shape in (mine, theirs))
    grids = GridTransform(mine, boundary), GridTransform(theirs, boundary)
    shared = shared_grid(*grids)
    expected = band_limited(shared.shape, boundary, *content)
    cropped = shared_frequencies(student[None, None], teacher[None, None], *grids)
    for field in cropped:
        assert torch.allclose(field[0, 0], expected, rtol=0, atol=1e-11)
        assert field.square().mean() == pytest.approx(float(student.square().mean()), rel=1e-10)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_what_only_the_finer_grid_has_is_dropped(boundary):
    coarse, fine = GridTransform((8, 6), boundary), GridTransform((12, 16), boundary)
    content = waves((4, 3) if boundary == "periodic" else (8, 6))
    # Beyond the coarse grid along one axis, or the other.
    beyond = [(5, 1), (-5, 2), (1, 7), (0, 8)] if boundary == "periodic" else [(9, 1), (2, 7)]
    extra = beyond, [3.0] * len(beyond), [0.4] * len(beyond)
    student = band_limited((8, 6), boundary, *content)
    teacher = band_limited((12, 16), boundary, *content)
    teacher = teacher + band_limited((12, 16), boundary, *extra)
    mine, theirs = shared_frequencies(student[None], teacher[None], coarse, fine)
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_the_ambiguous_nyquist_is_dropped_on_both_sides():
    points = {n: torch.arange(n, dtype=torch.float64) / n for n in (8, 16)}
    wave = {n: torch.cos(2 * math.pi * 4 * x + 0.3)[None] for n, x in points.items()}
    for n in (8, 16):
        cropped = crop_frequencies(wave[n], GridTransform((n,)), GridTransform((7,)))
        assert torch.allclose(cropped, torch.zeros(1, 7, dtype=torch.float64), atol=1e-12)


def test_the_nyquist_of_an_axis_both_share_is_kept():
    coarse, fine = GridTransform((8, 9)), GridTransform((8, 16))
    assert shared_grid(coarse, fine).shape == (8, 9)
    checkers = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)[:, None]
    cropped = crop_frequencies(checkers.expand(8, 16), fine, coarse)
    assert torch.allclose(cropped, checkers.expand(8, 9), atol=1e-12)


def test_equal_grids_are_left_alone():
    x, y = fields(2, 3, 8, 6), fields(2, 4, 8, 6, seed=1)
    grid = GridTransform((8, 6))
    mine, theirs = shared_frequencies(x, y, grid, GridTransform((8, 6)))
    assert mine is x
    assert theirs is y


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
@pytest.mark.parametrize(("source", "target"), [((6,), (3,)), ((3, 4), (3, 3)), ((4, 4), (3, 4))])
def test_cropping_passes_gradcheck(source, target, boundary):
    grids = GridTransform(source, boundary), GridTransform(target, boundary)
    x = fields(1, 2, *source).requires_grad_()
    assert torch.autograd.gradcheck(lambda field: crop_frequencies(field, *grids), x)


def test_cropping_keeps_the_dtype():
    x = fields(1, 2, 8).bfloat16()
    cropped = crop_frequencies(x, GridTransform((8,)), GridTransform((5,)))
    assert cropped.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shared_grid(GridTransform((8,)), GridTransform((8, 8))), "as many axes as"),
        (lambda: shared_grid(GridTransform((8,)), GridTransform((8,), "reflect")), "the boundary"),
        (lambda: crop(8, 9), "no finer than"),
        (lambda: crop(8, 4), "take 3 points"),
    ],
)
def test_bad_grids_are_named(as_shipped, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def crop(source: int, target: int) -> torch.Tensor:
    return crop_frequencies(fields(1, source), GridTransform((source,)), GridTransform((target,)))
