"""Arrays on disk: the key, the atomic write, the verified read."""

import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdkd_plugin.data.store import (
    atomic_path,
    default_folder,
    load_array,
    load_or_compute,
    parameters_key,
    save_array,
)

PARAMETERS = {"viscosity": 1e-3, "n": 3, "scheme": "etdrk4", "forcing": None, "shape": [2, 3]}


def expectation(array, parameters=PARAMETERS):
    return {"parameters": parameters, "shape": array.shape, "dtype": array.dtype}


@pytest.fixture
def stored(tmp_path):
    """A file and the array in it."""
    array = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "field.safetensors"
    save_array(path, array, parameters=PARAMETERS)
    return path, array


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
            assert temporary.suffix == ".png"
            assert temporary.parent == target.parent
            temporary.write_bytes(b"whole")
            assert not target.exists()
        assert target.read_bytes() == b"whole"
        assert os.listdir(target.parent) == ["figure.png"]

    def test_replaces_the_old_file(self, tmp_path):
        target = tmp_path / "table.csv"
        target.write_text("old")
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            assert target.read_text() == "old"
        assert target.read_text() == "new"

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

    def test_ctrl_c_while_the_file_is_open(self, tmp_path):
        def interrupted():
            with atomic_path(tmp_path / "a.csv") as temporary, temporary.open("w") as file:
                file.write("half a li")
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert os.listdir(tmp_path) == []

    def test_says_when_nothing_was_written(self, tmp_path):
        with (
            pytest.raises(FileNotFoundError, match=r"nothing was written.*a\.csv; write to"),
            atomic_path(tmp_path / "a.csv"),
        ):
            pass
        assert os.listdir(tmp_path) == []

    @pytest.mark.skipif(sys.platform == "win32", reason="no umask on Windows")
    def test_has_the_permissions_of_any_new_file(self, tmp_path):
        (tmp_path / "plain").write_text("")
        with atomic_path(tmp_path / "atomic") as temporary:
            temporary.write_text("")
        assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestArrays:
    @pytest.mark.parametrize(
        "array",
        [
            torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)),
            torch.arange(5, dtype=torch.int64),
            torch.ones(3, dtype=torch.bfloat16),
            torch.tensor([True, False]),
            torch.tensor(2.5, dtype=torch.float64),
            torch.zeros(0, 4),
            torch.arange(6.0).reshape(2, 3).T,
        ],
        ids=["float32", "int64", "bfloat16", "bool", "scalar", "empty", "transposed"],
    )
    def test_round_trip(self, tmp_path, array):
        save_array(tmp_path / "a.safetensors", array, parameters=PARAMETERS)
        read = load_array(tmp_path / "a.safetensors", **expectation(array))
        assert torch.equal(read, array)
        assert read.dtype == array.dtype

    def test_ctrl_c_while_saving_leaves_the_old_array(self, stored, monkeypatch):
        path, array = stored

        def interrupted(tensors, filename, metadata):
            save_file(tensors, filename, metadata)
            os.truncate(filename, 50)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr("sdkd_plugin.data.store.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_array(path, array + 1, parameters=PARAMETERS)
        assert torch.equal(load_array(path, **expectation(array)), array)
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_refuses_a_truncated_file(self, stored, kept):
        path, array = stored
        os.truncate(path, kept % path.stat().st_size)
        with pytest.raises(
            ValueError, match=r"field\.safetensors is truncated or damaged.*Delete it"
        ):
            load_array(path, **expectation(array))

    def test_refuses_a_flipped_bit(self, stored):
        path, array = stored
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"field\.safetensors has SHA-256 .* the recorded"):
            load_array(path, **expectation(array))

    def test_refuses_other_parameters(self, stored):
        path, array = stored
        with pytest.raises(ValueError, match=r'parameters \{.*"n":3.*expected \{.*"n":4.*Delete'):
            load_array(path, **expectation(array, PARAMETERS | {"n": 4}))

    def test_refuses_another_shape_or_type(self, stored):
        path, array = stored
        with pytest.raises(ValueError, match=r"has shape \(2, 3\).*expected shape \(3, 2\)"):
            load_array(path, **expectation(array) | {"shape": (3, 2)})
        with pytest.raises(ValueError, match=r"type torch\.float32, expected .*torch\.float64"):
            load_array(path, **expectation(array) | {"dtype": torch.float64})

    def test_refuses_a_foreign_file(self, stored):
        path, array = stored
        save_file({"array": array}, path)
        with pytest.raises(ValueError, match=r"computed from the parameters none"):
            load_array(path, **expectation(array))
        save_file({"weight": array, "bias": array + 1}, path)
        with pytest.raises(ValueError, match=r"holds the arrays \['bias', 'weight'\]"):
            load_array(path, **expectation(array))

    def test_says_when_there_is_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"`path` is .*none\.safetensors"):
            load_array(tmp_path / "none.safetensors", parameters={}, shape=(1,), dtype=torch.int64)


class TestLoadOrCompute:
    def test_computes_once(self, tmp_path):
        calls = []

        def compute():
            calls.append(1)
            return torch.arange(3)

        settings = {"shape": (3,), "dtype": torch.int64, "folder": tmp_path / "cache"}
        for parameters, n_calls in (({"n": 3}, 1), ({"n": 3}, 1), ({"n": 3, "seed": 1}, 2)):
            array = load_or_compute("range", compute, parameters=parameters, **settings)
            assert torch.equal(array, torch.arange(3))
            assert len(calls) == n_calls
        assert len(os.listdir(tmp_path / "cache")) == 2

    def test_default_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "own"))
        load_or_compute("a", lambda: torch.ones(1), parameters={}, shape=(1,), dtype=torch.float32)
        assert os.listdir(tmp_path / "own") == [f"a-{parameters_key({})[:16]}.safetensors"]

    @pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(3, dtype=torch.float64)])
    def test_refuses_to_store_what_it_would_refuse_to_read(self, tmp_path, wrong):
        with pytest.raises(ValueError, match=r"`compute` returned shape .* promised \(3,\)"):
            load_or_compute(
                "a",
                lambda: wrong,
                parameters={},
                shape=(3,),
                dtype=torch.float32,
                folder=tmp_path,
            )
        assert os.listdir(tmp_path) == []
