"""Band weights: one contract for all weightings, known answers, loops over steps, refusals."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from small import random, refusals
from torch import Tensor

from sdkd_plugin import Bands, FrequencyAlignedLoss, GridTransform
from sdkd_plugin.losses.band_weights import (
    AbstractWeighting,
    AdaptiveWeighting,
    BandEvidence,
    ConfidenceWeighting,
    FixedWeighting,
    RelativeWeighting,
    make_weighting,
)

LINE, HALVES = GridTransform((8,)), Bands.split(0.5)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def history(steps: int, n_bands: int = 3, dtype: torch.dtype = torch.float32) -> list[BandEvidence]:
    """Random evidence whose errors fall and whose bands differ by orders of magnitude."""
    generator, scale = np.random.default_rng(0), 10.0 ** -np.arange(n_bands)
    rows = [
        [scale * fall * generator.uniform(0.5, 2.0, n_bands) for fall in (0.8**step, 1.0, 0.3)]
        for step in range(steps)
    ]
    return [BandEvidence(*torch.tensor(np.array(row)).to(dtype)) for row in rows]


class Counted(GridTransform):
    """Counts its transforms."""

    transforms = 0

    def sample_band_energy(self, x: Tensor, bands: Bands) -> Tensor:
        self.transforms += 1
        return super().sample_band_energy(x, bands)


class WeightingContract:
    """What each weighting of three bands promises."""

    make: type[AbstractWeighting]
    fits_any_partition = False

    @pytest.fixture
    def weighting(self) -> AbstractWeighting:
        return self.make()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("training", [True, False])
    def test_one_finite_weight_a_band_of_the_evidences_dtype(self, weighting, dtype, training):
        weighting.train(training)
        for evidence in history(4, dtype=dtype):
            weights = weighting(evidence)
            assert weights.shape == (3,)
            assert weights.dtype == dtype
            assert (weights >= 0).all()
            assert weights.isfinite().all()
            assert weights.any()

    def test_no_gradient_goes_through_the_weights(self, weighting):
        loss = FrequencyAlignedLoss(LINE, Bands.dyadic(3), weighting)
        fields = [random(2, 1, 8, seed=seed).requires_grad_() for seed in (0, 1)]
        terms = loss.terms(*fields, random(2, 1, 8, seed=2))
        assert not terms.weights.requires_grad
        fixed = torch.autograd.grad(loss(*fields, terms.weights), fields)
        torch.testing.assert_close(torch.autograd.grad(terms.total, fields), fixed)

    @pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1e30, 1e-30, 0.0)])
    def test_degenerate_evidence_gives_finite_weights(self, weighting, values):
        for _ in range(2):
            for error in (values, values[::-1]):
                rows = [torch.tensor(error), torch.tensor(values), torch.tensor(error)]
                weights = weighting(BandEvidence(*rows))
                assert weights.isfinite().all()
                assert (weights >= 0).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_step_that_is_not_finite_leaves_no_trace(self, weighting, bad):
        undisturbed = copy.deepcopy(weighting)
        first, last = history(2)
        assert torch.equal(weighting(first), undisturbed(first))
        weighting(BandEvidence(*[torch.tensor([1.0, bad, 1.0])] * 3))
        assert torch.equal(weighting(last), undisturbed(last))

    def test_a_run_from_a_checkpoint_equals_an_uninterrupted_one(self, weighting):
        resumed, steps = copy.deepcopy(weighting), history(8)
        for evidence in steps[:5]:
            weighting(evidence)
        resumed.load_state_dict(copy.deepcopy(weighting.state_dict()))
        again = copy.deepcopy(weighting)
        for evidence in steps[5:]:
            weights = weighting(evidence)
            assert torch.equal(weights, resumed(evidence))
            assert torch.equal(weights, again(evidence))

    def test_fields_are_transformed_for_it_only_where_it_uses_them(self, weighting):
        fields = random(2, 1, 8), random(2, 1, 8, seed=1), random(2, 1, 8, seed=2)
        for training in (True, False):
            transform = Counted((8,))
            loss = FrequencyAlignedLoss(transform, Bands.dyadic(3), weighting).train(training)
            weights = loss.terms(*fields).weights
            used = training or weighting.needs_in_eval
            needs = (weighting.needs_teacher_energy, weighting.needs_teacher_error)
            assert transform.transforms == 1 + used * sum(needs)
            bare = weighting(BandEvidence(torch.zeros(3))) if not used else weights
            assert torch.equal(weights, bare)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_another_dtype_of_the_model_changes_no_weight(self, weighting, dtype):
        cast = copy.deepcopy(weighting).to(dtype)
        for evidence in history(5):
            assert torch.equal(cast(evidence), weighting(evidence))
        assert {value.dtype for value in cast.state_dict().values()} <= {torch.float32}

    def test_evaluation_and_later_steps_change_no_earlier_weights(self, weighting):
        first, *later = history(4)
        weights = weighting(first)
        kept, state = weights.clone(), copy.deepcopy(weighting.state_dict())
        weighting.eval()
        for evidence in later:
            weighting(evidence)
        assert all(torch.equal(state[k], v) for k, v in weighting.state_dict().items())
        weighting.train()
        for evidence in later:
            weighting(evidence)
        assert torch.equal(weights, kept)

    def test_it_waits_for_no_device(self, weighting):
        """On the meta device a value cannot be read: `.item()` and `if tensor` raise there."""
        weighting.to("meta")
        assert weighting(BandEvidence(*torch.empty(3, 3, device="meta"))).shape == (3,)

    def test_it_fits_its_number_of_bands(self, weighting):
        assert make_weighting(weighting, 3) is weighting
        if self.fits_any_partition:
            assert make_weighting(weighting, 7) is weighting
        else:
            with pytest.raises(
                ValueError, match="`weights` has 3 values, expected 2: one for each"
            ):
                make_weighting(weighting, 2)


class TestFixed(WeightingContract):
    make = staticmethod(partial(FixedWeighting, (0.1, 0.0, 2.0)))

    def test_known_answers(self, weighting):
        assert weighting(history(1, dtype=torch.float64)[0]).tolist() == [0.1, 0, 2]
        assert make_weighting((1.0, 2.0), 2).weights.tolist() == [1, 2]


class TestRelative(WeightingContract):
    make = RelativeWeighting
    fits_any_partition = True

    @pytest.mark.parametrize(
        ("floor", "energy", "weights"),
        [
            (0.1, [8.0, 2.0], [5 / 8, 5 / 2]),
            (0.5, [8.0, 2.0], [5 / 8, 5 / 4]),  # floored at half of 8
            (0.05, [1.0, 0.0], [0.5, 10.0]),  # a band without energy: 1/2 over 1/20
            (0.05, [0.0, 0.0], [1.0, 1.0]),
            (1.0, [4.0, 2.0, 0.0], [0.5, 0.5, 0.5]),
        ],
    )
    def test_known_answers(self, floor, energy, weights):
        evidence = BandEvidence(torch.zeros(len(energy)), torch.tensor(energy))
        torch.testing.assert_close(RelativeWeighting(floor)(evidence), torch.tensor(weights))


class TestAdaptive(WeightingContract):
    make = staticmethod(partial(AdaptiveWeighting, 3, decay=0.5))

    def test_equals_a_loop_over_steps(self):
        decay, most, floor = 0.7, 1.5, 0.02
        weighting = AdaptiveWeighting(3, decay=decay, max_weight=most, floor=floor)
        error, energy, seen = np.zeros(3), np.zeros(3), set()
        for evidence in history(12, dtype=torch.float64):
            error = decay * error + (1 - decay) * evidence.student_error.numpy()
            energy = decay * energy + (1 - decay) * evidence.teacher_energy.numpy()
            lag = error / np.maximum(energy, floor * energy.max())
            expected = np.clip(lag / lag.mean(), 1 / most, most)
            weights = weighting(evidence).tolist()
            assert weights == pytest.approx(expected, abs=1e-6)
            seen.update(round(w, 6) for w in weights)
        assert round(most, 6) in seen, "the bound was never reached"
        assert len(seen) > 8, "the bound was always reached"

    @pytest.mark.parametrize(
        ("error", "energy", "expected"),
        [
            ([0.0, 0.0], [1.0, 1.0], [1.0, 1.0]),  # no lag anywhere
            ([1.0, 0.0], [0.0, 0.0], [1.0, 1.0]),  # a teacher that is 0
            ([1.0, 0.0], [1.0, 0.0], [2.0, 0.25]),  # an empty band without an error
            ([1.0, 0.05], [1.0, 0.0], [1.0, 1.0]),  # an empty band: its floor is a twentieth
            ([0.0, 1e-38], [1.0, 1e-38], [0.25, 2.0]),
        ],
    )
    def test_empty_bands(self, error, energy, expected):
        weights = AdaptiveWeighting(2)(BandEvidence(torch.tensor(error), torch.tensor(energy)))
        assert weights.tolist() == pytest.approx(expected)


class TestConfidence(WeightingContract):
    make = staticmethod(partial(ConfidenceWeighting, 3, decay=0.5))

    def test_equals_a_loop_over_steps(self):
        weighting, error, energy = ConfidenceWeighting(3, decay=0.8), np.zeros(3), np.zeros(3)
        for step, evidence in enumerate(history(12, dtype=torch.float64)):
            rate = max(1 / (step + 1), 0.2)
            error += rate * (evidence.teacher_error.numpy() - error)
            energy += rate * (evidence.teacher_energy.numpy() - energy)
            expected = energy / (energy + error)
            assert weighting(evidence).tolist() == pytest.approx(expected, abs=1e-6)

    def test_unlabelled_steps_keep_the_last_estimate(self):
        weighting = ConfidenceWeighting(2)
        assert weighting(BandEvidence(numbers(1, 2), numbers(5, 5))).tolist() == [1.0, 1.0]
        labelled = weighting(BandEvidence(numbers(1, 1), numbers(3, 1), numbers(1, 1)))
        assert labelled.tolist() == [0.75, 0.5]
        assert torch.equal(weighting(BandEvidence(numbers(9, 9), numbers(9, 1))), labelled)
        error, energy = numbers(0, 1, 2, 0), numbers(3, 1, 0, 0)
        weights = ConfidenceWeighting(4)(BandEvidence(error, energy, error))
        assert weights.tolist() == [1.0, 0.5, 0.0, 1.0]

    def test_without_decay_only_measure_moves_the_estimate(self):
        evidence = BandEvidence(*[numbers(1, 1)] * 3)
        loss = FrequencyAlignedLoss(LINE, HALVES, ConfidenceWeighting(2, decay=None))
        assert not loss.weighting.needs_teacher_error
        assert loss.weighting(evidence).tolist() == [1.0, 1.0]
        loss.measure(random(2, 1, 8), torch.zeros(2, 1, 8))
        # An error as large as the forecast.
        assert loss.weighting(evidence).tolist() == pytest.approx([0.5, 0.5])

    def test_measure_is_the_mean_over_all_observed_labels(self):
        def measured(*batches: tuple) -> list[float]:
            loss = FrequencyAlignedLoss(GridTransform((6, 8)), HALVES, "confidence")
            for each in batches:
                loss.measure(*each)
            return loss.weighting(BandEvidence(numbers(0, 0))).tolist()

        teacher = random(400, 1, 6, 8)
        y = teacher + random(400, 1, 6, 8, seed=1)
        k = [np.fft.fftfreq(n) * 2 for n in (6, 8)]
        low = np.sqrt((k[0][:, None] ** 2 + k[1][None] ** 2) / 2) < 0.5
        energy, error = (np.abs(np.fft.fft2(f.numpy())) ** 2 for f in (teacher, y - teacher))
        expected = [
            energy[..., b].sum() / (energy[..., b].sum() + error[..., b].sum()) for b in (low, ~low)
        ]
        assert measured((teacher, y)) == pytest.approx(expected, abs=1e-5)
        parts = [(teacher[:50], y[:50]), (teacher[50:], y[50:])]
        assert measured(*parts) == pytest.approx(expected, abs=1e-5)
        # White errors stay white, and are scaled by the observed share.
        mask = random(400, 1, 6, 8, seed=2) > 0
        holes = measured((teacher, torch.where(mask, y, torch.nan), mask))
        assert holes == pytest.approx(expected, abs=0.02)
        rows = torch.arange(6)[:, None].expand(1, 1, 6, 8) < 3
        assert measured((teacher, y, rows)) == pytest.approx(expected, abs=0.02)


def test_a_name_is_the_weighting_with_its_defaults():
    for kind in (FixedWeighting, RelativeWeighting, AdaptiveWeighting, ConfidenceWeighting):
        weighting = make_weighting(kind.__name__.removesuffix("Weighting").lower(), 4)
        assert type(weighting) is kind
        assert weighting(history(1, 4)[0]).shape == (4,)


def measure(weighting: str = "confidence", **changed: Tensor) -> None:
    data = {"teacher": torch.ones(2, 1, 8), "y": torch.ones(2, 1, 8)} | changed
    FrequencyAlignedLoss(LINE, HALVES, weighting).measure(**data)


ONES = numbers(1, 1)


test_refusals = refusals(
    (lambda: FixedWeighting(()), r"`weights` is \(\), expected finite numbers of at least 0,"),
    (lambda: FixedWeighting((1, -0.5)), r"`weights` is \(1.0, -0.5\), expected finite number"),
    (lambda: FixedWeighting((1, torch.nan)), r"`weights` is \(1.0, nan\), expected finite"),
    (lambda: FixedWeighting((1, torch.inf)), r"`weights` is \(1.0, inf\), expected finite"),
    (lambda: FixedWeighting((0, 0)), r"`weights` is \(0.0, 0.0\), .*, not all 0"),
    (lambda: RelativeWeighting(0.0), r"`floor` is 0.0, expected a number in \(0, 1\]"),
    (lambda: RelativeWeighting(1.5), r"`floor` is 1.5, expected a number in \(0, 1\]"),
    (lambda: RelativeWeighting(torch.nan), r"`floor` is nan, expected a number in \(0, 1\]"),
    (lambda: AdaptiveWeighting(1), "`n_bands` is 1, expected an integer of at least 2"),
    (lambda: AdaptiveWeighting(2, decay=1.0), r"`decay` is 1.0, expected a number in \[0, 1\)"),
    (
        lambda: AdaptiveWeighting(2, max_weight=1.0),
        r"`max_weight` is 1.0, expected a number in \(1, 1e9\]",
    ),
    (lambda: AdaptiveWeighting(2, floor=1.5), "`floor` is 1.5, expected a number"),
    (lambda: ConfidenceWeighting(0), "`n_bands` is 0, expected an integer of at least 2"),
    (lambda: ConfidenceWeighting(2, decay=-0.1), r"`decay` is -0.1, expected a number in"),
    *[
        (lambda make=make: make(BandEvidence(ONES, None, ONES)), "`evidence.teacher_energy` is")
        for make in (RelativeWeighting(), AdaptiveWeighting(2), ConfidenceWeighting(2))
    ],
    (lambda: measure("fixed"), "`weighting` is a FixedWeighting, expected a ConfidenceWeighti"),
    (lambda: measure(y=torch.ones(2, 1, 7)), r"`y` has shape \(2, 1, 7\), expected \(2, 1, 8"),
    (lambda: measure(y=torch.full((2, 1, 8), torch.nan)), "`y` has 16 of 16 values that are"),
    (lambda: measure(teacher=torch.full((2, 1, 8), torch.inf)), "`teacher` has 16 of 16"),
    (lambda: measure(mask=torch.zeros(2, 1, 8) > 0), "`mask` is False everywhere, expected"),
    (lambda: measure(mask=torch.ones(1, 8) > 0), r"`mask` has shape \(1, 8\), expected"),
)
