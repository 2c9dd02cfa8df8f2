"""The data set that the convection solver makes, and what both refuse."""

import importlib
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BarycentricInterpolator
from test_rayleigh_benard import SMALL, one_roll, relative_l2

from sdkd_plugin.data.boussinesq import solve
from sdkd_plugin.data.plate_modes import gauss_points
from sdkd_plugin.data.rayleigh_benard import rayleigh_benard

# By name, because the package exports the function of this name in the module's place.
data_set = importlib.import_module("sdkd_plugin.data.rayleigh_benard")


class TestDataSet:
    def test_fields_are_the_solvers_at_uniform_points(self, monkeypatch):
        solved = []

        def watch(*args, **kwargs):
            solved.append(solve(*args, **kwargs))
            return solved[-1]

        monkeypatch.setattr(data_set, "solve", watch)
        settings = SMALL | {"dtype": torch.float64, "resolution": (8, 10)}
        fields = rayleigh_benard(2, **settings, velocity=True)
        assert fields.shape == (2, 2, 3, 8, 10)
        interpolator = BarycentricInterpolator(
            gauss_points(16)[0].numpy(), solved[0][..., ::2, :].numpy(), axis=-1
        )
        expected = torch.from_numpy(interpolator((np.arange(10) + 0.5) / 10))
        torch.testing.assert_close(fields, expected, rtol=0, atol=1e-12)
        temperature = rayleigh_benard(2, **settings)
        assert torch.equal(temperature, fields[:, :, :1])
        assert rayleigh_benard(1, **SMALL).dtype == torch.float32

    def test_sample_depends_on_seed_and_index_only(self):
        settings = SMALL | {"dtype": torch.float64}
        fields = rayleigh_benard(5, **settings)
        assert torch.equal(fields, rayleigh_benard(5, **settings))
        for n, batch_size in ((5, 1), (5, 2), (3, 16)):
            other = rayleigh_benard(n, batch_size=batch_size, **settings)
            torch.testing.assert_close(other, fields[:n], rtol=0, atol=1e-13)
        conduction = fields.mean((0, 1, 3), keepdim=True)
        others = rayleigh_benard(5, seed=1, **settings)
        assert relative_l2(others - conduction, fields - conduction) > 0.5
        assert relative_l2(fields[1] - conduction, fields[0] - conduction) > 0.5


@pytest.mark.usefixtures("as_shipped")
class TestRefuses:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rayleigh": -1.0}, r"`rayleigh` is -1.0, expected a finite number above 0"),
            ({"prandtl": 0.0}, r"`prandtl` is 0.0, expected a finite number above 0"),
            ({"aspect_ratio": math.inf}, r"`aspect_ratio` is inf"),
            ({"spin_up": -1.0}, r"`spin_up` is -1.0, expected a finite number at least 0"),
            ({"spin_up": 1.5}, r"`record_interval` is 1.0, expected a divisor of `spin_up` 1.5"),
            ({"resolution": (12, 8)}, r"`resolution` has 12 points along x, .* divisor .* 16"),
            ({"resolution": (16, 0)}, r"`resolution` is 0, expected an integer of at least 1"),
            ({"solver_resolution": (16, 7)}, r"`nz` is 7, expected an integer of at least 8"),
            ({"solver_resolution": (3, 16)}, r"`nx` is 3, expected an integer of at least 4"),
            ({"seed": -1}, r"`seed` is -1, expected an integer of at least 0"),
            ({"batch_size": 0}, r"`batch_size` is 0"),
            ({"dtype": torch.float16}, r"`dtype` is torch.float16, expected torch.float32 or"),
        ],
    )
    def test_settings_of_a_data_set(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            rayleigh_benard(**{"n_samples": 1} | SMALL | arguments)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (torch.zeros(1, 1, 8, 8), r"`fields` has shape \(1, 1, 8, 8\), expected \(batch, 3,"),
            (torch.zeros(0, 3, 8, 8), r"`fields` has shape \(0, 3, 8, 8\)"),
            (torch.zeros(3, 8, 8), r"`fields` has shape \(3, 8, 8\)"),
            (torch.zeros(1, 3, 8, 8).half(), r"`fields.dtype` is torch.float16, expected"),
            (1e4 * torch.ones(1, 3, 8, 8), r"lost after t = 0, where the CFL number.*try dt="),
            (torch.full((1, 3, 8, 8), 3e38), r"the initial flow has speed (inf|nan)"),
            (torch.full((1, 3, 8, 8), math.nan), r"`fields` has 192 of 192 values that are NaN"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            solve(fields, rayleigh=1e4)

    def test_too_large_a_step_and_its_remedy_works(self):
        settings = {"rayleigh": 1e6, "duration": 8.0, "record_interval": 8.0}
        start = one_roll(32, 24, amplitude=0.3)
        with pytest.raises(ValueError, match=r"`dt` is 4, expected a step for which") as refused:
            solve(start, dt=4.0, **settings)
        smaller = float(str(refused.value).rpartition("dt=")[2].rstrip("."))
        assert torch.isfinite(solve(start, dt=smaller, **settings)).all()


def test_devices_agree(device):
    settings = SMALL | {"dtype": torch.float64, "velocity": True}
    torch.testing.assert_close(
        rayleigh_benard(3, **settings, device=device),
        rayleigh_benard(3, **settings),
        rtol=0,
        atol=1e-11,
    )
