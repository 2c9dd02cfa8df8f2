"""Teacher weights: one contract, AEKD against scipy and its guarantees, CAMKD, two processes."""

import functools

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import make_loss, random, refusals
from torch import Tensor, nn
from torch.nn import functional as F

from sdkd_plugin import Bands, GridTransform, TeacherOutput, frequency_aligned_loss
from sdkd_plugin.losses.task import sample_errors
from sdkd_plugin.losses.teacher_weights import (
    AbstractAggregation,
    AEKDAggregation,
    CAMKDAggregation,
    MeanAggregation,
    TeacherEvidence,
    aekd_weights,
    gradient_gram,
    make_aggregation,
    teacher_gradients,
    weighted_target,
)

double = functools.partial(random, dtype=torch.float64)


def evidence(n: int = 3, *, labels: bool = True) -> TeacherEvidence:
    """Teachers of different quality, with holes in the labels and a sample without any."""
    y, mask = double(4, 5, seed=1), double(4, 5, seed=2) > 0
    mask[2] = False
    sizes = torch.arange(1, n + 1).reshape(n, 1, 1)
    teachers = y + sizes * double(n, 4, 5)
    gradients = teacher_gradients(F.mse_loss, double(4, 5, seed=3), teachers)
    y = torch.where(mask, y, torch.nan)
    return TeacherEvidence(teachers, gradients, *((y, mask) if labels else ()))


class AggregationContract:
    """What each aggregation promises."""

    shape: tuple[int, ...] = (3,)

    @pytest.fixture
    def aggregation(self) -> AbstractAggregation:
        return self.make()

    @pytest.mark.parametrize("labels", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_weights_sum_to_1_without_gradient(self, aggregation, labels, dtype):
        of = {torch.float64: dtype, torch.bool: torch.bool}
        given = [v if v is None else v.to(of[v.dtype]) for v in evidence(labels=labels)]
        given = TeacherEvidence(*given)
        weights = aggregation(given)
        assert weights.shape == self.shape
        assert weights.dtype == dtype
        assert not weights.requires_grad
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(self.shape[:-1], dtype=dtype))
        assert weighted_target(given.teachers, weights).shape == (4, 5)

    def test_weights_follow_the_order_of_the_teachers(self, aggregation):
        order, given = [2, 0, 1], evidence()
        permuted = TeacherEvidence(given[0][order], given[1][order], *given[2:])
        torch.testing.assert_close(aggregation(permuted), aggregation(given)[..., order])

    def test_one_teacher_has_weight_1(self, aggregation):
        weights = aggregation(evidence(1))
        torch.testing.assert_close(weights, torch.ones_like(weights))

    def test_it_has_nothing_to_train_or_to_store(self, aggregation):
        assert not list(aggregation.parameters())
        assert not aggregation.state_dict()
        assert make_aggregation(aggregation) is aggregation

    def test_it_waits_for_no_device(self, aggregation):
        """On the meta device a value cannot be read: `.item()` and `if tensor` raise there."""
        given = [None if value is None else value.to("meta") for value in evidence()]
        assert aggregation(TeacherEvidence(*given)).shape == self.shape


class TestMean(AggregationContract):
    make = MeanAggregation


class TestAEKD(AggregationContract):
    @pytest.fixture(params=[False, True])
    def aggregation(self, request):
        return AEKDAggregation(0.5, unit_gradients=request.param)

    def test_is_its_function(self, aggregation):
        gram = gradient_gram(evidence().gradients)
        expected = aekd_weights(gram, 0.5, unit_gradients=aggregation.unit_gradients)
        assert torch.equal(aggregation(evidence()), expected)


def camkd(errors: Tensor) -> Tensor:
    """The weights of teachers with these squared errors, ``(batch, n_teachers)``."""
    teachers = errors.sqrt().T[..., None]
    return CAMKDAggregation()(TeacherEvidence(teachers, y=0 * teachers[0]))


class TestCAMKD(AggregationContract):
    make, shape = CAMKDAggregation, (4, 3)

    def test_equals_a_loop_over_labelled_samples(self, aggregation):
        given = evidence()
        errors, labelled = zip(
            *[sample_errors(teacher, given.y, given.mask) for teacher in given.teachers],
            strict=True,
        )
        expected = []
        for sample, seen in zip(torch.stack(errors, 1).tolist(), labelled[0].tolist(), strict=True):
            shares = [np.exp(e / np.mean(sample)) if seen else 1.0 for e in sample]
            expected.append([(1 - share / sum(shares)) / 2 for share in shares])
        assert aggregation(given).numpy() == pytest.approx(np.array(expected), abs=1e-10)
        assert aggregation(given._replace(y=None)).tolist() == [[1 / 3] * 3] * 4

    def test_by_hand(self):
        # Errors of 1 and 3 are 1/2 and 3/2 of their mean; with two teachers softmax is reversed.
        e, errors = np.exp(1.0), torch.tensor([[1.0, 3.0], [0.0, 0.0]])
        for scale in (1.0, 1e-30, 1e30):
            weights = camkd(scale * errors)
            assert weights[0].tolist() == pytest.approx([e / (1 + e), 1 / (1 + e)])
            assert weights[1].tolist() == [0.5, 0.5]


def random_gram(n: int, seed: int) -> Tensor:
    """Inner products of gradients of different lengths that share a direction."""
    lengths = 1 + 3 * double(n, 1, seed=seed).abs()
    gradients = lengths * (double(n, 20, seed=seed) + 0.7 * double(20, seed=seed + 1))
    return gradients @ gradients.T


def slsqp(gram: np.ndarray, most: float) -> np.ndarray:
    """The same programme by scipy's general solver."""
    n, gram = len(gram), gram / np.trace(gram)
    return scipy.optimize.minimize(
        lambda a: 0.5 * a @ gram @ a,
        np.full(n, 1 / n),
        jac=lambda a: gram @ a,
        bounds=[(0, most)] * n,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones(n)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    ).x


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.3, 1.0])
def test_aekd_agrees_with_scipy_and_meets_the_optimality_conditions(n: int, slack: float):
    most = min(1.0, 1 / n + slack)
    for seed in range(8):
        gram = random_gram(n, seed).numpy()
        w, reference = aekd_weights(torch.from_numpy(gram), most).numpy(), slsqp(gram, most)
        assert w == pytest.approx(reference, abs=1e-5)
        assert w @ gram @ w <= reference @ gram @ reference * (1 + 1e-9)
        assert w.sum() == pytest.approx(1, abs=1e-10)
        # No weight can move from a teacher to another for a shorter gradient.
        slope = gram @ w / np.trace(gram)
        can_grow, can_shrink = slope[w < most - 1e-9], slope[w > 1e-9]
        assert can_grow.size == 0 or can_grow.min() >= can_shrink.max() - 1e-9


@pytest.mark.parametrize(
    ("gradients", "most", "expected"),
    [
        # Orthogonal gradients of lengths 1 and 2: in proportion to 1 / length^2.
        ([[1, 0], [0, 2]], 1.0, [0.8, 0.2]),
        ([[1, 0], [0, 2]], 0.6, [0.6, 0.4]),
        ([[1, 0], [3, 1]], 1.0, [1, 0]),  # the shortest point between them is (1, 0) itself
        ([[2, 0], [-1, 0]], 1.0, [1 / 3, 2 / 3]),  # opposed gradients cancel
        ([[1, 0, 0], [0, 2**0.5, 0], [0, 0, 2]], 1.0, [4 / 7, 2 / 7, 1 / 7]),
        ([[1, 0, 0], [0, 2**0.5, 0], [0, 0, 2]], 0.5, [1 / 2, 1 / 3, 1 / 6]),
        ([[0, 0], [0, 0], [0, 0], [0, 0]], 0.6, [0.25] * 4),
        ([[1, 2], [0, 0]], 1.0, [0, 1]),  # nothing is shorter than a gradient of 0
        ([[1, 0], [1, 0], [0, 1]], 1.0, [0.25, 0.25, 0.5]),  # two agree and share a weight
        ([[1, torch.nan], [1, 0]], 0.6, [torch.nan] * 2),
        ([[1, torch.inf], [1, 0]], 0.6, [torch.nan] * 2),
    ],
)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
def test_aekd_by_hand(gradients: list, most: float, expected: list, scale: float):
    gram = gradient_gram(scale * torch.tensor(gradients, dtype=torch.float32))
    assert aekd_weights(gram, most).tolist() == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_unit_gradients_make_lengths_irrelevant():
    gradients = double(3, 20)
    long = gradients * torch.tensor([[1.0], [10.0], [0.1]], dtype=torch.float64)
    plain, unit = (
        aekd_weights(gradient_gram(long), 1.0, unit_gradients=unit) for unit in (False, True)
    )
    normed = gradient_gram(gradients / gradients.norm(dim=1, keepdim=True))
    torch.testing.assert_close(unit, aekd_weights(normed, 1.0), rtol=0, atol=1e-9)
    assert plain.argmax() == 2
    zero = gradient_gram(torch.stack([gradients[0], 0 * gradients[0]]))
    assert aekd_weights(zero, 1.0, unit_gradients=True).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_aekd_under_autocast_has_the_weights_of_float32(dtype: torch.dtype):
    """Half-precision gradients of a mean over many elements are mostly 0."""
    forecast = 0.1 * random(32, 1, 64, 64).to(dtype)
    outputs = [
        TeacherOutput((forecast.float() + size * random(32, 1, 64, 64, seed=seed)).to(dtype))
        for seed, size in ((1, 0.002), (2, 0.004))
    ]
    options = {"transform": GridTransform((64, 64)), "aggregation": AEKDAggregation(1.0)}
    loss = make_loss(teacher=[nn.Identity(), nn.Identity()], **options)
    with torch.autocast("cpu", dtype):
        half = loss(forecast, outputs=outputs).teacher_weights
    exact = loss(forecast.float(), outputs=[TeacherOutput(o.forecast.float()) for o in outputs])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact.teacher_weights, rtol=0, atol=1e-3)
    assert 0.6 < exact.teacher_weights[0] < 0.9


@pytest.mark.parametrize("max_weight", [0.6, 1.0])
def test_aekd_in_a_loss_keeps_its_bound_and_raises_no_teachers_loss(max_weight: float):
    """In the space of forecasts, to first order, where the bound is not reached."""
    aggregation = AEKDAggregation(max_weight)
    options = {"aggregation": aggregation, "weighting": (0.2, 5.0)}
    loss = make_loss(teacher=[nn.Identity(), nn.Identity()], **options)
    free = 0
    for seed in range(12):
        outputs = [TeacherOutput(random(5, 3, 8, 9, seed=seed + i) + 1) for i in (100, 200)]
        forecast = random(5, 3, 8, 9, seed=seed).requires_grad_()
        terms = loss(forecast, outputs=outputs)
        assert terms.teacher_weights.max() <= max_weight + 1e-6
        (update,) = torch.autograd.grad(terms.total, forecast)
        losses = [loss.frequency(forecast, output.forecast) for output in outputs]
        gradients = torch.stack([torch.autograd.grad(one, forecast)[0] for one in losses])
        expected = aekd_weights(gradient_gram(gradients), max_weight).float()
        torch.testing.assert_close(terms.teacher_weights, expected, rtol=0, atol=1e-4)
        if float(terms.teacher_weights.max()) < max_weight - 1e-4:
            free += 1
            assert (gradients * update).flatten(1).sum(1).min() >= -1e-9
    assert free > 5


def test_camkd_in_a_loss_weighs_each_sample_and_evenly_without_labels():
    y, only_first = random(5, 3, 8, 9), torch.eye(5)[0].reshape(5, 1, 1, 1)
    loss = make_loss(teacher=[nn.Identity(), nn.Identity()], aggregation="camkd")
    outputs = [TeacherOutput(y + 0.1), TeacherOutput(y + only_first)]
    weights = loss(y, y=y, outputs=outputs).teacher_weights
    first, other = camkd(torch.tensor([[0.01, 1.0], [0.01, 0.0]]))
    torch.testing.assert_close(weights, (first + 4 * other) / 5)
    assert loss(y, outputs=outputs).teacher_weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_weighted_target_has_the_gradient_of_the_weighted_losses(per_sample: bool):
    student, teachers = double(4, 2, 6).requires_grad_(), double(3, 4, 2, 6, seed=1)
    weights = double(4, 3, seed=2).softmax(1) if per_sample else double(3, seed=2).softmax(0)

    def loss(one: Tensor, other: Tensor) -> Tensor:
        return frequency_aligned_loss(one, other, GridTransform((6,)), Bands.split(0.4), (0.3, 2.0))

    each = sum(
        weights.expand(4, 3)[b, m] * loss(student[b : b + 1], teachers[m, b : b + 1]) / 4
        for m in range(3)
        for b in range(4)
    )
    (expected,) = torch.autograd.grad(each, student)
    (gradient,) = torch.autograd.grad(loss(student, weighted_target(teachers, weights)), student)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-10)
    assert weighted_target(teachers.bfloat16(), weights.float()).dtype == torch.bfloat16


def test_teacher_gradients_leave_the_students_graph_alone():
    weight, teachers = double(2, 3).requires_grad_(), double(2, 2, 3, seed=1)
    student = weight.square()
    gradients = teacher_gradients(F.mse_loss, student, teachers)
    torch.testing.assert_close(gradients, (2 * (student - teachers) / 6).detach())
    assert not gradients.requires_grad
    with torch.no_grad():
        assert torch.equal(teacher_gradients(F.mse_loss, student, teachers), gradients)
    assert weight.grad is None
    student.sum().backward()
    assert weight.grad is not None


def _weigh(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = random(3, 4, 5)[:, 2 * rank : 2 * rank + 2]
    weights = AEKDAggregation(0.5)(TeacherEvidence(mine, mine))
    torch.save((gradient_gram(mine), weights), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_on_the_weights_of_the_whole_batch(tmp_path):
    mp.spawn(_weigh, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    whole = random(3, 4, 5)
    torch.testing.assert_close(first[0], gradient_gram(whole), rtol=1e-9, atol=0)
    torch.testing.assert_close(first[1], AEKDAggregation(0.5)(TeacherEvidence(whole, whole)))
    assert not torch.allclose(gradient_gram(whole[:, :2]), gradient_gram(whole), rtol=0.1)


test_refusals = refusals(
    (lambda: make_aggregation("akd"), r"`aggregation` is 'akd', .* Did you mean 'aekd'\?"),
    (lambda: AEKDAggregation(0.0), r"`max_weight` is 0.0, expected a number in \(0, 1\]"),
    (lambda: AEKDAggregation(1.5), r"`max_weight` is 1.5, expected a number in \(0, 1\]"),
    (lambda: AEKDAggregation(0.3).check(3), "`max_weight` is 0.3, expected at least 1 / 3: the"),
    (lambda: AEKDAggregation(0.6).check(9), "AEKD is given 9 teachers, expected at most 8"),
    (lambda: aekd_weights(torch.eye(2), 0.4), "`max_weight` is 0.4, expected at least 1 / 2"),
    (
        lambda: AEKDAggregation()(TeacherEvidence(torch.ones(2, 1, 3))),
        "`evidence.gradients` is None: AEKD needs `teacher_gradients`",
    ),
    (
        lambda: teacher_gradients(F.mse_loss, torch.ones(1, 2), torch.ones(2, 1, 3)),
        r"`student` has shape \(1, 2\), expected \(1, 3\) \(each teacher's shape\)",
    ),
    (
        lambda: weighted_target(torch.ones(2, 3, 4), torch.ones(3)),
        r"`weights` has shape \(3,\), expected \(2,\) or \(3, 2\)",
    ),
)
