"""Reading gridded trajectories from files: FNO's MATLAB layout, PyTorch and NumPy.

What is computed instead of read is in `navier_stokes`.
"""

import os
import pickle
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdkd_plugin._checks import check_finite

FORMATS = (".mat", ".npy", ".pt", ".safetensors")
# What the readers of these formats raise for a file that is cut off or is something else.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    zlib.error,
)


def read_trajectories(path: str | os.PathLike[str]) -> Float[Tensor, "samples time nx ny"]:
    """Trajectories of a scalar field from one file.

    - ``.mat``: MATLAB 5 or 7.3 with a variable ``u`` of shape (samples, nx, ny, time), as FNO's
      ``NavierStokes_V1e-5_N1200_T20.mat``;
    - ``.npy``, ``.pt`` (one tensor), ``.safetensors`` (one tensor): (samples, time, nx, ny).

    No file is unpickled: ``.pt`` is read with ``weights_only=True``, ``.npy`` without objects.

    Args:
        path: the file.

    Returns:
        float32.

    Raises:
        ValueError: naming the file, if it does not exist, is of another format, is damaged, or
            holds something else; or if values are NaN or Inf.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "u.npy"
        >>> np.save(file, np.zeros((2, 20, 8, 8), dtype=np.float32))
        >>> read_trajectories(file).shape
        torch.Size([2, 20, 8, 8])
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is no file; expected trajectories as one of {FORMATS}.")
    if file.suffix not in FORMATS:
        raise ValueError(f"{file} ends in {file.suffix!r}, expected one of {FORMATS}.")
    try:
        fields = _read(file)
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as {file.suffix}: {error}") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file} is damaged or holds more than one tensor, and is not unpickled: {reason}"
        ) from error
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
        return torch.from_numpy(np.load(file, allow_pickle=False))
    if file.suffix == ".mat":
        return torch.from_numpy(np.ascontiguousarray(_read_mat(file)))
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        loaded = torch.load(file, weights_only=True)
        tensors = loaded if isinstance(loaded, dict) else {"": loaded}
    if len(tensors) != 1 or not isinstance(next(iter(tensors.values())), Tensor):
        raise ValueError(f"it holds {list(tensors)}, expected one tensor")
    return next(iter(tensors.values()))


def _read_mat(file: Path) -> np.ndarray:
    if h5py.is_hdf5(file):
        with h5py.File(file) as content:
            # MATLAB is column-major: HDF5 shows the axes in reverse.
            return _time_second(np.asarray(content["u"]).T if "u" in content else None)
    return _time_second(scipy.io.loadmat(file, variable_names=["u"]).get("u"))


def _time_second(u: np.ndarray | None) -> np.ndarray:
    if u is None:
        raise ValueError("it has no variable u")
    return np.moveaxis(u, -1, 1) if u.ndim == 4 else u
