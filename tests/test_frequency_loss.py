"""The frequency-aligned loss: the MSE if all weights are 1, and known answers if they are not."""

import copy

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from small import random, random_graph, refusals
from torch import Tensor

from sdkd_plugin import (
    Bands,
    FrequencyAlignedLoss,
    GraphTransform,
    GridTransform,
    frequency_aligned_loss,
)
from sdkd_plugin.losses import band_errors
from sdkd_plugin.losses.frequency import observed_band_errors
from sdkd_plugin.spectral import AbstractTransform

GRAPH = GraphTransform.from_edges(**random_graph(), num_nodes=10, dtype=torch.float64)
DOMAINS = {
    "periodic": (GridTransform((6, 7)), (4, 3, 6, 7)),
    "reflect": (GridTransform((5, 8), "reflect"), (4, 3, 5, 8)),
    "reflect, by FFT": (GridTransform((3, 130), "reflect"), (4, 3, 3, 130)),
    "graph": (GRAPH, (4, 5, 10, 2)),
}
TWO, SMOOTH = Bands.split(0.3), Bands((0.3, 0.6), transition=0.2)


@pytest.fixture(params=DOMAINS)
def domain(
    request: pytest.FixtureRequest, device: torch.device
) -> tuple[AbstractTransform, Tensor, Tensor]:
    """A transform, a student's field and a teacher's, float64."""
    transform, shape = DOMAINS[request.param]
    fields = (random(*shape, seed=seed, dtype=torch.float64).to(device) for seed in (1, 2))
    return copy.deepcopy(transform).to(device), *fields


@pytest.mark.parametrize("bands", [TWO, SMOOTH], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_weights_are_the_mse_and_so_is_the_gradient(
    domain: tuple, bands: Bands, dtype: torch.dtype
):
    transform, *fields = domain
    fields = [field.to(dtype).requires_grad_() for field in fields]
    ours = frequency_aligned_loss(*fields, transform, bands, [1.0] * bands.n_bands)
    theirs = F.mse_loss(*fields)
    tolerance = dict.fromkeys(("rtol", "atol"), 1e-12 if dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(ours, theirs, **tolerance)
    gradients = (torch.autograd.grad(loss, fields) for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_agrees_with_rebuilt_band_images_in_numpy(boundary: str):
    """The paper's form: ||Psi_h(s) - Psi_h(t)||^2 + alpha ||Psi_l(s) - Psi_l(t)||^2."""
    student, teacher = np.random.default_rng(0).normal(size=(2, 4, 3, 12, 9))
    alpha, cutoff, axes = 0.3, 0.33, (-2, -1)
    if boundary == "periodic":
        forward, inverse = np.fft.fftn, lambda c, axes: np.fft.ifftn(c, axes=axes).real
        relative = [2 * np.abs(np.fft.fftfreq(n)) for n in (12, 9)]
    else:
        forward = lambda x, axes: scipy.fft.dctn(x, axes=axes, norm="ortho")  # noqa: E731
        inverse = lambda c, axes: scipy.fft.idctn(c, axes=axes, norm="ortho")  # noqa: E731
        relative = [np.arange(n) / n for n in (12, 9)]
    low = np.hypot(relative[0][:, None], relative[1]) / np.sqrt(2) < cutoff
    low_error, high_error = (
        np.subtract(*[inverse(forward(x, axes=axes) * mask, axes=axes) for x in (student, teacher)])
        for mask in (low, ~low)
    )
    s, t = torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher)
    transform = GridTransform((12, 9), boundary)
    loss = frequency_aligned_loss(s, t, transform, Bands.split(cutoff), (alpha, 1.0))
    loss.backward()
    expected = (high_error**2).mean() + alpha * (low_error**2).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    gradient = 2 * (high_error + alpha * low_error) / student.size
    np.testing.assert_allclose(s.grad, gradient, rtol=1e-10, atol=1e-12)


def test_is_positive_0_only_where_equal_and_symmetric_in_the_difference(domain: tuple):
    transform, student, teacher = domain
    arguments = transform, TWO, (0.5, 2.0)
    assert frequency_aligned_loss(teacher, teacher, *arguments) == 0
    nudged = teacher.clone()
    nudged[0, 0, 0, 0] += 1e-3
    for other in (student, nudged):
        assert (band_errors(other, teacher, transform, TWO) >= 0).all()
        loss = frequency_aligned_loss(other, teacher, *arguments)
        assert loss > 0
        assert torch.equal(frequency_aligned_loss(teacher, other, *arguments), loss)
        assert torch.equal(frequency_aligned_loss(-other, -teacher, *arguments), loss)


def test_gradcheck_with_and_without_sample_weights(domain: tuple):
    transform, *fields = domain
    fields = [field[:2, :1].clone().requires_grad_() for field in fields]
    loss = FrequencyAlignedLoss(transform, SMOOTH, (0.5, 2.0, 1.0))
    assert torch.autograd.gradcheck(loss, fields)
    kept = torch.tensor([1.0, 0.0], dtype=torch.float64, device=fields[0].device)
    weighted = loss.terms(*fields, sample_weights=kept)
    torch.testing.assert_close(weighted.total, loss(*[field[:1] for field in fields]) / 2)
    torch.testing.assert_close(weighted.errors, loss.terms(*fields).errors)
    assert torch.autograd.gradcheck(lambda *f: loss.terms(*f, sample_weights=kept).total, fields)


def test_band_errors_are_a_number_a_sample_and_band(domain: tuple):
    transform, student, teacher = domain
    errors = band_errors(student, teacher, transform, Bands.dyadic(3))
    assert errors.shape == (4, 3)
    expected = (student - teacher).square().flatten(1).mean(1)
    torch.testing.assert_close(errors.sum(1), expected, rtol=1e-12, atol=1e-12)


def test_observed_band_errors_are_scaled_by_the_observed_share(domain: tuple):
    transform, teacher, y = domain
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device) < 0.5
    errors = observed_band_errors(teacher, y.masked_fill(~mask, torch.nan), transform, TWO, mask)
    torch.testing.assert_close(errors.sum().float(), (teacher - y).square()[mask].mean().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_compared_in_float32(domain: tuple, dtype: torch.dtype, autocast: bool):
    transform, student, teacher = domain
    # Of different sizes, so that a difference taken in half precision would be rounded.
    teacher, student = (5 * teacher).to(dtype), student.to(dtype).requires_grad_()
    loss = FrequencyAlignedLoss(transform, TWO, "relative")
    with torch.autocast(student.device.type, torch.bfloat16, enabled=autocast):
        terms = loss.terms(student, teacher)
    assert {value.dtype for value in terms} == {torch.float32}
    expected = loss(student.detach().double(), teacher.double())
    torch.testing.assert_close(terms.total.double(), expected, rtol=1e-5, atol=0)
    terms.total.backward()
    assert student.grad.dtype == dtype


def test_the_module_is_the_function_in_float64_and_names_its_parts(domain: tuple):
    transform, student, teacher = domain
    weights = (0.1, 0.7)  # neither is a float32
    loss = FrequencyAlignedLoss(transform, TWO, weights)
    terms = loss.terms(student.requires_grad_(), teacher)
    errors = band_errors(student, teacher, transform, TWO).mean(0).tolist()
    assert terms.total.item() == pytest.approx(0.1 * errors[0] + 0.7 * errors[1], rel=1e-14)
    assert torch.equal(terms.total, loss(student, teacher))
    function = frequency_aligned_loss(student, teacher, transform, TWO, weights)
    assert torch.equal(terms.total, function)
    assert terms.weights.tolist() == [0.1, 0.7]
    assert terms.errors.tolist() == pytest.approx(errors)
    assert not terms.errors.requires_grad
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_relative_weights_measure_the_teacher(domain: tuple):
    transform, student, teacher = domain
    terms = FrequencyAlignedLoss(transform, TWO, "relative").terms(student, 0 * teacher)
    torch.testing.assert_close(terms.total, student.square().mean())
    terms = FrequencyAlignedLoss(transform, TWO, "relative").terms(student, teacher)
    energy = transform.sample_band_energy(teacher, TWO).mean(0) / teacher[0].numel()
    assert energy.min() > 0.05 * energy.max()
    torch.testing.assert_close(terms.weights, energy.mean() / energy)


LINE = GridTransform((8,))


test_refusals = refusals(
    (
        lambda: band_errors(random(2, 1, 8), random(2, 2, 8), LINE, TWO),
        r"`student` has shape \(2, 1, 8\), expected \(2, 2, 8\) \(the teacher's shape\)",
    ),
    (
        lambda: band_errors(random(2, 1, 9), random(2, 1, 9), LINE, TWO),
        r"a field has shape \(2, 1, 9\), expected \(8,\)",
    ),
    (
        lambda: frequency_aligned_loss(*random(2, 1, 1, 8), LINE, TWO, (1.0, 1.0, 1.0)),
        "`weights` has 3 values, expected 2: one for each band",
    ),
    (
        lambda: FrequencyAlignedLoss("grid", TWO, "fixed"),
        "`transform` is of type str, expected AbstractTransform, such as GridTransform",
    ),
)
