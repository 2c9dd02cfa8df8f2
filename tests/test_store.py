"""Arrays on disk: the key, the atomic write, the verified read."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdkd_plugin._files import atomic_path
from sdkd_plugin.data.store import default_folder, load_or_compute, parameters_key

PARAMETERS = {"viscosity": 1e-3, "n": 3, "scheme": "etdrk4", "forcing": None, "shape": [2, 3]}


class TestKey:
    def test_is_the_same_in_every_release(self):
        # A changed key silently orphans every user's cache: raise FORMAT_VERSION instead.
        assert parameters_key({"a": 1, "b": [0.1, None, True, "é"]}) == (
            "cc4b2a25e0089b2487ad065b47335e95fc199ac73ae72cc58444426d6a6da029"
        )

    def test_ignores_order(self):
        assert parameters_key(PARAMETERS) == parameters_key(dict(reversed(PARAMETERS.items())))

    @pytest.mark.parametrize(
        "change",
        [
            {"viscosity": math.nextafter(1e-3, 1)},
            {"n": 3.0},
            {"n": "3"},
            {"scheme": "etdrk"},
            {"forcing": False},
            {"shape": [3, 2]},
            {"extra": 0},
        ],
    )
    def test_differs_with_every_parameter(self, change):
        assert parameters_key(PARAMETERS | change) != parameters_key(PARAMETERS)

    @pytest.mark.parametrize("value", [math.nan, math.inf, torch.ones(2), object(), {1, 2}])
    def test_refuses_what_json_cannot_hold(self, value):
        with pytest.raises(ValueError, match=r"`parameters` cannot be written as JSON.*checksum"):
            parameters_key({"a": value})


class TestDefaultFolder:
    def test_own_variable_first(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        monkeypatch.setenv("SDKD_CACHE", str(tmp_path))
        assert default_folder() == tmp_path

    def test_then_the_users_cache(self, monkeypatch):
        monkeypatch.delenv("SDKD_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert default_folder() == Path("/elsewhere/sdkd_plugin")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_folder() == Path.home() / ".cache" / "sdkd_plugin"


class TestAtomicPath:
    def test_moves_a_complete_file(self, tmp_path):
        target = tmp_path / "new" / "folder" / "figure.png"
        with atomic_path(target) as temporary:
            assert temporary.name == "figure.png"
            temporary.write_bytes(b"whole")
            assert not target.exists()
        assert target.read_bytes() == b"whole"
        assert os.listdir(target.parent) == ["figure.png"]

    def test_moves_the_file_itself_once_it_is_on_the_disk(self, tmp_path, monkeypatch):
        # A copy could be seen half done, and a name could outlive its data in a power cut.
        calls = []
        for name in ("fsync", "replace"):
            call = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *a, name=name, call=call: (calls.append(name), call(*a))
            )
        with atomic_path(tmp_path / "a.csv") as temporary:
            temporary.write_text("a")
            inode = temporary.stat().st_ino
        assert (tmp_path / "a.csv").stat().st_ino == inode
        assert calls == ["fsync", "replace"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_an_interrupted_write_leaves_the_old_file_alone(self, tmp_path, error):
        target = tmp_path / "table.csv"
        target.write_text("old")

        def interrupted():
            with atomic_path(target) as temporary:
                temporary.write_text("ne")
                raise error

        with pytest.raises(error):
            interrupted()
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["table.csv"]

    def test_says_when_nothing_was_written(self, tmp_path):
        with (
            pytest.raises(ValueError, match=r"nothing was written.*a\.csv; write to"),
            atomic_path(tmp_path / "a.csv"),
        ):
            pass
        assert os.listdir(tmp_path) == []


@pytest.fixture
def stored(tmp_path):
    """A cached array, its file, and a call that reads it."""
    array = torch.arange(6.0).reshape(2, 3)

    def read(parameters=PARAMETERS, compute=lambda: array):
        return load_or_compute("field", compute, parameters=parameters, folder=tmp_path)

    read()
    (path,) = tmp_path.iterdir()
    return array, path, read


class TestLoadOrCompute:
    @pytest.mark.parametrize(
        "array",
        [
            torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)),
            torch.ones(3, dtype=torch.bfloat16),
            torch.tensor([True, False]),
            torch.tensor(2.5, dtype=torch.float64),
            torch.zeros(0, 4),
            torch.arange(6.0).reshape(2, 3).T,
        ],
        ids=["float32", "bfloat16", "bool", "scalar", "empty", "transposed"],
    )
    def test_round_trip(self, tmp_path, array):
        for compute in (lambda: array, lambda: 1 / 0):
            read = load_or_compute("a", compute, parameters=PARAMETERS, folder=tmp_path)
            assert torch.equal(read, array)
            assert read.dtype == array.dtype

    def test_other_parameters_have_another_file_in_the_default_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "own"))
        for seed in (0, 1):
            load_or_compute("a", lambda: torch.ones(1), parameters={"seed": seed})
        keys = sorted(parameters_key({"seed": seed})[:16] for seed in (0, 1))
        assert sorted(os.listdir(tmp_path / "own")) == [f"a-{key}.safetensors" for key in keys]

    def test_has_the_permissions_of_any_new_file(self, stored):
        _, path, _ = stored
        (path.parent / "plain").write_text("")
        assert path.stat().st_mode == (path.parent / "plain").stat().st_mode

    def test_ctrl_c_while_saving_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupted(tensors, filename, metadata):
            save_file(tensors, filename, metadata)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr("sdkd_plugin.data.store.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_or_compute("a", lambda: torch.ones(1), parameters={}, folder=tmp_path)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_refuses_a_truncated_file(self, stored, kept):
        _, path, read = stored
        os.truncate(path, kept % path.stat().st_size)
        with pytest.raises(ValueError, match=rf"{path.name} is truncated or damaged.*Delete it"):
            read()

    def test_refuses_a_flipped_bit_and_foreign_files(self, stored):
        array, path, read = stored
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} has SHA-256 .* the recorded"):
            read()
        save_file({"array": array}, path)
        with pytest.raises(ValueError, match=r'the parameters None, expected \{.*"n":3'):
            read()
        save_file({"weight": array}, path)
        with pytest.raises(ValueError, match="is truncated or damaged"):
            read()

    def test_a_folder_that_cannot_be_written_does_not_lose_the_array(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.warns(UserWarning, match=r"an array is not kept.*a-\w+.safetensors"):
            array = load_or_compute(
                "a", lambda: torch.ones(2), parameters={}, folder=tmp_path / "file" / "sub"
            )
        assert torch.equal(array, torch.ones(2))
