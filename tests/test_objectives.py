"""Spectral objectives: direct references in numpy and torch.fft, the MSE as a limit, gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import BANDS, GRID, make_loss, random, random_graph, refusals
from torch import Tensor, nn

from sdkd_plugin import (
    AMSE,
    Bands,
    FrequencyAlignedLoss,
    GraphTransform,
    GridTransform,
    ProductTransform,
    SDKDDistiller,
    SpectralLoss,
    inverse_energy_weights,
)
from sdkd_plugin.losses.objectives import band_sizes
from sdkd_plugin.spectral import AbstractTransform

GRAPH = random_graph()
DOMAINS = {
    "periodic": (GridTransform((6, 7)), (4, 3, 6, 7)),
    "reflect": (GridTransform((5, 8), "reflect"), (4, 3, 5, 8)),
    "graph": (GraphTransform.from_edges(**GRAPH, num_nodes=10, dtype=torch.float64), (4, 5, 10, 2)),
    "low-rank": (
        GraphTransform.from_edges(
            **GRAPH, num_nodes=10, method="low-rank", rank=7, dtype=torch.float64
        ),
        (4, 5, 10, 2),
    ),
    "chebyshev": (
        GraphTransform.from_edges(**GRAPH, num_nodes=10, method="chebyshev", dtype=torch.float64),
        (4, 5, 10, 2),
    ),
    "product": (ProductTransform(GridTransform((6, 7)), 3), (4, 3, 6, 7)),
}
THREE = Bands((0.25, 0.4), transition=0.1)


@pytest.fixture(params=DOMAINS)
def domain(request: pytest.FixtureRequest) -> tuple[AbstractTransform, Tensor, Tensor]:
    """A transform, a forecast and labels, float64."""
    transform, shape = DOMAINS[request.param]
    return transform, *(random(*shape, seed=seed, dtype=torch.float64) for seed in (1, 2))


def test_without_weights_it_is_the_mse_of_each_sample(domain: tuple):
    transform, forecast, y = domain
    expected = (forecast - y).square().flatten(1).mean(1)
    torch.testing.assert_close(SpectralLoss(transform, THREE)(forecast, y), expected)


def test_weights_keep_the_size_of_a_white_error_and_tend_to_the_mse(domain: tuple):
    transform, forecast, y = domain
    sizes = band_sizes(transform, THREE)
    assert float(sizes.sum()) == pytest.approx(np.prod(transform.domain_shape), rel=1e-4)
    weights = torch.tensor(inverse_energy_weights(y, transform, THREE), dtype=torch.float64)
    assert float((weights * sizes).sum() / sizes.sum()) == pytest.approx(1.0)
    flat = inverse_energy_weights(y, transform, THREE, floor=1e9)
    torch.testing.assert_close(
        SpectralLoss(transform, THREE, flat)(forecast, y).mean(), F.mse_loss(forecast, y)
    )


def test_weights_are_the_inverse_energies_of_the_fourier_coefficients():
    y = random(50, 1, 16, dtype=torch.float64).cumsum(-1)
    coefficients = torch.fft.fft(y, norm="ortho").abs().square().mean((0, 1))[:9]
    coefficients[7] = (2 * coefficients[7] + coefficients[8]) / 3  # Equal(8)'s highest band
    expected = 1 / (coefficients[:8] + 0.01 * coefficients[:8].max())
    multiplicity = torch.tensor([1.0] + [2] * 6 + [3])
    expected *= 16 / (multiplicity * expected).sum()
    batches = iter(y.split(20))
    found = inverse_energy_weights(batches, GridTransform((16,)), Bands.equal(8), floor=0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_sizes_of_bands_are_estimated_on_large_domains():
    transform = GridTransform((80, 80))
    bands = Bands.equal(8)
    exact = (bands(transform.frequencies) * transform.multiplicity).flatten(1).sum(1)
    np.testing.assert_allclose(band_sizes(transform, bands), exact, rtol=0.05)


def test_the_amse_is_that_of_the_paper():
    transform, bands = GridTransform((16,)), Bands.equal(4)
    s, t = random(2, 3, 2, 16, dtype=torch.float64)
    a, b = (torch.fft.fft(x, norm="ortho") for x in (s, t))
    frequency = torch.fft.fftfreq(16).abs().double() * 2
    expected = torch.zeros(3)
    for mask in bands(frequency):
        p, q = ((mask * x.abs().square()).sum(-1) for x in (a, b))
        coherence = (mask * (a * b.conj()).real).sum(-1) / (p * q).sqrt()
        amse = (p.sqrt() - q.sqrt()).square() + 2 * torch.maximum(p, q) * (1 - coherence)
        expected = expected + amse.sum(1) / 32
    torch.testing.assert_close(SpectralLoss(transform, bands, amse=AMSE())(s, t), expected)
    mse = (s - t).square().flatten(1).mean(1)
    half = SpectralLoss(transform, bands, amse=AMSE(0.5))(s, t)
    torch.testing.assert_close(half, (mse + expected) / 2)


def test_the_amse_is_the_mse_where_only_amplitudes_differ_and_more_elsewhere(domain: tuple):
    transform, forecast, y = domain
    adjusted, plain = SpectralLoss(transform, THREE, amse=AMSE()), SpectralLoss(transform, THREE)
    tolerance = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(adjusted(0.3 * y, y), plain(0.3 * y, y), **tolerance)
    torch.testing.assert_close(adjusted(y, y), torch.zeros(4).double(), **tolerance)
    assert bool((adjusted(0.5 * forecast, y) > plain(0.5 * forecast, y)).all())


def test_damping_pays_under_the_mse_and_not_under_the_amse():
    """Phases that cannot be known: the best damped forecast is 0, and under the AMSE it is not."""
    transform, bands = GridTransform((256,)), Bands.split(0.5)
    forecast, y = random(2, 50, 1, 256)
    damped = torch.linspace(0.05, 1.0, 20)
    best = {}
    for name, amse in {"mse": None, "amse": AMSE()}.items():
        loss = SpectralLoss(transform, bands, amse=amse)
        best[name] = float(
            damped[torch.stack([loss(d * forecast, y).mean() for d in damped]).argmin()]
        )
    assert best["mse"] < 0.1
    assert best["amse"] > 0.8


def test_weight_zero_is_the_base_bit_for_bit(domain: tuple):
    transform, forecast, y = domain
    forecast = forecast.requires_grad_()
    found = []
    for amse in (None, AMSE(0.0)):
        total = FrequencyAlignedLoss(transform, THREE, (1.0, 2.0, 3.0), amse=amse)(forecast, y)
        found.append((total, *torch.autograd.grad(total, forecast)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_gradients(domain: tuple):
    transform, forecast, y = (domain[0], domain[1][:2], domain[2][:2])
    loss = SpectralLoss(transform, THREE, (0.5, 1.0, 2.0), amse=AMSE(0.7))
    assert torch.autograd.gradcheck(loss, (forecast.requires_grad_(), y))


def test_gradients_are_finite_where_there_is_no_energy(domain: tuple):
    transform, forecast, _ = domain
    for x, y in ((0 * forecast, forecast), (forecast, 0 * forecast), (0 * forecast, 0 * forecast)):
        x = x.float().requires_grad_()
        SpectralLoss(transform, THREE, amse=AMSE())(x, y.float()).sum().backward()
        assert bool(x.grad.isfinite().all())


def test_amplitudes_of_labels_stand_in_where_the_teacher_has_less(domain: tuple):
    transform, student, y = domain
    loss = FrequencyAlignedLoss(transform, THREE, (1.0, 1.0, 1.0), amse=AMSE(1.0, "labels"))
    as_target = FrequencyAlignedLoss(transform, THREE, (1.0, 1.0, 1.0), amse=AMSE())
    blurred = 0.5 * y
    # Without labels, or with fainter ones, the amplitude is the teacher's.
    for labels in (None, 0.1 * y):
        torch.testing.assert_close(
            loss.terms(student, blurred, labels).total, as_target.terms(student, blurred).total
        )
    # The blurred teacher has the labels' phases, so the labels are the optimum.
    assert float(loss.terms(y, blurred, y).total) == pytest.approx(0, abs=1e-6)
    assert float(loss.terms(blurred, blurred, y).total) == pytest.approx(
        float((y - blurred).square().mean()), rel=1e-4
    )
    masked = loss.terms(student, blurred, torch.full_like(y, torch.nan), torch.zeros_like(y) > 0)
    torch.testing.assert_close(masked.total, as_target.terms(student, blurred).total)


def test_a_distilled_student_gets_both_objectives():
    transform = GridTransform(GRID)
    x, y = random(5, 2, *GRID), random(5, 3, *GRID, seed=1)
    bands = Bands.equal(5)
    weights = inverse_energy_weights(y, transform, bands)
    amse = AMSE(0.5, "labels")
    loss = make_loss(bands=bands, weighting=weights, amse=amse, trust=False)
    student = random(5, 3, *GRID, seed=3).requires_grad_()
    teacher = loss.teacher_outputs(x)[0].forecast
    terms = loss(student, x, y)
    errors = FrequencyAlignedLoss(transform, bands, weights, amse=amse)
    torch.testing.assert_close(terms.total, errors.terms(student, teacher, y).total)
    plain = FrequencyAlignedLoss(transform, bands, weights).terms(student, teacher)
    torch.testing.assert_close(terms.frequency, plain.errors)
    task = SpectralLoss(transform, bands, weights, amse=AMSE())
    model = nn.Conv2d(2, 3, 1)
    step = SDKDDistiller(nn.Conv2d(2, 3, 3, padding=1), model, transform, task_loss=task)
    mask = torch.arange(5).reshape(5, 1, 1, 1) < 2
    assert float(step.step(x, y, mask).task) == pytest.approx(
        float(task(model(x), y)[:2].mean().detach()), rel=1e-5
    )


def test_bands_begin_where_the_teachers_error_crosses_thresholds():
    transform = GridTransform((32,))
    y = random(400, 1, 32, dtype=torch.float64)
    teacher = transform.filter(y, lambda f: torch.where(f < 0.5, 0.9, torch.where(f < 0.8, 0.5, 0)))
    teacher = teacher + transform.filter(
        random(400, 1, 32, seed=1).double(), lambda f: 1.0 * (f > 0.8)
    )
    bands = Bands.from_skill(transform.spectrum(teacher - y), transform.spectrum(y), (0.2, 1.0))
    # Below 1/2 the error has 1 % of the energy, below 0.8 a quarter, above it twice all of it.
    assert bands.edges == pytest.approx((15 / 32, 25 / 32))
    steep = transform.filter(y, lambda f: torch.exp(-12 * f))
    wrong = transform.filter(steep, lambda f: torch.where(f < 0.5, 0.9, 0.1))
    found = Bands.from_skill(transform.spectrum(wrong - steep), transform.spectrum(steep), (0.5,))
    assert found.edges == pytest.approx((15 / 32,))


FLAT = GridTransform((8,)).spectrum(torch.randn(1, 1, 8))
test_refusals = refusals(
    (lambda: AMSE(1.5), r"`weight` is 1.5, expected a number in \[0, 1\]"),
    (lambda: AMSE(1.0, "teacher"), r"`amplitude` is 'teacher', expected one of"),
    (lambda: make_loss(amse=0.5), r"`amse` is of type float, expected AMSE"),
    (
        lambda: inverse_energy_weights(torch.ones(1, 8, 9), GridTransform(GRID), BANDS, floor=0),
        r"`floor` is 0, expected a finite number above 0",
    ),
    (
        lambda: inverse_energy_weights(torch.zeros(1, 8, 9), GridTransform(GRID), BANDS),
        r"`fields` have no energy",
    ),
    (
        lambda: inverse_energy_weights(iter(()), GridTransform(GRID), BANDS),
        r"`fields` have no energy",
    ),
    (lambda: SpectralLoss(GridTransform(GRID), BANDS, (1.0,)), r"`weights` has 1 values"),
    (lambda: Bands.equal(1), r"`n` is 1, expected an integer of at least 2"),
    (lambda: Bands.from_skill(FLAT, FLAT, (1.0, 0.5)), r"`thresholds` is \(1.0, 0.5\)"),
    (lambda: Bands.from_skill(FLAT, FLAT, (2.0,)), r"crosses none"),
    (
        lambda: Bands.from_skill(FLAT, GridTransform((16,)).spectrum(torch.ones(1, 16))),
        r"different transforms",
    ),
)
