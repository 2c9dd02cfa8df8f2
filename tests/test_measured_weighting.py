"""Weightings with a memory: against plain loops, their bounds, and what they must not do."""

import copy

import numpy as np
import pytest
import torch

from sdkd_plugin import Bands, GridTransform
from sdkd_plugin.losses import BandEvidence, FrequencyAlignedLoss
from sdkd_plugin.losses.band_weights import (
    AdaptiveWeighting,
    ConfidenceWeighting,
    confidence_weights,
    lag_weights,
)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def history(steps: int, n_bands: int, *, seed: int = 0) -> list[BandEvidence]:
    """Random evidence whose errors fall and whose bands differ by orders of magnitude."""
    generator = np.random.default_rng(seed)
    scale = 10.0 ** -np.arange(n_bands)
    return [
        BandEvidence(
            *[
                torch.from_numpy(scale * fall * generator.uniform(0.5, 2.0, n_bands))
                for fall in (0.8**step, 1.0, 0.3)
            ]
        )
        for step in range(steps)
    ]


def lag_reference(error: list[float], energy: list[float], bound: float, floor: float):
    least = floor * max(energy)
    lag = [r / max(e, least) for r, e in zip(error, energy, strict=True)]
    mean = sum(lag) / len(lag)
    return [min(max(one / mean, 1 / bound), bound) for one in lag]


# Adaptive.


def test_adaptive_equals_a_loop_over_steps():
    decay, bound, floor = 0.7, 1.5, 0.02
    weighting = AdaptiveWeighting(3, decay=decay, bound=bound, floor=floor).double()
    error, energy = [0.0] * 3, [0.0] * 3
    seen = set()
    for evidence in history(12, 3):
        for i in range(3):
            error[i] = decay * error[i] + (1 - decay) * evidence.student_error[i].item()
            energy[i] = decay * energy[i] + (1 - decay) * evidence.teacher_energy[i].item()
        weights = weighting(evidence).tolist()
        assert weights == pytest.approx(lag_reference(error, energy, bound, floor), abs=1e-10)
        seen.update(weights)
    assert {bound, 1 / bound} & seen, "the bound was never active"
    assert len(seen) > 12, "the bound was always active"


def test_adaptive_by_hand():
    weighting = AdaptiveWeighting(2, decay=0.5, bound=10.0)
    first = weighting(BandEvidence(numbers(1, 1), numbers(4, 1)))
    # Lags 1/4 and 1, mean 5/8.
    assert first.tolist() == pytest.approx([0.4, 1.6])
    # Averages: errors (1, 1) / 4 + (3.5, 0.5) / 2 = (2, 0.5), energies 3/4 (4, 1) = (3, 0.75).
    second = weighting(BandEvidence(numbers(3.5, 0.5), numbers(4, 1)))
    assert second.tolist() == pytest.approx([1.0, 1.0])


def test_the_band_that_lags_counts_more():
    transform, bands = GridTransform((16,)), Bands.split(0.25)
    loss = FrequencyAlignedLoss(transform, bands, AdaptiveWeighting(2))
    teacher = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0))
    low = transform.filter(teacher, lambda f: (f < 0.25).to(f.dtype))
    only_low, only_high = loss.terms(low, teacher), loss.terms(teacher - low, teacher)
    assert only_low.weights[1] > 1 > only_low.weights[0]
    fresh = FrequencyAlignedLoss(transform, bands, AdaptiveWeighting(2))
    swapped = fresh.terms(teacher - low, teacher)
    assert swapped.weights[0] > 1 > swapped.weights[1]
    # With its memory of the first step the other loss turns around slowly.
    assert only_high.weights[0] < swapped.weights[0]


@pytest.mark.parametrize("bound", [1.5, 4.0])
def test_adaptive_stays_within_its_bound(bound):
    weighting = AdaptiveWeighting(8, bound=bound, decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        error, energy = 10 ** (12 * torch.rand(2, 8, generator=generator) - 6)
        weights = weighting(BandEvidence(error, energy))
        assert weights.min() >= 1 / bound - 1e-7
        assert weights.max() <= bound + 1e-6


@pytest.mark.parametrize(
    ("error", "energy", "expected"),
    [
        ([0.0, 0.0], [1.0, 1.0], [1.0, 1.0]),  # no lag anywhere
        ([1.0, 0.0], [0.0, 0.0], [1.0, 1.0]),  # a teacher that says nothing
        ([1.0, 0.0], [1.0, 0.0], [2.0, 0.25]),  # an empty band, and no error in it
        ([1.0, 0.05], [1.0, 0.0], [1.0, 1.0]),  # an empty band: its floor is a twentieth
        ([0.0, 1e-38], [1.0, 1e-38], [0.25, 2.0]),
    ],
)
def test_adaptive_is_safe_where_a_band_carries_nothing(error, energy, expected):
    weights = AdaptiveWeighting(2)(BandEvidence(torch.tensor(error), torch.tensor(energy)))
    assert weights.tolist() == pytest.approx(expected)


def test_adaptive_stands_still_in_eval_mode():
    weighting = AdaptiveWeighting(2).eval()
    assert not weighting.needs_teacher_energy
    error = numbers(1, 3)
    assert weighting(BandEvidence(error)).tolist() == [1.0, 1.0]
    weighting.train()
    assert weighting.needs_teacher_energy
    learnt = weighting(BandEvidence(error, numbers(2, 2)))
    weighting.eval()
    assert torch.equal(weighting(BandEvidence(100 * numbers(3, 1), numbers(1, 9))), learnt)


# Confidence.


def test_confidence_equals_a_loop_over_steps():
    decay = 0.8
    weighting = ConfidenceWeighting(3, decay=decay).double()
    error, energy = [0.0] * 3, [0.0] * 3
    for step, evidence in enumerate(history(12, 3)):
        rate = max(1 / (step + 1), 1 - decay)
        for i in range(3):
            error[i] += rate * (evidence.teacher_error[i].item() - error[i])
            energy[i] += rate * (evidence.teacher_energy[i].item() - energy[i])
        expected = [e / (e + r) for e, r in zip(energy, error, strict=True)]
        assert weighting(evidence).tolist() == pytest.approx(expected, abs=1e-10)


def test_confidence_by_hand():
    weights = confidence_weights(numbers(3, 1, 0, 0), numbers(0, 1, 2, 0))
    assert weights.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert lag_weights(numbers(1, 3), numbers(2, 2)).tolist() == [0.5, 1.5]


def test_confidence_is_one_before_any_measurement():
    weighting = ConfidenceWeighting(2)
    assert weighting.needs_teacher_error
    assert weighting(BandEvidence(numbers(1, 2))).tolist() == [1.0, 1.0]
    assert weighting(BandEvidence(numbers(1, 2), numbers(5, 5))).tolist() == [1.0, 1.0]


def test_unlabelled_steps_keep_the_last_estimate():
    weighting = ConfidenceWeighting(2)
    labelled = weighting(BandEvidence(numbers(1, 1), numbers(3, 1), numbers(1, 1)))
    assert labelled.tolist() == [0.75, 0.5]
    for _ in range(3):
        assert torch.equal(weighting(BandEvidence(numbers(9, 9), numbers(9, 1))), labelled)
    weighting.eval()
    assert not weighting.needs_teacher_error
    assert torch.equal(
        weighting(BandEvidence(numbers(1, 1), numbers(1, 1), numbers(9, 9))), labelled
    )


def test_without_decay_only_measure_moves_the_estimate():
    weighting = ConfidenceWeighting(2, decay=None)
    assert not weighting.needs_teacher_energy
    evidence = BandEvidence(numbers(1, 1), numbers(1, 1), numbers(1, 1))
    assert weighting(evidence).tolist() == [1.0, 1.0]
    teacher = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    weighting.measure(teacher, torch.zeros(2, 1, 8), GridTransform((8,)), Bands.split(0.5))
    # An error as large as the forecast.
    assert weighting(evidence).tolist() == pytest.approx([0.5, 0.5])
    weighting.reset()
    assert weighting(evidence).tolist() == [1.0, 1.0]


def measured(batches, **options) -> list[float]:
    weighting = ConfidenceWeighting(2, **options).double()
    for teacher, y, mask in batches:
        weighting.measure(teacher, y, GridTransform((6, 8)), Bands.split(0.5), mask)
    return weighting(BandEvidence(numbers(0, 0))).tolist()


def test_measure_is_the_mean_over_all_samples():
    generator = torch.Generator().manual_seed(0)
    teacher, y = torch.randn(2, 5, 3, 6, 8, generator=generator, dtype=torch.float64)
    y = teacher + 0.3 * y
    k = [np.fft.fftfreq(n) * 2 for n in (6, 8)]
    frequency = np.sqrt((k[0][:, None] ** 2 + k[1][None] ** 2) / 2)
    power = [np.abs(np.fft.fft2(f.numpy())) ** 2 for f in (teacher, y - teacher)]
    expected = []
    for band in (frequency < 0.5, frequency >= 0.5):
        energy, error = (p[..., band].sum() for p in power)
        expected.append(energy / (energy + error))
    whole = measured([(teacher, y, None)])
    assert whole == pytest.approx(expected, abs=1e-10)
    parts = [(teacher[:2], y[:2], None), (teacher[2:], y[2:], None)]
    assert measured(parts) == pytest.approx(expected, abs=1e-10)


def test_measure_scales_masked_errors_up():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(400, 1, 6, 8, generator=generator, dtype=torch.float64)
    y = teacher + torch.randn(400, 1, 6, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(400, 1, 6, 8, generator=generator) < 0.5
    # White errors stay white, and double where half of them is seen.
    full = measured([(teacher, y, None)])
    holes = measured([(teacher, torch.where(mask, y, torch.nan), mask)])
    assert holes == pytest.approx(full, abs=0.02)
    # One time of all samples observed, the same mask for all of them.
    row = torch.arange(6)[:, None].expand(1, 1, 6, 8) < 3
    assert measured([(teacher, y, row)]) == pytest.approx(full, abs=0.02)


# What both promise.

FACTORIES = [
    pytest.param(lambda: AdaptiveWeighting(3, decay=0.5), id="adaptive"),
    pytest.param(lambda: ConfidenceWeighting(3, decay=0.5), id="confidence"),
]


@pytest.mark.parametrize("make", FACTORIES)
def test_a_resumed_run_equals_an_uninterrupted_one(make):
    steps = history(10, 3)
    weighting = make()
    for evidence in steps[:5]:
        weighting(evidence)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(weighting.state_dict()))
    for evidence in steps[5:]:
        assert torch.equal(weighting(evidence), resumed(evidence))


@pytest.mark.parametrize("make", FACTORIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_no_trace(make, bad):
    first, _, last = history(3, 3)
    weighting, undisturbed = make(), make()
    for one in (weighting, undisturbed):
        one(first)
    broken = BandEvidence(*[torch.tensor([1.0, bad, 1.0])] * 3)
    assert bool(weighting(broken).isfinite().all())
    assert torch.equal(weighting(last), undisturbed(last))


@pytest.mark.parametrize("make", FACTORIES)
def test_forward_waits_for_no_device(make):
    """On the meta device a value cannot be read: `.item()` and `if tensor` raise there."""
    weighting = make().to("meta")
    evidence = BandEvidence(*torch.empty(3, 3, device="meta"))
    assert weighting(evidence).shape == (3,)


@pytest.mark.parametrize("make", FACTORIES)
def test_weights_are_not_the_memory_itself(make):
    """A later step must not change the weights that an earlier backward still needs."""
    first, second = history(2, 3)
    weighting = make().double()
    weights = weighting(first)
    before = weights.clone()
    weighting(second)
    assert torch.equal(weights, before)


def test_the_loss_with_adaptive_weights_passes_gradcheck():
    loss = FrequencyAlignedLoss(
        GridTransform((6,)), Bands.split(0.4), AdaptiveWeighting(2)
    ).double()
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 1, 6, generator=generator, dtype=torch.float64)
    loss(student, teacher)
    # Weights are constants of a step: fixed by eval mode while differences are taken.
    loss.eval()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveWeighting(1), "`n_bands` is 1"),
        (
            lambda: AdaptiveWeighting(2, decay=1.0),
            r"`decay` is 1\.0, expected a number in \[0, 1\)",
        ),
        (lambda: AdaptiveWeighting(2, bound=1.0), r"`bound` is 1\.0, expected .* above 1"),
        (lambda: AdaptiveWeighting(2, floor=0.0), r"`floor` is 0\.0"),
        (lambda: AdaptiveWeighting(2, floor=1.5), r"`floor` is 1\.5, expected a share"),
        (lambda: AdaptiveWeighting(2)(BandEvidence(numbers(1, 1))), "adaptive weighting needs it"),
        (lambda: AdaptiveWeighting(2).check(3), "is 2, expected 3"),
        (lambda: ConfidenceWeighting(2).check(3), "is 2, expected 3"),
        (lambda: ConfidenceWeighting(0), "`n_bands` is 0"),
        (lambda: ConfidenceWeighting(2, decay=-0.1), r"`decay` is -0\.1"),
        (
            lambda: ConfidenceWeighting(2)(BandEvidence(numbers(1, 1), None, numbers(1, 1))),
            "confidence weighting needs it",
        ),
        (lambda: measure(y=torch.ones(2, 1, 7)), r"`y` has shape \(2, 1, 7\)"),
        (lambda: measure(y=torch.full((2, 1, 8), torch.nan)), "`y` has 16 of 16 values"),
        (lambda: measure(teacher=torch.full((2, 1, 8), torch.inf)), "`teacher` has 16 of 16"),
        (lambda: measure(mask=torch.zeros(2, 1, 8) > 0), "`mask` is False everywhere"),
        (lambda: measure(mask=torch.ones(2, 1, 4) > 0), r"`mask` has shape \(2, 1, 4\)"),
        (lambda: measure(mask=torch.ones(1, 8) > 0), r"`mask` has shape \(1, 8\)"),
    ],
)
def test_bad_input_is_named(as_shipped, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def measure(**changed) -> None:
    data = {"teacher": torch.ones(2, 1, 8), "y": torch.ones(2, 1, 8)} | changed
    ConfidenceWeighting(2).measure(transform=GridTransform((8,)), bands=Bands.split(0.5), **data)
