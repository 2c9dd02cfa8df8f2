"""The data set that the vorticity solver makes: samples, cache, progress, devices."""

import importlib
import io
import os
import resource
import sys

import pytest
import torch
from test_navier_stokes import SMALL, relative_l2
from torch.fft import rfft2
from tqdm import tqdm

from sdkd_plugin.data import time_stepping
from sdkd_plugin.data.navier_stokes import gaussian_random_field, navier_stokes
from sdkd_plugin.data.vorticity import solve

# By name, because the package exports the function of this name in the module's place.
data_set = importlib.import_module("sdkd_plugin.data.navier_stokes")


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
