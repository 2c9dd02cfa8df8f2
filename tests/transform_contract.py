"""What every transform promises. A new one inherits `TransformContract` and writes two fixtures.

`BasisContract` adds what transforms with coefficients promise; its references are numpy and scipy
in float64, share no code with ours, and rebuild band images.
"""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small import medium_precision
from torch import Tensor

from sdkd_plugin import Bands
from sdkd_plugin.spectral import AbstractTransform

EDGES = (0.31, 0.62)  # no small domain has a frequency there
BANDS = [Bands(EDGES), Bands(EDGES, transition=0.2)]
BAND_IDS = ["hard", "smooth"]
TIGHT = dict(rtol=1e-10, atol=1e-10)

MakeField = Callable[..., Tensor]
Response = Callable[[np.ndarray], np.ndarray]


class TransformContract:
    """What `DistillationLoss` and the losses rely on, whatever the domain."""

    @pytest.fixture
    def transform(self, device: torch.device) -> AbstractTransform:
        """Exact in float64."""
        raise NotImplementedError

    @pytest.fixture
    def make_field(self, transform: AbstractTransform, device: torch.device) -> MakeField:
        """``make_field(*leading, dtype=...)``, random numbers on the domain."""
        n_behind = -transform.domain_axes[-1] - 1

        def make(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
            size = (*leading, *transform.domain_shape, *[2] * n_behind)
            x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            return x.to(device, dtype)

        return make

    def response(self, frequency: Tensor) -> Tensor:
        """A response that the transform can filter with."""
        return 1 / (1 + frequency)

    def weights(self, x: Tensor) -> Tensor:
        """Of each element in ``sum(x^2)``."""
        return torch.ones_like(x)

    def test_energies_of_samples_and_fields_sum_to_the_whole(self, transform, make_field):
        x = make_field(2, 3)
        for bands in BANDS:
            a_sample = transform.sample_band_energy(x, bands)
            assert a_sample.shape == (2, 3)
            assert (a_sample >= 0).all()
            whole = (self.weights(x) * x.square()).flatten(1).sum(1)
            torch.testing.assert_close(a_sample.sum(1), whole, **TIGHT)
            each = transform.band_energy(x, bands)
            torch.testing.assert_close(each.flatten(1, -2).sum(1), a_sample, **TIGHT)

    def test_frequency_zero_is_the_mean(self, transform, make_field):
        energy = transform.sample_band_energy(3 * torch.ones_like(make_field(2, 1)), BANDS[0])
        assert (energy[:, 1:] < 1e-10 * energy[:, :1]).all()

    def test_energy_is_quadratic_and_its_gradient_linear(self, transform, make_field):
        x, y = make_field(2, 3), make_field(2, 3).flip(0)
        weights = torch.tensor([3.0, 0.5, 2.0]).to(x)

        def loss(x: Tensor) -> Tensor:
            return (transform.sample_band_energy(x, BANDS[1]) @ weights).sum()

        gradient = torch.func.grad(loss)
        torch.testing.assert_close((x * gradient(x)).sum() / 2, loss(x), **TIGHT)
        torch.testing.assert_close(gradient(x - 2 * y), gradient(x) - 2 * gradient(y), **TIGHT)
        mean = (y * transform.filter(x, self.response)).mul(self.weights(x)).sum()
        other = (x * transform.filter(y, self.response)).mul(self.weights(x)).sum()
        torch.testing.assert_close(mean, other, **TIGHT)

    def test_every_derivative(self, transform, make_field):
        """Reverse, forward, twice, and under `torch.func.vmap`."""
        x = make_field(2, 1).requires_grad_()
        energy = lambda x: transform.sample_band_energy(x, BANDS[1])  # noqa: E731
        filtered = lambda x: transform.filter(x, self.response)  # noqa: E731
        for function in (energy, filtered):
            options = dict(fast_mode=True, check_forward_ad=True)
            assert torch.autograd.gradcheck(function, (x,), **options)
            options = dict(fast_mode=True, check_fwd_over_rev=True)
            assert torch.autograd.gradgradcheck(function, (x,), **options)
        fields = make_field(4, 1)
        gradient = torch.func.grad(lambda x: energy(x[None])[0, 1])
        one_by_one = torch.stack([gradient(field) for field in fields])
        torch.testing.assert_close(torch.func.vmap(gradient)(fields), one_by_one, **TIGHT)
        twice = torch.func.jacfwd(lambda t: gradient(fields[0] + t * fields[1]))
        direction = twice(torch.zeros((), dtype=fields.dtype, device=fields.device))
        torch.testing.assert_close(direction, gradient(fields[1]), **TIGHT)

    @pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 1, 3)])
    def test_leading_axes_are_kept(self, transform, make_field, leading: tuple[int, ...]):
        x = make_field(*leading)
        assert transform.filter(x, torch.ones_like).shape == x.shape
        others = [n for a, n in enumerate(x.shape, -x.ndim) if a not in transform.domain_axes]
        energy = transform.band_energy(x, BANDS[0])
        assert energy.shape == (*others, 3)
        flat = transform.band_energy(x.flatten(0, len(leading) - 1), BANDS[0])
        torch.testing.assert_close(energy.flatten(0, -2), flat.flatten(0, -2), **TIGHT)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    def test_dtype_and_device_are_kept_and_halves_are_computed_in_float32(
        self, transform, make_field, dtype: torch.dtype, autocast: bool
    ):
        x = make_field(2, 3, dtype=dtype).requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            energy = transform.sample_band_energy(x, BANDS[0])
            filtered = transform.filter(x, self.response)
        assert (energy.dtype, energy.device) == (torch.float32, x.device)
        assert (filtered.dtype, filtered.device) == (dtype, x.device)
        with medium_precision():
            again = transform.sample_band_energy(x, BANDS[0])
        torch.testing.assert_close(again, energy)
        exact = x.detach().double()
        expected = transform.sample_band_energy(exact, BANDS[0])
        torch.testing.assert_close(energy.double(), expected, rtol=2e-5, atol=2e-5)
        rounding = max(torch.finfo(dtype).eps, 2e-5)
        expected = transform.filter(exact, self.response)
        torch.testing.assert_close(filtered.double(), expected, rtol=rounding, atol=rounding)
        energy.sum().backward()
        assert (x.grad.dtype, x.grad.device) == (dtype, x.device)
        whole = 2 * self.weights(x) * exact
        torch.testing.assert_close(x.grad.double(), whole, rtol=3 * rounding, atol=1e-4)

    def test_float64_stays_float64(self, transform, make_field):
        x = make_field(2, 3).requires_grad_()
        energy = transform.sample_band_energy(x, BANDS[0])
        energy.sum().backward()
        assert (energy.dtype, x.grad.dtype) == (torch.float64, torch.float64)
        torch.testing.assert_close(x.grad, 2 * (self.weights(x) * x).detach(), **TIGHT)

    def test_casting_the_module_leaves_the_frequencies_exact(self, transform, make_field):
        x = make_field(2, 3)
        expected = transform.sample_band_energy(x, BANDS[0])
        cast = copy.deepcopy(transform).to(torch.bfloat16).float().half()
        assert torch.equal(cast.sample_band_energy(x, BANDS[0]), expected)

    def test_trains_after_a_first_use_in_inference_mode(self, transform, make_field):
        x = make_field(2, 3)
        with torch.inference_mode():
            transform.sample_band_energy(x, BANDS[0])
        transform.sample_band_energy(x.requires_grad_(), BANDS[0]).sum().backward()
        torch.testing.assert_close(x.grad, 2 * (self.weights(x) * x).detach(), **TIGHT)

    def test_partitions_are_not_mixed_up(self, transform, make_field):
        x, known = make_field(2, 3), copy.deepcopy(transform)
        for bands in (*BANDS, Bands.split(0.5), BANDS[0]):
            fresh = copy.deepcopy(transform)
            for field in (x, x.float()):
                expected = fresh.sample_band_energy(field, bands)
                assert torch.equal(known.sample_band_energy(field, bands), expected)

    def test_pickles_and_copies(self, transform, make_field):
        x = make_field(2, 3)
        expected = transform.sample_band_energy(x, BANDS[0])
        for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):  # noqa: S301
            assert torch.equal(twin.sample_band_energy(x, BANDS[0]), expected)
        assert not transform.state_dict()

    def test_the_field_given_is_not_changed(self, transform, make_field):
        x = make_field(2, 3)
        before = x.clone()
        transform.sample_band_energy(x, BANDS[0])
        transform.filter(x, torch.zeros_like)
        assert torch.equal(x, before)

    @pytest.mark.usefixtures("as_shipped")
    def test_refuses_fields_off_the_domain(self, transform, make_field):
        x = make_field(2, 3)
        longer = torch.cat([x, x], transform.domain_axes[0])
        for call in (
            lambda x: transform.sample_band_energy(x, BANDS[0]),
            lambda x: transform.band_energy(x, BANDS[0]),
            lambda x: transform.filter(x, torch.ones_like),
        ):
            with pytest.raises(ValueError, match=r"fields?.* has shape .* expected "):
                call(longer)
            with pytest.raises(ValueError, match=r"a field is of torch.int64, expected floating"):
                call(x.long())
            for empty in (x[:0], x[:, :0]):
                with pytest.raises(ValueError, match="expected at least one sample"):
                    call(empty)
        no_batch = make_field()
        with pytest.raises(ValueError, match="batch"):
            transform.sample_band_energy(no_batch, BANDS[0])


class Domain(NamedTuple):
    """A transform with coefficients, and what is known about its domain without it.

    ``filter(x, response)`` is ``g(L) x`` for a field without channels, ``(fields, *domain_shape)``,
    complex where L is; ``modes`` are pure fields ``domain_shape`` and their frequencies.
    """

    transform: AbstractTransform
    filter: Callable[[np.ndarray, Response], np.ndarray]
    modes: list[tuple[np.ndarray, float]]


def raised_cosine_weights(frequency: np.ndarray, bands: Bands) -> np.ndarray:
    """Power weights of bands, written anew."""

    def step(edge: float) -> np.ndarray:
        if bands.transition == 0:
            return np.where(frequency >= edge, 1.0, 0.0)
        ramp = np.clip((frequency - edge) / bands.transition + 0.5, 0, 1)
        return 0.5 - 0.5 * np.cos(np.pi * ramp)

    steps = [np.ones_like(frequency), *map(step, bands.edges), np.zeros_like(frequency)]
    return np.stack([low - high for low, high in itertools.pairwise(steps)])


def without_channels(x: Tensor, transform: AbstractTransform) -> np.ndarray:
    """All fields of a tensor, one after the other: ``(fields, *domain_shape)``."""
    n = len(transform.domain_axes)
    last = x.detach().cpu().double().movedim(transform.domain_axes, tuple(range(-n, 0)))
    return last.reshape(-1, *transform.domain_shape).numpy()


class BasisContract(TransformContract):
    """What transforms with coefficients promise besides."""

    @pytest.fixture
    def domain(self, device: torch.device) -> Domain:
        raise NotImplementedError

    @pytest.fixture
    def transform(self, domain: Domain) -> AbstractTransform:
        return domain.transform

    def test_round_trip_and_parseval(self, transform, make_field):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            x = make_field(2, 3, dtype=dtype)
            torch.testing.assert_close(
                transform.inverse(transform(x)), x, rtol=tolerance, atol=tolerance
            )
        x = make_field(2, 3)
        n = len(transform.domain_axes)
        c = transform(x).movedim(transform.domain_axes, tuple(range(-n, 0)))
        energy = (transform.multiplicity * c.abs().square()).sum()
        torch.testing.assert_close(energy, x.square().sum(), **TIGHT)
        with pytest.raises(ValueError, match=r"a field has shape .* expected .* along axes"):
            transform(torch.cat([x, x], transform.domain_axes[0]))

    def test_frequencies_reach_from_the_mean_to_at_most_one(self, transform):
        assert transform.frequencies.dtype == torch.float64
        assert transform.frequencies.min() == 0
        assert transform.frequencies.max() <= 1

    def test_a_pure_field_falls_into_exactly_one_band(self, domain: Domain, device: torch.device):
        bands = Bands(tuple(i / 16 for i in range(1, 16)))
        x = torch.from_numpy(np.stack([mode for mode, _ in domain.modes])).to(device)
        x = x.reshape(*x.shape, *[1] * (-domain.transform.domain_axes[-1] - 1))
        energy = domain.transform.sample_band_energy(x, bands)
        share = energy / energy.sum(1, keepdim=True)
        frequencies = np.array([frequency for _, frequency in domain.modes])
        # A frequency on an edge belongs to the band above it.
        expected = np.searchsorted(bands.edges, frequencies + 1e-9, side="right")
        wanted = torch.nn.functional.one_hot(torch.from_numpy(expected), bands.n_bands)
        torch.testing.assert_close(share, wanted.to(share), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("bands", BANDS, ids=BAND_IDS)
    def test_energy_and_gradient_are_those_of_rebuilt_band_images(
        self, domain: Domain, make_field: MakeField, bands: Bands
    ):
        weights = np.array([3.0, 0.5, 2.0])
        x, transform = make_field(2, 3).requires_grad_(), domain.transform
        fields = without_channels(x, transform)
        images = [
            domain.filter(fields, lambda f, i=i: np.sqrt(raised_cosine_weights(f, bands)[i]))
            for i in range(bands.n_bands)
        ]
        axes = tuple(range(1, 1 + len(transform.domain_shape)))
        expected = np.stack([(np.abs(image) ** 2).sum(axes) for image in images], -1)
        energy = transform.band_energy(x, bands)
        actual = energy.detach().cpu().reshape(-1, bands.n_bands)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)
        (energy @ torch.from_numpy(weights).to(x)).sum().backward()
        expected = 2 * domain.filter(
            fields, lambda f: np.tensordot(weights, raised_cosine_weights(f, bands), 1)
        )
        actual = without_channels(x.grad, transform)
        np.testing.assert_allclose(actual, expected.real, rtol=1e-10, atol=1e-10)

    def test_filter_is_the_response_times_each_frequency(self, domain: Domain, make_field):
        x, transform = make_field(2, 3), domain.transform
        actual = transform.filter(x, lambda f: 1 / (1 + 5 * f))
        expected = domain.filter(without_channels(x, transform), lambda f: 1 / (1 + 5 * f))
        np.testing.assert_allclose(
            without_channels(actual, transform), expected.real, rtol=1e-10, atol=1e-10
        )
        values = 1 / (1 + 5 * transform.frequencies)
        torch.testing.assert_close(transform.filter(x, values), actual, **TIGHT)
        with pytest.raises(ValueError, match=r"`response` has shape \(1, 2, 3, 4\), expected that"):
            transform.filter(x, torch.ones(1, 2, 3, 4, device=x.device))

    def test_spectrum_sums_to_the_mean_square(self, transform, make_field):
        x = make_field(2, 3)
        frequencies, energy = transform.spectrum(x)
        assert frequencies.shape == energy.shape
        torch.testing.assert_close(energy.sum(), x.square().mean(), **TIGHT)
        low = energy[frequencies < EDGES[0]].sum() * x.numel()
        expected = transform.band_energy(x, BANDS[0])[..., 0].sum()
        torch.testing.assert_close(low, expected, **TIGHT)

    def test_resized_to_its_own_size_is_the_same(self, transform, make_field):
        x = make_field(2, 3)
        twin = transform.resized(transform.domain_shape).to(x.device)
        torch.testing.assert_close(
            twin.sample_band_energy(x, BANDS[0]), transform.sample_band_energy(x, BANDS[0])
        )
