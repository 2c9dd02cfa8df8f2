"""The frequency-aligned loss: MSE where all bands count alike, and known answers where not."""

import copy
import pickle

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkd_plugin import (
    Bands,
    FixedWeighting,
    FrequencyAlignedLoss,
    GraphTransform,
    GridTransform,
    RelativeWeighting,
    frequency_aligned_loss,
)
from sdkd_plugin.losses import BandEvidence, ChannelProjector, band_errors
from sdkd_plugin.spectral import AbstractTransform


def fixed_graph(dtype: torch.dtype = torch.float64) -> GraphTransform:
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 9, (2, 30), generator=generator)
    return GraphTransform.from_edges(edges, torch.rand(30, generator=generator), 9, dtype=dtype)


DOMAINS = {
    "periodic": (GridTransform((6, 7)), (4, 3, 6, 7)),
    "reflect": (GridTransform((5, 8), "reflect"), (4, 3, 5, 8)),
    "graph": (fixed_graph(), (4, 5, 9, 2)),
}
PARTITIONS = [Bands.split(0.3), Bands((0.3, 0.6), transition=0.2)]


@pytest.fixture(params=DOMAINS)
def domain(
    request: pytest.FixtureRequest, device: torch.device
) -> tuple[AbstractTransform, Tensor, Tensor]:
    """A transform, a student's field and a teacher's, float64."""
    transform, shape = DOMAINS[request.param]
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(device)
    return copy.deepcopy(transform).to(device), student, teacher


@pytest.mark.parametrize("bands", PARTITIONS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_weights_are_the_mse_and_so_is_the_gradient(
    domain: tuple, bands: Bands, dtype: torch.dtype
):
    transform, student, teacher = domain
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()
    ours = frequency_aligned_loss(student, teacher, transform, bands, [1.0] * bands.n_bands)
    theirs = F.mse_loss(student, teacher)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for actual, expected in zip(
        torch.autograd.grad(ours, (student, teacher)),
        torch.autograd.grad(theirs, (student, teacher)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_agrees_with_rebuilt_band_images_in_numpy(boundary: str):
    """The paper's form: ||Psi_h(s) - Psi_h(t)||^2 + alpha ||Psi_l(s) - Psi_l(t)||^2."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4, 3, 12, 9))
    alpha, cutoff, axes = 0.3, 0.33, (-2, -1)
    if boundary == "periodic":
        forward, inverse = np.fft.fftn, lambda c, axes: np.fft.ifftn(c, axes=axes).real
        relative = [2 * np.abs(np.fft.fftfreq(n)) for n in (12, 9)]
    else:
        forward = lambda x, axes: scipy.fft.dctn(x, axes=axes, norm="ortho")  # noqa: E731
        inverse = lambda c, axes: scipy.fft.idctn(c, axes=axes, norm="ortho")  # noqa: E731
        relative = [np.arange(n) / n for n in (12, 9)]
    low = np.hypot(relative[0][:, None], relative[1]) / np.sqrt(2) < cutoff

    def image(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return inverse(forward(x, axes=axes) * mask, axes=axes)

    low_error = image(student, low) - image(teacher, low)
    high_error = image(student, ~low) - image(teacher, ~low)
    s = torch.from_numpy(student).requires_grad_()
    bands, transform = Bands.split(cutoff), GridTransform((12, 9), boundary)
    loss = frequency_aligned_loss(s, torch.from_numpy(teacher), transform, bands, (alpha, 1.0))
    loss.backward()
    assert loss.item() == pytest.approx(
        (high_error**2).mean() + alpha * (low_error**2).mean(), rel=1e-10
    )
    gradient = 2 * (high_error + alpha * low_error) / student.size
    np.testing.assert_allclose(s.grad, gradient, rtol=1e-10, atol=1e-12)


def test_is_positive_and_zero_only_where_equal(domain: tuple):
    transform, student, teacher = domain
    bands = Bands.split(0.3)
    assert frequency_aligned_loss(teacher, teacher, transform, bands, (0.5, 2.0)) == 0
    nudged = teacher.clone()
    nudged[0, 0, 0, 0] += 1e-3
    for other in (student, nudged):
        errors = band_errors(other, teacher, transform, bands)
        assert (errors >= 0).all()
        assert frequency_aligned_loss(other, teacher, transform, bands, (0.5, 2.0)) > 0


def test_is_symmetric_in_the_sign_of_the_difference(domain: tuple):
    transform, student, teacher = domain
    arguments = transform, Bands.split(0.3), (0.5, 2.0)
    one_way = frequency_aligned_loss(student, teacher, *arguments)
    assert torch.equal(frequency_aligned_loss(teacher, student, *arguments), one_way)
    assert torch.equal(frequency_aligned_loss(-student, -teacher, *arguments), one_way)


def test_gradcheck(domain: tuple):
    transform, student, teacher = (domain[0], *(x[:2, :1].clone() for x in domain[1:]))
    loss = lambda s, t: frequency_aligned_loss(s, t, transform, PARTITIONS[1], (0.5, 2.0, 1.0))  # noqa: E731
    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), teacher.requires_grad_()))


def test_band_errors_are_a_number_a_sample_and_band(domain: tuple):
    transform, student, teacher = domain
    errors = band_errors(student, teacher, transform, Bands.dyadic(3))
    assert errors.shape == (4, 3)
    torch.testing.assert_close(
        errors.sum(1), (student - teacher).square().flatten(1).mean(1), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_halves_are_compared_in_float32(domain: tuple, dtype: torch.dtype, autocast: bool):
    transform, student, teacher = domain
    # Of different sizes, so that a difference taken in half precision would be rounded.
    teacher = (5 * teacher).to(dtype)
    student = student.to(dtype).requires_grad_()
    bands = Bands.split(0.3)
    module = FrequencyAlignedLoss(transform, bands, RelativeWeighting())
    with torch.autocast(student.device.type, torch.bfloat16, enabled=autocast):
        loss = frequency_aligned_loss(student, teacher, transform, bands, (0.3, 2.0))
        terms = module.terms(student, teacher)
    assert {v.dtype for v in (loss, *terms)} == {torch.float32}
    exact = student.detach().double(), teacher.double()
    expected = frequency_aligned_loss(*exact, transform, bands, (0.3, 2.0))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.total.double(), module(*exact), rtol=1e-5, atol=0)
    loss.backward()
    assert student.grad.dtype == dtype


def test_float64_has_no_float32_inside(domain: tuple):
    transform, student, teacher = domain
    weights = (0.1, 0.7)  # neither is a float32
    loss = frequency_aligned_loss(student, teacher, transform, Bands.split(0.3), weights)
    errors = band_errors(student, teacher, transform, Bands.split(0.3)).mean(0)
    assert float(loss) == pytest.approx(0.1 * float(errors[0]) + 0.7 * float(errors[1]), rel=1e-14)


def test_the_module_is_the_function_and_names_its_parts(domain: tuple):
    transform, student, teacher = domain
    bands = Bands.split(0.3)
    module = FrequencyAlignedLoss(transform, bands, (0.5, 2.0))
    terms = module.terms(student.requires_grad_(), teacher)
    expected = frequency_aligned_loss(student, teacher, transform, bands, (0.5, 2.0))
    assert torch.equal(terms.total, expected)
    assert torch.equal(module(student, teacher), expected)
    assert terms.weights.tolist() == [0.5, 2]
    torch.testing.assert_close(
        terms.errors, band_errors(student, teacher, transform, bands).mean(0).detach()
    )
    assert terms.total.requires_grad
    assert not terms.errors.requires_grad
    assert not list(module.parameters())
    assert not module.state_dict()
    twin = pickle.loads(pickle.dumps(module))  # noqa: S301
    assert torch.equal(twin(student, teacher), expected)


def test_relative_weighting_measures_the_teacher_without_a_gradient(domain: tuple):
    transform, student, teacher = domain
    bands = Bands.split(0.3)
    teacher = teacher.requires_grad_()
    terms = FrequencyAlignedLoss(transform, bands, RelativeWeighting(0.01)).terms(student, teacher)
    energy = transform.sample_band_energy(teacher.detach(), bands).mean(0) / teacher[0].numel()
    torch.testing.assert_close(terms.weights, energy.mean() / energy)
    (gradient,) = torch.autograd.grad(terms.total, teacher)
    fixed = frequency_aligned_loss(student, teacher, transform, bands, terms.weights.tolist())
    torch.testing.assert_close(gradient, *torch.autograd.grad(fixed, teacher))


@pytest.mark.parametrize(
    ("floor", "energy", "weights"),
    [
        (0.1, [8.0, 2.0], [5 / 8, 5 / 2]),
        (0.5, [8.0, 2.0], [5 / 8, 5 / 4]),  # floored at half of 8
        (0.05, [1.0, 0.0], [0.5, 10.0]),  # a band without energy: 1/2 over 1/20
        (0.05, [0.0, 0.0], [1.0, 1.0]),  # a teacher that is zero
        (1.0, [4.0, 2.0, 0.0], [0.5, 0.5, 0.5]),
    ],
)
def test_relative_weighting_known_answers(floor: float, energy: list, weights: list):
    evidence = BandEvidence(torch.zeros(len(energy)), torch.tensor(energy))
    torch.testing.assert_close(RelativeWeighting(floor)(evidence), torch.tensor(weights))


def test_relative_weighting_is_finite_for_a_teacher_that_is_zero(domain: tuple):
    transform, student, teacher = domain
    loss = FrequencyAlignedLoss(transform, Bands.split(0.3), RelativeWeighting())
    value = loss(student, torch.zeros_like(teacher))
    torch.testing.assert_close(value, student.square().mean())


def test_fixed_weighting_known_answers():
    evidence = BandEvidence(torch.tensor([7.0, 8.0, 9.0]))
    assert FixedWeighting((0.0, 0.5, 2.0))(evidence).tolist() == [0, 0.5, 2]
    double = BandEvidence(evidence.student_error.double())
    assert FixedWeighting((0.0, 0.1, 2.0))(double).tolist() == [0, 0.1, 2]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((), r"`weights` is \(\), expected finite numbers of at least 0, not all 0"),
        ((1.0, -0.5), r"`weights` is \(1.0, -0.5\), expected finite numbers of at least 0"),
        ((1.0, float("nan")), "expected finite numbers"),
        ((1.0, float("inf")), "expected finite numbers"),
        ((0.0, 0.0), "not all 0"),
        ((1.0, 1.0, 1.0), "`weights` has 3 values, expected 2: one for each band"),
    ],
)
def test_weights_that_are_refused(weights: tuple, message: str):
    fields = torch.zeros(2, 1, 1, 8)
    with pytest.raises(ValueError, match=message):
        FrequencyAlignedLoss(GridTransform((8,)), Bands.split(0.5), weights)
    with pytest.raises(ValueError, match=message):
        frequency_aligned_loss(*fields, GridTransform((8,)), Bands.split(0.5), weights)


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        (0.0, "`floor` is 0.0, expected a finite number above 0"),
        (-1.0, "`floor` is -1.0, expected"),
        (float("nan"), "`floor` is nan, expected"),
        (1.5, r"`floor` is 1.5, expected a share in \(0, 1\]"),
    ],
)
def test_floors_that_are_refused(floor: float, message: str):
    with pytest.raises(ValueError, match=message):
        RelativeWeighting(floor)


def test_relative_weighting_asks_for_its_evidence():
    with pytest.raises(ValueError, match=r"`evidence\.teacher_energy` is None"):
        RelativeWeighting()(BandEvidence(torch.zeros(2)))


def test_shapes_that_are_refused():
    transform, bands = GridTransform((8,)), Bands.split(0.5)
    x = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match=r"`student` has shape \(2, 1, 8\), expected \(2, 2, 8\)"):
        band_errors(x, torch.zeros(2, 2, 8), transform, bands)
    with pytest.raises(ValueError, match=r"a field has shape \(2, 1, 9\), expected \(8,\)"):
        band_errors(torch.zeros(2, 1, 9), torch.zeros(2, 1, 9), transform, bands)


# -------------------------------------------------------------------------------------- projector


@pytest.mark.parametrize(("channels", "axis"), [((4, 7), -3), ((7, 4), -1), ((5, 5), -2)])
def test_projector_is_a_linear_map_of_the_channels(channels: tuple[int, int], axis: int):
    before = torch.get_rng_state()
    projector = ChannelProjector(*channels, channel_axis=axis)
    assert torch.equal(torch.get_rng_state(), before)
    shape = [2, 3, 6, 8]
    shape[axis] = channels[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = projector(x)
    assert y.shape[axis] == channels[1]
    expected = torch.einsum("oc,...c->...o", projector.linear.weight, x.movedim(axis, -1))
    torch.testing.assert_close(y.movedim(axis, -1), expected)
    gram = projector.linear.weight @ projector.linear.weight.mT
    if channels[1] > channels[0]:
        gram = projector.linear.weight.mT @ projector.linear.weight
    torch.testing.assert_close(gram, torch.eye(min(channels)), atol=1e-5, rtol=0)
    assert isinstance(projector.linear, nn.Linear)
    assert not projector.linear.bias.any()


@pytest.mark.parametrize("channels", [(0, 4), (4, 0)])
def test_projector_refuses(channels: tuple[int, int]):
    with pytest.raises(ValueError, match="_channels` is 0, expected an integer of at least 1"):
        ChannelProjector(*channels, channel_axis=-3)
