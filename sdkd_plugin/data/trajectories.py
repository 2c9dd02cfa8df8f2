"""Reading gridded trajectories from files: FNO's MATLAB layout, PyTorch, NumPy and safetensors."""

import math
import os
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from sdkd_plugin._checks import check_finite
from sdkd_plugin._explained import explained
from sdkd_plugin._plain import load_plain, reading
from sdkd_plugin.data.reading import check_size

FORMATS = (".mat", ".npy", ".pt", ".safetensors")
_MATLAB_BYTES = {"double": 8, "single": 4}


@explained
def read_trajectories(path: str | os.PathLike[str]) -> Float[Tensor, "samples time nx ny"]:
    """Trajectories of a scalar field from one file.

    - ``.mat``: MATLAB 5 or 7.3 with a variable ``u`` of shape (samples, nx, ny, time), as FNO's
      ``NavierStokes_V1e-5_N1200_T20.mat``;
    - ``.npy``, ``.pt`` (one tensor), ``.safetensors`` (one tensor): (samples, time, nx, ny).

    Nothing is unpickled. A file is refused before it is read if its array has over 256 MiB and over
    100 times the file's size. The result is float32.

    Raises:
        ValueError: if the file does not exist, is damaged, holds something else or too much, or has
            values that are NaN or Inf.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "u.npy"
        >>> np.save(file, np.zeros((2, 20, 8, 8), dtype=np.float32))
        >>> read_trajectories(file).shape
        torch.Size([2, 20, 8, 8])
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"`path`: {file} is no file; expected trajectories as one of {FORMATS}.")
    if file.suffix not in FORMATS:
        raise ValueError(f"{file} ends in {file.suffix!r}, expected one of {FORMATS}.")
    with reading(file, f"one array in {file.suffix}"):
        fields = _read(file)
    if fields.ndim != 4 or not fields.is_floating_point() or not fields.numel():
        layout = "(samples, nx, ny, time)" if file.suffix == ".mat" else "(samples, time, nx, ny)"
        raise ValueError(
            f"{file} holds {fields.dtype} of shape {tuple(fields.shape)}, expected floating-point "
            f"trajectories {layout}."
        )
    fields = fields.float()
    check_finite(str(file), fields)
    return fields


def _read(file: Path) -> Tensor:
    if file.suffix == ".npy":
        # A memory map checks the declared shape against the file's length.
        return torch.from_numpy(np.array(np.load(file, mmap_mode="r", allow_pickle=False)))
    if file.suffix == ".mat":
        u = _read_mat(file)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(u, -1, 1) if u.ndim == 4 else u))
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        loaded = load_plain(file)
        tensors = loaded if isinstance(loaded, dict) else {"": loaded}
    if len(tensors) != 1 or not isinstance(next(iter(tensors.values())), Tensor):
        raise ValueError(f"it holds {list(tensors)}, expected one tensor")
    return next(iter(tensors.values()))


def _read_mat(file: Path) -> np.ndarray:
    if h5py.is_hdf5(file):
        with h5py.File(file) as content:
            u = content.get("u")
            if not isinstance(u, h5py.Dataset) or u.dtype.kind != "f":
                raise ValueError("it has no variable u of floating-point numbers")
            check_size(file, u.nbytes)
            return np.asarray(u).T  # MATLAB is column-major: HDF5 has the axes in reverse
    for name, shape, kind in scipy.io.whosmat(file):
        if name == "u" and kind in _MATLAB_BYTES:
            check_size(file, math.prod(shape) * _MATLAB_BYTES[kind])
            return scipy.io.loadmat(file, variable_names=["u"])["u"]
    raise ValueError("it has no variable u of floating-point numbers")
