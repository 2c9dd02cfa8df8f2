"""Trajectories from files, whole or damaged."""

import pickle
import zipfile

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from safetensors.torch import save_file

from sdkd_plugin.data import read_trajectories


@pytest.fixture
def fields() -> torch.Tensor:
    return torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))


def write(folder, kind: str, fields: torch.Tensor):
    file = folder / f"u.{kind.split('_')[0]}"
    last = fields.movedim(1, -1).numpy()
    if kind == "mat_5":
        scipy.io.savemat(file, {"u": last})
    elif kind == "mat_7.3":
        with h5py.File(file, "w") as content:
            content["u"] = last.T  # as MATLAB, column-major
    elif kind == "npy":
        np.save(file, fields.numpy())
    elif kind == "pt":
        torch.save(fields, file)
    else:
        save_file({"u": fields.contiguous()}, file)
    return file


KINDS = ["mat_5", "mat_7.3", "npy", "pt", "safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_holds_the_same_fields(kind, fields, tmp_path):
    assert torch.equal(read_trajectories(write(tmp_path, kind, fields)), fields)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_named(kind, fields, tmp_path):
    file = write(tmp_path, kind, fields)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read as"):
        read_trajectories(file)


class Exploit:
    """Would touch a file if it were unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["u.pt", "u.npy"])
def test_nothing_is_unpickled(name, tmp_path):
    trap, file = tmp_path / "trap", tmp_path / name
    if name == "u.pt":
        torch.save(Exploit(trap), file)
    else:
        file.write_bytes(pickle.dumps(Exploit(trap)))
    with pytest.raises(ValueError, match=name):
        read_trajectories(file)
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["mat_5", "mat_7.3", "pt", "expanded"])
def test_a_bomb_is_refused_before_it_is_read(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("sdkd_plugin.data.reading._SMALL", 2**12)
    file = tmp_path / f"u.{ {'expanded': 'pt'}.get(kind, kind.split('_')[0]) }"
    if kind == "mat_5":
        scipy.io.savemat(file, {"u": np.zeros((1, 2**8, 2**8, 1))}, do_compression=True)
    elif kind == "mat_7.3":
        with h5py.File(file, "w") as content:
            content.create_dataset("u", (2**10, 2**10, 2**10, 2**10), "f4", chunks=(1, 1, 64, 64))
    elif kind == "pt":
        torch.save(torch.zeros(1), tmp_path / "small.pt")
        with zipfile.ZipFile(tmp_path / "small.pt") as small:
            entries = {name: small.read(name) for name in small.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
            for name, content in entries.items():
                bomb.writestr(name, bytes(2**20) if name.endswith("data/0") else content)
    else:
        torch.save(torch.zeros(1).expand(2**10, 2**10, 2**10, 2**10), file)
    said = r"declares \d+ bytes in a file of|is compressed|that is expanded"
    with pytest.raises(ValueError, match=rf"{file.name} cannot .* ({said})"):
        read_trajectories(file)


def test_what_is_wrong_is_said(fields, tmp_path):
    with pytest.raises(ValueError, match=r"none.npy is no file; expected .*\.mat"):
        read_trajectories(tmp_path / "none.npy")
    (tmp_path / "u.csv").touch()
    with pytest.raises(ValueError, match=r"ends in '\.csv', expected one of"):
        read_trajectories(tmp_path / "u.csv")
    with pytest.raises(ValueError, match=r"of shape \(5, 4, 6\), expected .* \(samples, time"):
        read_trajectories(write(tmp_path, "npy", fields[0]))
    with pytest.raises(ValueError, match=r"u.mat holds .*, expected .*\(samples, nx, ny, time\)"):
        read_trajectories(write(tmp_path, "mat_5", fields[0]))
    fields[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"u\.npy` has 1 of 360 values that are NaN"):
        read_trajectories(write(tmp_path, "npy", fields))
    save_file({"a": fields, "b": fields.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"holds \['a', 'b'\], expected one tensor"):
        read_trajectories(tmp_path / "two.safetensors")
