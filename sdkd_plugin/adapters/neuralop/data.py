"""Navier-Stokes data from every source, as neuraloperator's own data set, loaders and processor.

Here live finding and reading neuraloperator's ``.pt`` pairs, and one loader for these, for files of
trajectories and for trajectories just computed. Reading trajectories is `data.trajectories`',
computing them `data.navier_stokes`'; normalising and batching are the host's.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from neuralop.data.datasets.tensor_dataset import TensorDataset
from neuralop.data.transforms.data_processors import DefaultDataProcessor
from neuralop.data.transforms.normalizers import UnitGaussianNormalizer
from torch import Tensor
from torch.utils.data import DataLoader

from sdkd_plugin._checks import check_choice, check_finite, check_positive_int, check_shape
from sdkd_plugin.data import read_trajectories

Encoding: TypeAlias = Literal["channel-wise", "pixel-wise"]
Part: TypeAlias = Literal["train", "test"]
Pair: TypeAlias = tuple[Tensor, Tensor]

_REDUCED = {"channel-wise": [0, 2, 3], "pixel-wise": [0]}


def load_navier_stokes(
    source: str | os.PathLike[str] | Float[Tensor, "samples time nx ny"],
    *,
    n_train: int,
    n_tests: Sequence[int],
    batch_size: int,
    test_batch_sizes: Sequence[int],
    train_resolution: int,
    test_resolutions: Sequence[int],
    frames_in: int = 10,
    frames_out: int = 10,
    encode_input: bool = False,
    encode_output: bool = True,
    encoding: Encoding = "channel-wise",
    seed: int = 0,
) -> tuple[DataLoader[Any], dict[int, DataLoader[Any]], DefaultDataProcessor]:
    """Loaders and data processor of Navier-Stokes data, as the host's ``load_navier_stokes_pt``.

    The source is one of

    - a folder of neuraloperator's own files, ``nsforcing_train_128.pt`` and
      ``nsforcing_test_128.pt``: pairs of forcing and vorticity, one channel each;
    - a file of trajectories, as `read_trajectories` reads it, such as FNO's ``.mat`` files;
    - trajectories, as `sdkd_plugin.data.navier_stokes` computes them.

    Of trajectories the first samples are for training and the last for testing, as in FNO's
    experiments; frames are channels. A resolution that the source does not have is every n-th
    point of the least finer one that it has. Normalisers are the host's, fitted to the training
    part alone; the loaders give fields in physical units, which the processor normalises.

    Args:
        source: where the data come from.
        n_train: samples for training.
        n_tests: samples of each test resolution.
        batch_size: of training.
        test_batch_sizes: of each test resolution.
        train_resolution: points along each axis.
        test_resolutions: likewise, each once.
        frames_in: of a trajectory, the first ones, which are ``x``.
        frames_out: the next ones, which are ``y``. The pairs of a folder have no frames.
        encode_input: whether the processor normalises ``x``.
        encode_output: whether it normalises ``y`` in training, and undoes it in evaluation.
        encoding: one mean and deviation a channel, or a channel and point.
        seed: of the order of the training samples, which is another one in every epoch.

    Returns:
        the training loader, the test loaders by resolution, and the data processor, to be given
        to the host's ``Trainer``. Samples are ``{"x": ..., "y": ...}`` of shape (channels, n, n).

    Raises:
        ValueError: if the source is missing, damaged, or not of these layouts; if it has too few
            samples or frames, or not the resolution; if test lists differ in length; if an option
            is unknown.

    Example:
        >>> from sdkd_plugin.data import navier_stokes
        >>> fields = navier_stokes(
        ...     6, resolution=16, solver_resolution=32, duration=4.0, cache=False, progress=False
        ... )
        >>> train, tests, processor = load_navier_stokes(
        ...     fields, n_train=4, n_tests=[2, 2], batch_size=2, test_batch_sizes=[2, 2],
        ...     train_resolution=16, test_resolutions=[8, 16], frames_in=2, frames_out=2,
        ... )
        >>> {n: next(iter(loader))["y"].shape for n, loader in tests.items()}
        {8: torch.Size([2, 2, 8, 8]), 16: torch.Size([2, 2, 16, 16])}

    Source: neuralop.data.datasets.navier_stokes; FNO, arXiv 2010.08895, section 5.3.
    """
    check_positive_int("seed", seed, 0)
    check_choice("encoding", encoding, get_args(Encoding))
    for name, values in {
        "n_train": [n_train],
        "n_tests": n_tests,
        "batch_size": [batch_size],
        "test_batch_sizes": test_batch_sizes,
        "train_resolution": [train_resolution],
        "test_resolutions": test_resolutions,
        "frames_in": [frames_in],
        "frames_out": [frames_out],
    }.items():
        if isinstance(values, int):
            raise ValueError(
                f"`{name}` is {values}, expected a list with an entry for every test resolution."
            )
        for value in values:
            check_positive_int(name, value)
    if len({len(n_tests), len(test_batch_sizes), len(test_resolutions)}) > 1:
        raise ValueError(
            f"`n_tests`, `test_batch_sizes` and `test_resolutions` have {len(n_tests)}, "
            f"{len(test_batch_sizes)} and {len(test_resolutions)} entries, expected one of each "
            "for every test resolution."
        )
    if len(set(test_resolutions)) < len(test_resolutions):
        raise ValueError(
            f"`test_resolutions` is {list(test_resolutions)}, expected each of them once."
        )
    if encoding == "pixel-wise" and (encode_input or encode_output):
        _check_pixel_wise(n_train, train_resolution, test_resolutions)

    read: Callable[[Part, int, int], Pair]
    if not isinstance(source, Tensor) and Path(source).is_dir():
        read = partial(_read_pairs, Path(source))
    else:
        name = "source" if isinstance(source, Tensor) else str(source)
        fields = source if isinstance(source, Tensor) else read_trajectories(source)
        _check_trajectories(name, fields, n_train, n_tests, frames_in + frames_out)
        read = partial(_cut, fields, frames_in, frames_out)

    x, y = read("train", n_train, train_resolution)
    normalisers = [
        _fitted(part, encoding) if encode else None
        for part, encode in ((x, encode_input), (y, encode_output))
    ]
    train_loader = DataLoader(
        TensorDataset(x, y),
        batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    test_loaders = {
        resolution: DataLoader(TensorDataset(*read("test", n, resolution)), size)
        for resolution, n, size in zip(test_resolutions, n_tests, test_batch_sizes, strict=True)
    }
    return train_loader, test_loaders, DefaultDataProcessor(*normalisers)


def _check_pixel_wise(n_train: int, trained: int, tested: Sequence[int]) -> None:
    if others := sorted(set(tested) - {trained}):
        raise ValueError(
            f"`encoding` is 'pixel-wise', a mean for each of {trained} x {trained} points, but "
            f"`test_resolutions` has {others}: take 'channel-wise', or test at {trained} alone."
        )
    if n_train < 2:
        raise ValueError(
            f"`n_train` is {n_train}, expected at least 2 where `encoding` is 'pixel-wise': one "
            "sample has no deviation."
        )


def _fitted(fields: Tensor, encoding: Encoding) -> UnitGaussianNormalizer:
    normaliser = UnitGaussianNormalizer(dim=_REDUCED[encoding])
    normaliser.fit(fields)
    return normaliser


def _check_trajectories(
    name: str, fields: Tensor, n_train: int, n_tests: Sequence[int], frames: int
) -> None:
    if fields.ndim != 4:
        raise ValueError(
            f"`{name}` has shape {tuple(fields.shape)}, expected (samples, time, nx, ny)."
        )
    check_finite(name, fields)
    samples, time, nx, ny = fields.shape
    if nx != ny:
        raise ValueError(f"`{name}` is of {nx} x {ny} points, expected as many along both axes.")
    if (needed := n_train + max(n_tests, default=0)) > samples:
        raise ValueError(
            f"`{name}` has {samples} trajectories, expected at least {needed}: `n_train` is "
            f"{n_train} and the largest of `n_tests` {needed - n_train}, and none is used for both."
        )
    if frames > time:
        raise ValueError(
            f"`{name}` has {time} frames, expected at least {frames}: `frames_in` and `frames_out` "
            "together."
        )


def _cut(
    fields: Tensor, frames_in: int, frames_out: int, part: Part, n: int, resolution: int
) -> Pair:
    """The first or the last ``n`` trajectories, cut into what is given and what is asked."""
    if (finest := fields.shape[-1]) % resolution:
        raise ValueError(
            f"the resolution {resolution} was asked for, expected a divisor of the trajectories' "
            f"{finest}."
        )
    samples = fields[:n] if part == "train" else fields[-n:]
    samples = _every(finest // resolution, samples[:, : frames_in + frames_out])
    return samples[:, :frames_in], samples[:, frames_in:]


def _read_pairs(folder: Path, part: Part, n: int, resolution: int) -> Pair:
    """The first ``n`` samples of the host's file for training or testing."""
    finest, file = _find(folder, part, resolution)
    try:
        content = torch.load(file, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as .pt: {error}") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file} is damaged or holds more than tensors, and is not unpickled: {reason}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), Tensor) for name in ("x", "y")
    ):
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} holds {got}, expected a dict with the tensors 'x' and 'y'.")
    x, y = content["x"], content["y"]
    check_shape(f"y of {file}", y.shape, x.shape, "as x")
    check_shape(f"x of {file}", x.shape, (len(x), finest, finest), "samples and the file's grid")
    if n > len(x):
        raise ValueError(
            f"{file} holds {len(x)} samples, expected at least the {n} that are asked for."
        )
    for name, field in (("x", x[:n]), ("y", y[:n])):
        check_finite(f"{name} of {file}", field)
    # The file leaves out the axis of its one channel.
    step = finest // resolution
    return _every(step, x[:n].unsqueeze(1)), _every(step, y[:n].unsqueeze(1))


def _find(folder: Path, part: Part, resolution: int) -> tuple[int, Path]:
    """The least resolution that has this one's points, and its file."""
    name = re.compile(rf"nsforcing_{part}_([1-9]\d*)\.pt")
    files = {int(m[1]): file for file in folder.iterdir() if (m := name.fullmatch(file.name))}
    finer = [n for n in files if n % resolution == 0]
    if not finer:
        raise ValueError(
            f"{folder} holds {sorted(file.name for file in files.values())}, expected "
            f"nsforcing_{part}_{resolution}.pt or one whose resolution is a multiple of "
            f"{resolution}; `neuralop.data.datasets.NavierStokesDataset` downloads such files."
        )
    return min(finer), files[min(finer)]


def _every(step: int, fields: Tensor) -> Tensor:
    # A copy, so that the whole of a large file is not kept for a part of it.
    return fields[..., ::step, ::step].float().clone(memory_format=torch.contiguous_format)
