"""The vorticity solver and the random initial fields."""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from torch.fft import fftfreq, irfft2, rfft2, rfftfreq

from sdkd_plugin.data import vorticity as equation
from sdkd_plugin.data.navier_stokes import gaussian_random_field
from sdkd_plugin.data.time_stepping import etdrk4_coefficients
from sdkd_plugin.data.vorticity import fno_forcing, solve

# By name, because the package exports the function of this name in the module's place.
data_set = importlib.import_module("sdkd_plugin.data.navier_stokes")

UNFORCED = {"forcing": None}
SMALL = {"resolution": 16, "solver_resolution": 32, "duration": 2.0, "progress": False}


def axes(nx, ny=None):
    ny = ny or nx
    x, y = (torch.arange(n, dtype=torch.float64) / n for n in (nx, ny))
    return torch.meshgrid(x, y, indexing="ij")


def relative_l2(got, expected):
    return float((got - expected).norm() / expected.norm())


def truncated(fields):
    """The part of a field that the 2/3 rule keeps."""
    n = fields.shape[-1]
    kept = ((fftfreq(n) * n).abs() < n / 3 - 1e-3)[:, None] & (rfftfreq(n) * n < n / 3 - 1e-3)
    return irfft2(rfft2(fields) * kept, s=(n, n))


def energy_and_enstrophy(w):
    n = w.shape[-1]
    kx, ky = 2 * math.pi * n * fftfreq(n).double()[:, None], 2 * math.pi * n * rfftfreq(n).double()
    square = kx**2 + ky**2
    psi = rfft2(w) / square.where(square > 0, torch.ones(()).double())
    u, v = irfft2(1j * ky * psi, s=(n, n)), irfft2(-1j * kx * psi, s=(n, n))
    return torch.stack([(u**2 + v**2).sum((-1, -2)), (w**2).sum((-1, -2))])


class TestExactSolutions:
    @pytest.mark.parametrize(("kx", "ky"), [(1, 1), (1, 3), (4, 0), (0, 5)])
    def test_taylor_green_decay(self, kx, ky):
        # One shell of wave numbers: w is a multiple of psi, so it does not advect itself.
        x, y = axes(32)
        wave = torch.cos(2 * math.pi * kx * x) * torch.cos(2 * math.pi * ky * y)[None]
        times = torch.arange(1, 4).double()
        rate = 0.01 * 4 * math.pi**2 * (kx**2 + ky**2)
        got = solve(wave, viscosity=0.01, duration=3.0, dt=0.25, **UNFORCED)
        exact = torch.exp(-rate * times)[None, :, None, None] * wave[:, None]
        assert float((got - exact).abs().max()) < 1e-13

    def test_forced_from_rest(self):
        # f has one shell of wave numbers too: w = f (1 - exp(-r t)) / r with r = 8 pi^2 nu.
        rate = 8 * math.pi**2 * 1e-2
        got = solve(torch.zeros(1, 16, 16).double(), viscosity=1e-2, duration=3.0, dt=0.5)
        for i, t in enumerate((1, 2, 3)):
            exact = fno_forcing(*axes(16)) * (1 - math.exp(-rate * t)) / rate
            assert float((got[0, i] - exact).abs().max()) < 1e-14

    def test_tendency_is_minus_advection(self):
        # w = cos 2 pi x + cos 4 pi y, worked out by hand: u . grad w = -3/2 sin 2 pi x sin 4 pi y.
        x, y = axes(16)
        w = torch.cos(2 * math.pi * x) + torch.cos(4 * math.pi * y)
        advection = -1.5 * torch.sin(2 * math.pi * x) * torch.sin(4 * math.pi * y)
        dt = 1e-6
        change = (
            solve(w[None], viscosity=0.0, duration=dt, record_interval=dt, **UNFORCED)[0, 0] - w
        )
        assert relative_l2(change / dt, -advection) < 1e-5


class TestConservation:
    def test_truncation_conserves_energy_and_enstrophy(self):
        w = truncated(gaussian_random_field(3, 33, generator=0))
        flow = equation._Flow(torch.zeros(33, 33).double(), 0.0, w)
        rate = flow.to_field(flow.tendency(rfft2(w)))
        before, after = energy_and_enstrophy(w - 1e-3 * rate), energy_and_enstrophy(w + 1e-3 * rate)
        # Both are quadratic, so the central difference is their exact derivative.
        assert float(((after - before) / (after + before)).abs().max()) < 1e-15

    @pytest.mark.parametrize("n", [32, 33])
    def test_nothing_above_a_third_of_the_grid(self, n):
        w = gaussian_random_field(1, n, generator=0) + 1
        for forcing in (None, lambda x, y: (x >= y).double()):
            got = solve(w, duration=1.0, viscosity=0.0, forcing=forcing)
            torch.testing.assert_close(got, truncated(got), rtol=0, atol=1e-13)

    @pytest.mark.parametrize(("scheme", "steps", "order"), [("etdrk4", 32, 5), ("cn-heun", 64, 3)])
    def test_inviscid_drift_is_of_the_order_in_time(self, scheme, steps, order):
        w = truncated(4 * gaussian_random_field(2, 32, generator=0))
        drifts = []
        for n in (steps, 2 * steps):
            late = solve(w, viscosity=0.0, duration=1.0, dt=1 / n, scheme=scheme, **UNFORCED)[:, 0]
            change = energy_and_enstrophy(late) / energy_and_enstrophy(w) - 1
            drifts.append(change.abs().amax(1))
        assert float(drifts[-1].max()) < 2e-5
        # One above the scheme's: energy changes by the amplitude's error, the phase's is larger.
        measured = torch.log2(drifts[0] / drifts[1])
        assert torch.all((measured - order).abs() < 0.4), measured

    def test_mean_vorticity_changes_as_forced(self):
        w = gaussian_random_field(2, 16, generator=0)
        for scheme in ("etdrk4", "cn-heun", "cn-euler"):
            got = solve(
                w + 0.5, duration=2.0, forcing=lambda x, y: fno_forcing(x, y) + 0.25, dt=1 / 16,
                scheme=scheme,
            )  # fmt: skip
            expected = torch.tensor([0.75, 1.0]).double().expand(2, 2)
            torch.testing.assert_close(got.mean((-1, -2)), expected, rtol=0, atol=1e-14)


class TestAccuracy:
    @pytest.mark.parametrize(
        ("scheme", "steps", "order", "window"),
        [("etdrk4", 16, 4, 0.1), ("cn-heun", 64, 2, 0.05), ("cn-euler", 256, 1, 0.05)],
    )
    def test_order(self, scheme, steps, order, window):
        w = 4 * gaussian_random_field(2, 32, generator=0)
        reference = solve(w, duration=1.0, dt=1 / 512)
        errors = [
            relative_l2(solve(w, duration=1.0, dt=1 / n, scheme=scheme), reference)
            for n in (steps, 2 * steps, 4 * steps)
        ]
        orders = [math.log2(a / b) for a, b in pairwise(errors)]
        assert orders == pytest.approx([order] * 2, abs=window)

    def test_space_converges(self):
        coarse, fine = (
            torch.exp(torch.cos(2 * math.pi * (x + y)) / 2 + torch.sin(2 * math.pi * x) / 2)[None]
            for x, y in (axes(32), axes(64))
        )
        settings = {"viscosity": 2e-3, "duration": 2.0, "dt": 1 / 64}
        assert relative_l2(solve(coarse, **settings), solve(fine, **settings)[..., ::2, ::2]) < 1e-6

    def test_float32_agrees_with_float64(self):
        w = gaussian_random_field(2, 32, generator=0)
        single = solve(w.float(), duration=5.0)
        assert single.dtype == torch.float32
        assert relative_l2(single.double(), solve(w, duration=5.0)) < 1e-5

    def test_equation_has_no_preferred_place_nor_direction(self):
        w = gaussian_random_field(2, 24, generator=0)
        settings = {"duration": 2.0, "viscosity": 1e-3, **UNFORCED}
        got = solve(w, **settings)
        moved = solve(w.roll((5, -3), (-2, -1)), **settings)
        torch.testing.assert_close(moved, got.roll((5, -3), (-2, -1)), rtol=0, atol=1e-12)
        # A mirror image turns the other way: exchanging x and y changes the sign of vorticity.
        mirrored = solve(-w.mT.contiguous(), **settings)
        torch.testing.assert_close(mirrored, -got.mT, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("z", [0.0, -1e-9, -1e-3, -0.1, -20.0, -1e3])
    def test_coefficients_match_their_series_and_formulas(self, z):
        coefficients = etdrk4_coefficients(torch.tensor(z, dtype=torch.float64))
        if abs(z) < 1:
            phi = [sum(z**k / math.factorial(k + n) for k in range(20)) for n in range(4)]
            half = sum((z / 2) ** k / math.factorial(k + 1) for k in range(20)) / 2
        else:
            e, half = math.exp(z), math.expm1(z / 2) / z
            phi = [e, (e - 1) / z, (e - 1 - z) / z**2, (e - 1 - z - z**2 / 2) / z**3]
        exact = [
            half,
            phi[1] - 3 * phi[2] + 4 * phi[3],
            2 * phi[2] - 4 * phi[3],
            4 * phi[3] - phi[2],
        ]
        assert [float(c) for c in coefficients] == pytest.approx(exact, rel=1e-12)


class TestInitialField:
    def test_spectrum_follows_the_law(self):
        n, samples = 16, 4000
        fields = gaussian_random_field(samples, n, generator=0)
        assert fields.dtype == torch.float64
        c = rfft2(fields, norm="forward")
        kx, ky = (fftfreq(n) * n)[:, None].double(), (rfftfreq(n) * n)[None].double()
        carried = (kx.abs() < n / 2) & (ky < n / 2) & ((kx != 0) | (ky != 0))
        law = 2 * 7.0**3 * (4 * math.pi**2 * (kx**2 + ky**2) + 49) ** -2.5
        assert c[:, ~carried].abs().max() < 1e-15
        # |c|^2 / law has mean and deviation 1; five standard errors over 112 modes.
        scaled = (c / law.sqrt())[:, carried]
        tolerance = 5 / math.sqrt(samples)
        assert float((scaled.abs().square().mean(0) - 1).abs().max()) < tolerance
        # Complex normal: |c|^4 has mean 2 (deviation sqrt(20)), c and c^2 have mean 0.
        assert float((scaled.abs() ** 4).mean()) == pytest.approx(2, abs=0.05)
        assert float(scaled.mean(0).abs().max()) < tolerance
        assert float(scaled.square().mean(0).abs().max()) < 2 * tolerance

    @pytest.mark.parametrize("n", [15, 16, 64])
    def test_same_field_on_every_grid(self, n):
        few = rfft2(gaussian_random_field(1, 12, generator=7), norm="forward")
        many = rfft2(gaussian_random_field(1, n, generator=7), norm="forward")
        for rows in (slice(0, 6), slice(-5, None)):
            torch.testing.assert_close(few[:, rows, :6], many[:, rows, :6], rtol=0, atol=1e-15)

    def test_generator_advances_and_the_global_one_is_untouched(self):
        before = torch.random.get_rng_state()
        generator = torch.Generator().manual_seed(3)
        first = gaussian_random_field(1, 8, generator=generator)
        assert torch.equal(first, gaussian_random_field(1, 8, generator=3))
        assert not torch.equal(first, gaussian_random_field(1, 8, generator=generator))
        assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.usefixtures("as_shipped")
class TestSolveRefuses:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"viscosity": -1e-3}, r"`viscosity` is -0.001.*at least 0"),
            ({"duration": 0.0}, r"`duration` is 0.0"),
            ({"record_interval": 0.3}, r"`record_interval` is 0.3, expected a divisor.*0.25"),
            ({"record_interval": 2.0}, r"`record_interval` is 2.0, .* smaller one is 1.0"),
            ({"dt": 0.4999}, r"`dt` is 0.4999, expected a divisor of `record_interval` 1.0.*0.33"),
            ({"dt": math.nan}, r"`dt` is nan"),
            ({"scheme": "etdrk"}, r"`scheme` is 'etdrk'.*mean 'etdrk4'"),
            ({"forcing": lambda x, y: x[:4]}, r"`forcing` has shape \(4, 8\), expected \(8, 8\)"),
            ({"forcing": lambda x, y: 1 / x}, r"`forcing` has 8 of 64 values that are NaN or Inf"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            solve(torch.zeros(1, 8, 8), **{"duration": 1.0, **arguments})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (torch.zeros(8, 8), r"`vorticity` has shape .*expected \(batch, nx, ny\)"),
            (torch.zeros(0, 8, 8), r"`vorticity` has shape .*expected \(batch, nx, ny\)"),
            (
                torch.zeros(1, 8, 8).half(),
                r"`vorticity.dtype` is torch.float16, expected torch.flo",
            ),
            (torch.full((1, 8, 8), math.nan), r"`vorticity` has 64 of 64 values"),
            (3e38 * torch.eye(8)[None], r"speed nan, expected .* torch.float32 .*scale the fields"),
            (1e4 * torch.eye(8)[None], r"lost after t = 0,.* CFL number .* was \d+\.?\d*; try"),
        ],
    )
    def test_bad_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            solve(fields, duration=1.0)

    def test_but_not_decimals_that_only_binary_makes_uneven(self):
        w = torch.zeros(1, 8, 8)
        got = solve(w, duration=0.9, record_interval=0.3, dt=0.1)
        assert got.shape == (1, 3, 8, 8)

    @pytest.mark.parametrize("scheme", ["etdrk4", "cn-heun"])
    def test_the_steps_suggested_lead_out(self, scheme):
        w = gaussian_random_field(1, 32, generator=0)
        settings = {"duration": 20.0, "viscosity": 1e-5, "scheme": scheme}
        with pytest.raises(ValueError, match=r"`dt` is 0\.25,.* lost after t = [1-9]") as caught:
            solve(w, dt=0.25, **settings)
        # The flow gains speed until it is lost, so the first suggestion need not be the last.
        for _ in range(3):
            dt = float(str(caught.value).split("try dt=")[1].rstrip("."))
            try:
                assert torch.isfinite(solve(w, dt=dt, **settings)).all()
                return
            except ValueError as error:
                caught.value.args = error.args
        pytest.fail(f"even dt={dt} is too large")

    def test_leaves_what_it_was_given_alone(self):
        w = gaussian_random_field(1, 8, generator=0)
        copy = w.clone()
        solve(w, duration=1.0)
        assert torch.equal(w, copy)
