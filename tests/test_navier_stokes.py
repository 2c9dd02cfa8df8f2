"""The vorticity solver, the random initial fields, and the data set made of them."""

import importlib
import io
import math
import os
import resource
import sys
from itertools import pairwise

import pytest
import torch
from torch.fft import fftfreq, irfft2, rfft2, rfftfreq
from tqdm import tqdm

from sdkd_plugin.data import time_stepping
from sdkd_plugin.data import vorticity as equation
from sdkd_plugin.data.navier_stokes import gaussian_random_field, navier_stokes
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


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    @pytest.mark.parametrize("stderr", [Terminal, io.StringIO])
    def test_slow_runs_show_a_bar_on_a_terminal(self, stderr, monkeypatch):
        class AtOnce(tqdm):
            def __init__(self, *args, delay, **kwargs):
                assert delay == 1
                super().__init__(*args, **kwargs)

        monkeypatch.setattr(time_stepping, "tqdm", AtOnce)
        monkeypatch.setattr("sys.stderr", stderr())
        navier_stokes(2, **SMALL | {"progress": True, "dt": 0.5}, batch_size=1, cache=False)
        assert ("8/8" in sys.stderr.getvalue()) == (stderr is Terminal)
        sys.stderr.seek(0)
        sys.stderr.truncate()
        navier_stokes(1, **SMALL | {"dt": 0.5}, cache=False)
        assert sys.stderr.getvalue() == ""


class TestDataSet:
    def test_defaults_are_the_recipe(self):
        fields = navier_stokes(2, **SMALL, cache=False)
        initial = [gaussian_random_field(1, 32, generator=start) for start in start_seeds(0, 2)]
        solved = solve(torch.cat(initial).float(), viscosity=1e-3, duration=2.0)
        torch.testing.assert_close(fields, solved[..., ::2, ::2])
        assert fields.shape == (2, 2, 16, 16)
        assert fields.dtype == torch.float32

    def test_sample_depends_on_seed_and_index_only(self):
        fields = navier_stokes(5, **SMALL, cache=False)
        assert torch.equal(fields, navier_stokes(5, **SMALL, cache=False))
        for n, batch_size in ((5, 1), (5, 2), (3, 16)):
            other = navier_stokes(n, batch_size=batch_size, **SMALL, cache=False)
            torch.testing.assert_close(other, fields[:n], rtol=0, atol=2e-6)
        assert relative_l2(navier_stokes(5, seed=1, **SMALL, cache=False), fields) > 0.1
        assert relative_l2(fields[1], fields[0]) > 0.1

    def test_samples_of_two_seeds_do_not_overlap(self):
        seeds = [seed for i in range(20) for seed in start_seeds(i, 1000)]
        assert len(set(seeds)) == len(seeds)

    def test_truncation_drops_what_the_coarse_grid_does_not_carry(self):
        settings = {**SMALL, "dtype": torch.float64, "viscosity": 1e-5, "cache": False}
        full = navier_stokes(1, **settings | {"resolution": 32})
        cut = navier_stokes(1, **settings, downsampling="truncate")
        fine, coarse = rfft2(full, norm="forward"), rfft2(cut, norm="forward")
        for rows in (slice(0, 8), slice(-7, None)):
            torch.testing.assert_close(coarse[..., rows, :8], fine[..., rows, :8])
        assert float(coarse[..., 8].abs().max()) < 1e-15
        assert float(coarse[..., 8, :].abs().max()) < 1e-15
        taken = navier_stokes(1, **settings)
        assert torch.equal(taken, full[..., ::2, ::2])
        assert relative_l2(taken, cut) > 1e-6

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n_samples": 0}, r"`n_samples` is 0"),
            ({"resolution": 24}, r"`resolution` is 24, expected a divisor.*32"),
            ({"resolution": 2}, r"`resolution` is 2, expected an integer of at least 4"),
            ({"batch_size": 0}, r"`batch_size` is 0"),
            ({"seed": -1}, r"`seed` is -1, expected an integer of at least 0"),
            ({"dtype": torch.float16}, r"`dtype` is torch.float16, expected torch.float32 or"),
            ({"downsampling": "subsampel"}, r"`downsampling` is 'subsampel'.*'subsample'\?"),
        ],
    )
    def test_refuses_bad_arguments_and_stores_nothing(self, arguments, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            navier_stokes(**{"n_samples": 1} | SMALL | arguments, cache=tmp_path)
        assert os.listdir(tmp_path) == []


class TestCache:
    def test_second_call_reads(self, tmp_path, monkeypatch):
        first = navier_stokes(2, **SMALL, cache=tmp_path)
        monkeypatch.setattr(data_set, "solve", None)
        assert torch.equal(navier_stokes(2, **SMALL, cache=str(tmp_path)), first)
        # Neither changes the numbers but for round-off, so neither may cost a new file.
        assert torch.equal(navier_stokes(2, **SMALL, batch_size=1, cache=tmp_path), first)
        assert len(os.listdir(tmp_path)) == 1

    def test_a_full_disk_does_not_lose_the_result(self, tmp_path):
        expected = navier_stokes(2, **SMALL, cache=False)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.warns(UserWarning, match=r"it cannot be written .*navier-stokes-\w+.safet"):
                fields = navier_stokes(2, **SMALL, cache=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert torch.equal(fields, expected)
        assert os.listdir(tmp_path) == []

    def test_every_parameter_is_in_the_key(self, tmp_path):
        changes = [
            {},
            {"resolution": 8},
            {"solver_resolution": 16},
            {"viscosity": 2e-3},
            {"duration": 1.0},
            {"record_interval": 0.5},
            {"dt": 1 / 64},
            {"downsampling": "truncate"},
            {"seed": 1},
            {"dtype": torch.float64},
        ]
        for number, change in enumerate(changes, start=1):
            navier_stokes(1, **SMALL | change, cache=tmp_path)
            assert len(os.listdir(tmp_path)) == number, change
        navier_stokes(2, **SMALL, cache=tmp_path)
        assert len(os.listdir(tmp_path)) == len(changes) + 1


def test_devices_agree(device):
    settings = {**SMALL, "dtype": torch.float64, "cache": False}
    torch.testing.assert_close(
        navier_stokes(3, **settings, device=device),
        navier_stokes(3, **settings),
        rtol=0,
        atol=1e-12,
    )


def start_seeds(seed, n_samples):
    """The generator seeds of a data set's samples, found out by watching them being used."""
    seen = []

    def watch(*args, generator, **kwargs):
        seen.append(generator)
        return torch.zeros(1, 4, 4, dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_set, "gaussian_random_field", watch)
        patch.setattr(data_set, "solve", lambda w, **_: w[:, None])
        grid = {"resolution": 4, "solver_resolution": 4, "duration": 1.0, "cache": False}
        navier_stokes(n_samples, **grid, seed=seed, batch_size=n_samples)
    return seen
