"""Weights of several teachers: against scipy and plain loops, their guarantees, two ranks."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.nn import functional as F

from sdkd_plugin import Bands, GridTransform
from sdkd_plugin.losses import frequency_aligned_loss
from sdkd_plugin.losses.teacher_weights import (
    AEKDAggregation,
    CAMKDAggregation,
    MeanAggregation,
    TeacherEvidence,
    aekd_weights,
    camkd_weights,
    gradient_gram,
    make_aggregation,
    mean_weights,
    teacher_errors,
    teacher_gradients,
    weighted_target,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_gram(n: int, seed: int, size: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of different lengths that share a direction, and their Gram matrix."""
    lengths = 1 + 3 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)).double()
    gradients = lengths * (random(n, size, seed=seed) + 0.7 * random(size, seed=seed + 1))
    return gradients, gradients @ gradients.T


# AEKD's quadratic programme.


def slsqp(gram: np.ndarray, bound: float) -> np.ndarray:
    """The same programme by scipy's general solver."""
    n, scale = len(gram), np.trace(gram)
    gram = gram / scale
    result = scipy.optimize.minimize(
        lambda a: 0.5 * a @ gram @ a,
        np.full(n, 1 / n),
        jac=lambda a: gram @ a,
        bounds=[(0, bound)] * n,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": lambda a: np.ones(n)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return result.x


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("slack", [0.0, 0.05, 0.3, 1.0])
def test_aekd_agrees_with_scipy(n, slack):
    bound = min(1.0, 1 / n + slack)
    for seed in range(8):
        _, gram = random_gram(n, seed)
        weights = aekd_weights(gram, bound).numpy()
        reference = slsqp(gram.numpy(), bound)
        assert weights == pytest.approx(reference, abs=1e-5)
        mine, theirs = (a @ gram.numpy() @ a for a in (weights, reference))
        assert mine <= theirs * (1 + 1e-9)


@pytest.mark.parametrize(("n", "bound"), [(2, 1.0), (3, 0.4), (4, 0.3), (5, 1.0), (6, 0.25)])
def test_aekd_meets_the_optimality_conditions(n, bound):
    active = 0
    for seed in range(30):
        _, gram = random_gram(n, seed)
        weights = aekd_weights(gram, bound)
        slope = (gram @ weights).numpy() / float(gram.trace())
        w = weights.numpy()
        assert w.sum() == pytest.approx(1, abs=1e-10)
        assert w.min() >= 0
        assert w.max() <= bound
        # Weight moves from no teacher to another without a longer gradient.
        can_grow, can_shrink = slope[w < bound - 1e-9], slope[w > 1e-9]
        assert can_grow.size == 0 or can_grow.min() >= can_shrink.max() - 1e-9
        active += bool((w > bound - 1e-9).any() or (w < 1e-9).any())
    assert active > 0, "no constraint was ever active"


def test_aekd_by_hand():
    # Orthogonal gradients of lengths 1 and 2: a is in proportion to 1 / length^2.
    gram = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert aekd_weights(gram, 1.0).tolist() == pytest.approx([0.8, 0.2], abs=1e-9)
    assert aekd_weights(gram, 0.6).tolist() == pytest.approx([0.6, 0.4], abs=1e-15)
    # The shortest point between (1, 0) and (3, 1) is (1, 0) itself.
    assert aekd_weights(gradient_gram(torch.tensor([[1.0, 0.0], [3.0, 1.0]])), 1.0).tolist() == [
        1,
        0,
    ]
    # Opposed gradients cancel: (2, 0) and (-1, 0).
    opposed = gradient_gram(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    assert aekd_weights(opposed, 1.0).tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-9)
    # Orthogonal, of squared lengths 1, 2 and 4: (4, 2, 1) / 7; bounded by 1/2, (3, 2, 1) / 6.
    three = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert aekd_weights(three, 1.0).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=1e-9)
    assert aekd_weights(three, 0.5).tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=1e-9)


def test_two_teachers_stay_within_the_bound():
    seen = []
    for seed in range(50):
        _, gram = random_gram(2, seed)
        weights = aekd_weights(gram.float(), 0.6)
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert all(0.4 - 1e-7 <= w <= 0.6 + 1e-7 for w in weights.tolist())
        seen += weights.tolist()
    assert max(seen) == pytest.approx(0.6)
    assert any(0.41 < w < 0.59 for w in seen), "the bound was always active"


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_common_step_increases_no_teachers_loss(n):
    """To first order, where the bound does not bind; the plain mean does increase one here."""
    mean_fails = 0
    for seed in range(20):
        gradients = random(n, 30, seed=seed) * torch.logspace(0, 1, n, dtype=torch.float64)[:, None]
        weights = aekd_weights(gradient_gram(gradients), 1.0)
        step = weights @ gradients
        slopes = gradients @ step
        assert bool((slopes >= step @ step * (1 - 1e-6)).all())
        mean_fails += bool((gradients @ gradients.mean(0) < 0).any())
    assert mean_fails > 0


def test_the_students_update_increases_no_teachers_loss():
    transform, bands = GridTransform((8, 8)), Bands.split(0.25)
    student, teachers = random(3, 2, 8, 8), random(2, 3, 2, 8, 8, seed=1)

    def loss(one, other):
        return frequency_aligned_loss(one, other, transform, bands, (0.5, 2.0))

    gradients = teacher_gradients(loss, student, teachers)
    weights = aekd_weights(gradient_gram(gradients), 0.9)
    assert weights.max() < 0.9, "the bound is active: choose other fields"
    step = torch.einsum("m,m...->...", weights, gradients)
    for teacher in teachers:
        before, after = loss(student, teacher), loss(student - 1e-3 * step, teacher)
        assert after < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_gradients_have_even_weights(dtype):
    one = random(7).to(dtype)
    other = random(7, seed=1).to(dtype)
    equal = gradient_gram(torch.stack([one, one, one]))
    assert aekd_weights(equal, 0.6).tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)
    nothing = gradient_gram(torch.zeros(4, 7, dtype=dtype))
    assert aekd_weights(nothing, 0.6).tolist() == pytest.approx([0.25] * 4, abs=1e-9)
    # Two teachers that agree and a third: the pair shares what one of them would have.
    pair = aekd_weights(gradient_gram(torch.stack([one, one, other])), 1.0)
    single = aekd_weights(gradient_gram(torch.stack([one, other])), 1.0)
    half = single[0].item() / 2
    assert pair.tolist() == pytest.approx([half, half, single[1].item()], abs=1e-4)
    # A teacher without a gradient is met already: nothing is shorter than standing still.
    met = aekd_weights(gradient_gram(torch.stack([one, 0 * one])), 1.0)
    assert met.tolist() == pytest.approx([0, 1], abs=1e-9)
    assert aekd_weights(torch.ones(1, 1, dtype=dtype), 0.6 + 0.4).tolist() == [1.0]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_aekd_does_not_depend_on_the_losses_scale(scale):
    gradients, _ = random_gram(3, seed=5)
    expected = aekd_weights(gradient_gram(gradients.float()), 0.5)
    scaled = aekd_weights(gradient_gram(scale * gradients.float()), 0.5)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-5)


def test_unit_gradients_do_not_see_lengths():
    gradients = random(3, 20)
    lengths = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)[:, None]
    grams = [gradient_gram(g) for g in (gradients, lengths * gradients)]
    unit = [aekd_weights(gram, 1.0, unit_gradients=True) for gram in grams]
    torch.testing.assert_close(unit[0], unit[1], rtol=0, atol=1e-9)
    plain = gradient_gram(gradients / gradients.norm(dim=1, keepdim=True))
    torch.testing.assert_close(unit[0], aekd_weights(plain, 1.0), rtol=0, atol=1e-9)
    assert aekd_weights(grams[1], 1.0).argmax() == 2
    zero = gradient_gram(torch.stack([gradients[0], 0 * gradients[0]]))
    assert bool(aekd_weights(zero, 1.0, unit_gradients=True).isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_have_no_weights(bad):
    gradients = torch.ones(3, 5)
    gradients[1, 2] = bad
    assert bool(aekd_weights(gradient_gram(gradients)).isnan().all())
    assert bool(aekd_weights(torch.diag(torch.tensor([bad, 1.0, 1.0]))).isnan().all())


def test_aekd_waits_for_no_device():
    """On the meta device a value cannot be read: `.item()` and `if tensor` raise there."""
    gram = gradient_gram(torch.empty(3, 2, 5, device="meta"))
    assert aekd_weights(gram, 0.6, unit_gradients=True).shape == (3,)
    errors, labelled = teacher_errors(
        *[torch.empty(3, 4, 5, device="meta"), torch.empty(4, 5, device="meta")]
    )
    assert camkd_weights(errors, labelled).shape == (4, 3)


# Gradients and their inner products.


def test_teacher_gradients_leave_the_students_graph_alone():
    weight = random(2, 3).requires_grad_()
    student = weight.square()
    teachers = random(2, 2, 3, seed=1)
    gradients = teacher_gradients(F.mse_loss, student, teachers)
    for gradient, teacher in zip(gradients, teachers, strict=True):
        assert torch.allclose(gradient, 2 * (student - teacher) / 6, atol=1e-12)
    assert weight.grad is None
    assert not gradients.requires_grad
    with torch.no_grad():
        assert torch.equal(teacher_gradients(F.mse_loss, student, teachers), gradients)
    student.sum().backward()
    assert weight.grad is not None


def test_gram_is_exact_for_float32_gradients():
    gradients = random(3, 4, 5).float()
    flat = gradients.flatten(1).double().numpy()
    gram = gradient_gram(gradients)
    np.testing.assert_allclose(gram.numpy(), flat @ flat.T, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, gram.T)


RANK = """
import sys
import torch
import torch.distributed as dist
from sdkd_plugin.losses.teacher_weights import AEKDAggregation, TeacherEvidence, gradient_gram

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
gradients = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
mine = gradients[:, 2 * rank : 2 * rank + 2]
gram = gradient_gram(mine)
weights = AEKDAggregation(bound=0.5)(TeacherEvidence(mine, mine))
print(*gram.flatten().tolist(), *weights.tolist())
dist.destroy_process_group()
"""


def test_two_ranks_agree_on_the_weights_of_the_whole_batch(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert printed[0] == printed[1]
    gradients = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    whole = gradient_gram(gradients)
    weights = AEKDAggregation(bound=0.5)(TeacherEvidence(gradients, gradients))
    expected = [*whole.flatten().tolist(), *weights.tolist()]
    assert [float(v) for v in printed[0].split()] == pytest.approx(expected, rel=1e-9)
    half = gradient_gram(gradients[:, :2])
    assert not torch.allclose(half, whole, rtol=0.1)


# CAMKD.


def test_camkd_equals_a_loop_over_samples():
    errors = random(6, 4).square()
    expected = []
    for sample in errors.tolist():
        mean = sum(sample) / 4
        shares = [np.exp(e / mean) for e in sample]
        expected.append([(1 - s / sum(shares)) / 3 for s in shares])
    weights = camkd_weights(errors)
    assert np.abs(weights.numpy() - np.array(expected)).max() < 1e-10
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert bool((weights.argsort(1) == errors.argsort(1, descending=True)).all())


def test_camkd_by_hand():
    # Errors of 1 and 3 are 1/2 and 3/2 of their mean: with two teachers, softmax changes sides.
    weights = camkd_weights(torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64))
    e = np.exp(1.0)
    assert weights[0].tolist() == pytest.approx([e / (1 + e), 1 / (1 + e)])
    assert weights[1].tolist() == [0.5, 0.5]
    assert camkd_weights(torch.tensor([[3.0], [0.0]])).tolist() == [[1.0], [1.0]]


def test_camkd_without_labels_counts_all_alike():
    errors = torch.tensor([[1.0, 3.0], [float("nan"), 2.0]])
    weights = camkd_weights(errors, torch.tensor([True, False]))
    assert weights[1].tolist() == [0.5, 0.5]
    assert weights[0].tolist() == camkd_weights(errors[:1])[0].tolist()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_camkd_does_not_depend_on_units(scale):
    errors = random(5, 3).square().float()
    torch.testing.assert_close(camkd_weights(scale * errors), camkd_weights(errors))


def test_teacher_errors_equal_a_loop():
    teachers, y = random(3, 4, 2, 5), random(4, 2, 5, seed=1)
    mask = random(4, 1, 5, seed=2) > 0
    mask[2] = False
    holes = torch.where(mask, y, torch.nan)
    errors, labelled = teacher_errors(teachers, holes, mask)
    assert labelled.tolist() == [True, True, False, True]
    for b in range(4):
        for k in range(3):
            squares = [
                (teachers[k, b, c, i] - y[b, c, i]).item() ** 2
                for c in range(2)
                for i in range(5)
                if mask[b, 0, i]
            ]
            expected = sum(squares) / len(squares) if squares else 0.0
            assert errors[b, k].item() == pytest.approx(expected, abs=1e-10)


# The weighted target.


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_weighted_target_has_the_gradient_of_the_weighted_losses(per_sample):
    transform, bands = GridTransform((6,)), Bands.split(0.4)
    student, teachers = random(4, 2, 6).requires_grad_(), random(3, 4, 2, 6, seed=1)
    weights = random(4, 3, seed=2).softmax(1) if per_sample else random(3, seed=2).softmax(0)

    def loss(one, other):
        return frequency_aligned_loss(one, other, transform, bands, (0.3, 2.0))

    by_sample = weights.expand(4, 3)
    each = sum(
        by_sample[b, m] * loss(student[b : b + 1], teachers[m, b : b + 1]) / 4
        for m in range(3)
        for b in range(4)
    )
    (expected,) = torch.autograd.grad(each, student)
    target = loss(student, weighted_target(teachers, weights))
    (gradient,) = torch.autograd.grad(target, student)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-10)


def test_weighted_target_keeps_the_dtype():
    teachers = random(2, 3, 4).bfloat16()
    target = weighted_target(teachers, mean_weights(teachers))
    assert target.dtype == torch.bfloat16
    torch.testing.assert_close(target.float(), teachers.float().mean(0), rtol=0.01, atol=0.01)


# The interface.


def test_each_name_weighs_teachers():
    teachers, y = random(2, 3, 4).float(), random(3, 4, seed=1).float()
    gradients = teacher_gradients(F.mse_loss, random(3, 4, seed=2).float(), teachers)
    evidence = TeacherEvidence(teachers, gradients, y)
    shapes = {"mean": (2,), "aekd": (2,), "camkd": (3, 2)}
    for name, shape in shapes.items():
        aggregation = make_aggregation(name)
        aggregation.check(2)
        assert aggregation.needs_gradients == (name == "aekd")
        weights = aggregation(evidence)
        assert weights.shape == shape
        assert weights.dtype == torch.float32
        assert not weights.requires_grad
        assert torch.allclose(weights.sum(-1), torch.ones(()))
        assert weighted_target(teachers, weights).shape == (3, 4)
        assert not list(aggregation.parameters())


def test_modules_are_their_functions():
    teachers, y = random(3, 4, 5), random(4, 5, seed=1)
    mask = random(4, 5, seed=2) > 0
    evidence = TeacherEvidence(teachers, random(3, 4, 5, seed=3), y, mask)
    assert MeanAggregation()(evidence).tolist() == [1 / 3] * 3
    gram = gradient_gram(evidence.gradients)
    for unit in (False, True):
        expected = aekd_weights(gram, 0.5, unit_gradients=unit)
        assert torch.equal(AEKDAggregation(0.5, unit_gradients=unit)(evidence), expected)
    expected = camkd_weights(*teacher_errors(teachers, y, mask))
    assert torch.equal(CAMKDAggregation()(evidence), expected)
    assert CAMKDAggregation()(TeacherEvidence(teachers)).tolist() == [[1 / 3] * 3] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_aggregation("akd"), "`aggregation` is 'akd'.*Did you mean 'aekd'"),
        (lambda: AEKDAggregation(0.0), r"`bound` is 0\.0, expected a weight in \(0, 1\]"),
        (lambda: AEKDAggregation(1.5), r"`bound` is 1\.5"),
        (lambda: AEKDAggregation(0.3).check(3), r"`bound` is 0\.3, expected at least 1 / 3"),
        (lambda: AEKDAggregation(0.6).check(9), "given 9 teachers, expected at most 8"),
        (lambda: aekd_weights(torch.eye(2), 0.4), r"`bound` is 0\.4, expected at least 1 / 2"),
        (
            lambda: AEKDAggregation()(TeacherEvidence(torch.ones(2, 1, 3))),
            "`evidence.gradients` is None",
        ),
        (
            lambda: teacher_gradients(F.mse_loss, torch.ones(1, 2), torch.ones(2, 1, 3)),
            r"`student` has shape \(1, 2\)",
        ),
        (
            lambda: teacher_errors(torch.ones(2, 1, 3), torch.ones(1, 4)),
            r"`y` has shape \(1, 4\)",
        ),
        (
            lambda: teacher_errors(torch.ones(2, 1, 3), torch.ones(1, 3), torch.ones(1, 2) > 0),
            r"`mask` has shape \(1, 2\)",
        ),
        (
            lambda: weighted_target(torch.ones(2, 3, 4), torch.ones(3)),
            r"`weights` has shape \(3,\), expected \(2,\) or \(3, 2\)",
        ),
    ],
)
def test_bad_input_is_named(as_shipped, call, message):
    with pytest.raises(ValueError, match=message):
        call()
