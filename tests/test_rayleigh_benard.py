"""Convection between plates: onset, heat carried, boundary conditions, orders."""

import importlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from scipy.optimize import brentq
from torch.fft import irfft, rfft

from sdkd_plugin.data import boussinesq as equations
from sdkd_plugin.data.boussinesq import solve
from sdkd_plugin.data.plate_modes import gauss_points, heat_modes, stokes_modes
from sdkd_plugin.data.rayleigh_benard import perturbed_conduction

# By name, because the package exports the function of this name in the module's place.
data_set = importlib.import_module("sdkd_plugin.data.rayleigh_benard")

CRITICAL = 1707.762
ROLLS = 2 * math.pi / 3.117  # the period at which convection sets in first
SMALL = {
    "rayleigh": 1e4,
    "resolution": (16, 8),
    "solver_resolution": (16, 16),
    "spin_up": 0.0,
    "duration": 2.0,
    "progress": False,
}


def one_roll(nx, nz, amplitude=0.1, higher=0.0):
    """At rest, warm in the middle; ``higher`` adds a second wave that breaks the symmetry."""
    z, _ = gauss_points(nz)
    x = 2 * math.pi * torch.arange(nx).double()[:, None] / nx
    fields = torch.zeros(1, 3, nx, nz).double()
    wave = torch.cos(x) + higher * torch.sin(2 * x)
    fields[:, 0] = 1 - z + amplitude * wave * torch.sin(math.pi * z)
    return fields


def relative_l2(got, expected):
    return float((got - expected).norm() / expected.norm())


def orders(errors):
    return [math.log2(a / b) for a, b in pairwise(errors)]


def at_heights(fields, heights, derivative=0):
    """The fields' polynomials across, or a derivative of them, at any heights."""
    nz = fields.shape[-1]
    x, weights = legendre.leggauss(nz)
    coefficients = legendre.legvander(x, nz - 1).T * weights * (np.arange(nz) + 0.5)[:, None]
    values = legendre.legval(
        2 * np.asarray(heights) - 1, legendre.legder(coefficients, derivative, scl=2.0)
    )
    return fields @ torch.from_numpy(values)


def all_nusselt(fields, rayleigh, prandtl):
    """The heat carried over that of conduction: 1 + sqrt(Ra Pr) <w T>, and -dT/dz at each plate."""
    _, weights = gauss_points(fields.shape[-1])
    flux = (fields[..., 2, :, :] * fields[..., 0, :, :]).mean(-2) @ weights
    plates = -at_heights(fields[..., 0, :, :].mean(-2), [0.0, 1.0], derivative=1)
    return [1 + math.sqrt(rayleigh * prandtl) * flux, *plates.unbind(-1)]


@pytest.fixture(scope="module")
def turbulent():
    """A developed, unsteady and asymmetric flow at Ra = 1e5, on 32 x 24 points."""
    start = one_roll(32, 24, higher=0.5)
    return solve(start, rayleigh=1e5, duration=8.0, record_interval=8.0, dt=1 / 16)[:, 0]


@pytest.fixture(scope="module")
def steady():
    """Steady rolls in air at Ra = 5000."""
    return solve(
        one_roll(24, 24, amplitude=0.3),
        rayleigh=5000.0,
        prandtl=0.71,
        aspect_ratio=ROLLS,
        duration=120.0,
        record_interval=60.0,
        dt=0.25,
    )


class TestOnset:
    def test_growth_changes_sign_at_the_critical_rayleigh_number(self):
        z, _ = gauss_points(16)

        def growth(rayleigh):
            fields = solve(
                one_roll(8, 16, amplitude=1e-6),
                rayleigh=rayleigh,
                aspect_ratio=ROLLS,
                duration=24.0,
                record_interval=8.0,
                dt=0.125,
            )
            # By t = 8 the modes that decay are gone, at a rate of about 1.
            sizes = (fields[0, :, 0] - (1 - z)).norm(dim=(-1, -2))
            return float(torch.log(sizes[2] / sizes[1])) / 8

        below, above = growth(1690.0), growth(1725.0)
        assert below < 0 < above
        crossing = 1690 + 35 * below / (below - above)
        assert crossing == pytest.approx(CRITICAL, rel=1e-3)

    @pytest.mark.parametrize("prandtl", [0.1, 1.0, 10.0])
    def test_fastest_growth_of_the_linear_operator(self, prandtl):
        def growth(rayleigh):
            flow = equations._Flow(rayleigh, prandtl, ROLLS, torch.empty(1, 3, 4, 32).double())
            n = 2 * flow.n_modes
            # So small that what is quadratic in it is below rounding.
            states = torch.zeros(flow.kept, n, n).to(torch.complex128)
            states[1] = 1e-20 * torch.eye(n)
            matrix = flow.tendency(states)[1] / 1e-20 + torch.diag(flow.diffusion[1, 0])
            return float(torch.linalg.eigvals(matrix).real.max())

        assert brentq(growth, 1600, 1800) == pytest.approx(CRITICAL, rel=1e-6)


class TestHeat:
    def test_below_the_critical_rayleigh_number_only_conduction_is_left(self):
        start = perturbed_conduction((16, 16), seed=0)
        fields = solve(start, rayleigh=1000.0, duration=30.0, record_interval=10.0, dt=0.25)
        for nusselt in all_nusselt(fields, 1000.0, 1.0):
            excess = (nusselt - 1).abs()
            assert torch.all(excess[:, -1] < 1e-6)
            assert torch.all(excess[:, 1:] < excess[:, :-1] / 2)

    def test_steady_rolls_carry_the_same_heat_everywhere(self, steady):
        earlier, late = torch.stack(all_nusselt(steady, 5000.0, 0.71))[:, 0].mT
        torch.testing.assert_close(late, earlier, rtol=1e-6, atol=0)
        # Bottom and top by symmetry; the volume as far as 24 points resolve the gradients.
        assert float(late[1]) == pytest.approx(float(late[2]), rel=1e-9)
        assert float(late[1]) == pytest.approx(float(late[0]), rel=1e-4)
        # Clever and Busse (1974), in three digits, have 2.116; ours converges to 2.1103.
        assert float(late[0]) == pytest.approx(2.116, rel=5e-3)

    @pytest.mark.parametrize("prandtl", [1.0, pytest.param(7.0, marks=pytest.mark.slow)])
    def test_heat_just_above_onset_follows_the_amplitude_equation(self, prandtl):
        # Schlueter, Lortz and Busse (1965): Nu - 1 = (1 - Ra_c / Ra) / g to first order.
        g = 0.69942 - 0.00472 / prandtl + 0.00832 / prandtl**2
        ratios = []
        for excess in (0.05, 0.1):
            rayleigh = CRITICAL * (1 + excess)
            fields = solve(
                one_roll(8, 16, amplitude=0.6 * math.sqrt(excess)),
                rayleigh=rayleigh,
                prandtl=prandtl,
                aspect_ratio=ROLLS,
                duration=30 * round(math.sqrt(prandtl)) / excess,
                record_interval=15 * round(math.sqrt(prandtl)) / excess,
                dt=1.0,
            )
            nusselt = all_nusselt(fields, rayleigh, prandtl)[0][0]
            assert float(nusselt[1]) == pytest.approx(float(nusselt[0]), abs=1e-5)
            ratios.append(float(nusselt[1] - 1) * g / (1 - CRITICAL / rayleigh))
        assert ratios[1] == pytest.approx(1, abs=0.02)
        assert 2 * ratios[0] - ratios[1] == pytest.approx(1, abs=2e-3)


class TestEquations:
    def test_plates_are_at_rest_and_at_their_temperatures(self, turbulent):
        at_plates = at_heights(turbulent, [0.0, 1.0])
        expected = torch.zeros(1, 3, 32, 2).double()
        expected[:, 0, :, 0] = 1
        torch.testing.assert_close(at_plates, expected, rtol=0, atol=1e-12)
        assert float(turbulent[:, 1:].abs().amax((0, 2, 3)).min()) > 0.3

    def test_velocity_is_divergence_free(self, turbulent):
        z, _ = gauss_points(24)
        _, u, w = turbulent.unbind(1)
        k = 2 * math.pi / 2.0 * torch.arange(17).double()[:, None]
        du_dx = irfft(1j * k * rfft(u, dim=1), n=32, dim=1)
        dw_dz = at_heights(w, z.numpy(), derivative=1)
        assert float((du_dx + dw_dz).abs().max()) < 1e-11
        assert float(du_dx.abs().max()) > 1

    def test_mean_flow_and_mean_temperature_diffuse(self):
        z, _ = gauss_points(24)
        start = torch.zeros(1, 3, 8, 24).double()
        start[:, 0] = 1 - z + 0.2 * torch.sin(2 * math.pi * z)
        start[:, 1] = torch.sin(math.pi * z) + torch.sin(3 * math.pi * z)
        got = solve(start, rayleigh=1e3, prandtl=4.0, duration=2.0)
        viscosity, diffusivity = math.sqrt(4 / 1e3), 1 / math.sqrt(4e3)
        for i, t in enumerate((1, 2)):
            slow, fast = (math.exp(-viscosity * (m * math.pi) ** 2 * t) for m in (1, 3))
            warm = math.exp(-diffusivity * 4 * math.pi**2 * t)
            expected = torch.zeros(3, 8, 24).double()
            expected[0] = 1 - z + 0.2 * warm * torch.sin(2 * math.pi * z)
            expected[1] = slow * torch.sin(math.pi * z) + fast * torch.sin(3 * math.pi * z)
            torch.testing.assert_close(got[0, i], expected, rtol=0, atol=1e-9)

    def test_modes_are_orthonormal_and_decay_as_they_should(self):
        # Without buoyancy: even Stokes modes solve tan(q / 2) q = -k tanh(k / 2), rate q^2 + k^2.
        k = torch.tensor([0.0, 3.117, 60.0], dtype=torch.float64)
        modes = stokes_modes(k, 32)
        _, weights = gauss_points(32)
        for i, number in enumerate(k.tolist()):
            slope, value = modes.slope[i], modes.value[i]
            energy = (slope * weights) @ slope.T + number**2 * (value * weights) @ value.T
            first = 1 if i else 0
            expected = torch.eye(len(energy)).double()[first:, first:]
            torch.testing.assert_close(energy[first:, first:], expected, rtol=0, atol=1e-10)
        exact = brentq(
            lambda q: math.tan(q / 2) * q + 3.117 * math.tanh(3.117 / 2), math.pi + 1e-9, 6.0
        )
        assert float(modes.rate[1, 1]) == pytest.approx(exact**2 + 3.117**2, rel=1e-10)
        # Flat ones are sines, the net flux of the first included.
        for rates in (modes.rate[0], heat_modes(32).rate):
            expected = (math.pi * torch.arange(1, 5).double()) ** 2
            torch.testing.assert_close(rates[:4], expected, rtol=1e-10, atol=0)

    def test_advection_conserves_energy_and_temperature_variance(self, turbulent):
        flow = equations._Flow(1e5, 1.0, 2.0, turbulent)
        state = flow.to_state(turbulent)
        # Linear terms are odd in the state, advection is even.
        advection = (flow.tendency(state) + flow.tendency(-state)) / 2
        twice = torch.full((flow.kept, 1, 1), 2.0).double()
        twice[0] = 1
        gains = twice * (state.conj() * advection)
        for part in gains.split(flow.n_modes, dim=-1):
            assert float(part.real.sum().abs() / part.abs().sum()) < 1e-14

    def test_equations_have_no_preferred_place_nor_direction(self, turbulent):
        settings = {"rayleigh": 1e5, "duration": 1.0}
        got = solve(turbulent, **settings)
        moved = solve(turbulent.roll(5, -2), **settings)
        torch.testing.assert_close(moved, got.roll(5, -2), rtol=0, atol=1e-11)
        mirror = torch.tensor([1.0, -1.0, 1.0]).double()[:, None, None]
        mirrored = solve(mirror * turbulent.flip(-2), **settings)
        torch.testing.assert_close(mirrored, mirror * got.flip(-2), rtol=0, atol=1e-11)

        def upside_down(fields):
            t, u, w = fields.flip(-1).unbind(-3)
            return torch.stack([1 - t, u, -w], dim=-3)

        turned = solve(upside_down(turbulent), **settings)
        torch.testing.assert_close(turned, upside_down(got), rtol=0, atol=1e-11)


class TestAccuracy:
    def test_fourth_order_in_time(self, turbulent):
        def late(steps):
            return solve(turbulent, rayleigh=1e5, duration=1.0, dt=1 / steps)

        reference = late(256)
        errors = [relative_l2(late(steps), reference) for steps in (8, 16, 32)]
        assert errors[0] < 1e-3
        assert orders(errors) == pytest.approx([4, 4], abs=0.15)

    def test_spectral_in_space(self):
        heights = (np.arange(8) + 0.5) / 8

        def late(nx, nz):
            fields = solve(
                one_roll(nx, nz, higher=0.5), rayleigh=1e4, duration=6.0, record_interval=6.0,
                dt=1 / 16,
            )  # fmt: skip
            return at_heights(fields[..., :: nx // 16, :], heights)

        reference = late(64, 48)
        errors = [relative_l2(late(n, 3 * n // 4), reference) for n in (16, 32, 48)]
        # Faster than any power: each 16 points more are worth a factor of at least 50.
        assert errors[1] < errors[0] / 50
        assert errors[2] < errors[1] / 50
        assert errors[2] < 1e-6

    def test_going_on_from_a_result_is_going_on(self, turbulent):
        settings = {"rayleigh": 1e5, "prandtl": 0.7}
        whole = solve(turbulent, duration=2.0, **settings)
        half = solve(turbulent, duration=1.0, **settings)
        torch.testing.assert_close(half, whole[:, :1], rtol=0, atol=0)
        rest = solve(half[:, 0], duration=1.0, **settings)
        torch.testing.assert_close(rest, whole[:, 1:], rtol=0, atol=1e-11)


class TestInitialFields:
    def test_waves_have_the_amplitude_and_meet_the_plates(self):
        fields = torch.cat([perturbed_conduction((32, 24), seed=i) for i in range(400)])
        z, weights = gauss_points(24)
        waves = fields[:, 0] - (1 - z)
        variance = (waves.square() @ weights).mean()
        # 64 normal amplitudes a field: a relative deviation of sqrt(2 / 64 / 400) = 0.009.
        assert float(variance) == pytest.approx(0.05**2, rel=0.045)
        assert float(waves.mean(1).abs().max()) < 1e-15
        assert float(at_heights(waves, [0.0, 1.0]).abs().max()) < 1e-10
        assert float(fields[:, 1:].abs().max()) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rayleigh", "points", "published"), [(2500.0, 20, 1.474), (10000.0, 28, 2.661)]
)
def test_heat_of_steady_rolls_at_other_rayleigh_numbers(rayleigh, points, published):
    # Clever and Busse (1974), for air.
    fields = solve(
        one_roll(points, points, amplitude=0.3),
        rayleigh=rayleigh,
        prandtl=0.71,
        aspect_ratio=ROLLS,
        duration=100.0,
        record_interval=50.0,
        dt=0.125,
    )
    volume, bottom, top = torch.stack(all_nusselt(fields, rayleigh, 0.71))[:, 0]
    torch.testing.assert_close(volume[1], volume[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(bottom, top, rtol=1e-9, atol=0)
    torch.testing.assert_close(bottom[1], volume[1], rtol=1e-3, atol=0)
    assert float(volume[1]) == pytest.approx(published, rel=5e-3)
