"""Navier-Stokes data from every source, as neuraloperator's own data set, loaders and processor.

Reading trajectories is in `data.trajectories`, computing them in `data.navier_stokes`.
"""

import os
import re
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from neuralop.data.datasets.tensor_dataset import TensorDataset
from neuralop.data.transforms.data_processors import DefaultDataProcessor
from neuralop.data.transforms.normalizers import UnitGaussianNormalizer
from torch import Tensor
from torch.utils.data import DataLoader

from sdkd_plugin._checks import check_choice, check_finite, check_seed, check_sizes, shown
from sdkd_plugin._plain import load_plain
from sdkd_plugin.data import read_trajectories

Encoding: TypeAlias = Literal["channel-wise", "pixel-wise"]
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

    Of trajectories the first samples are for training and the last for testing, as in FNO's
    experiments; frames are channels. A resolution that the source does not have is every n-th
    point of the next finer one. Normalisers are the host's, fitted to the training part alone; the
    loaders give fields in physical units, which the processor normalises.

    Args:
        source: a folder of neuraloperator's own files, such as ``nsforcing_train_128.pt``, with
            pairs of forcing and vorticity, one channel each; a file for `read_trajectories`, such
            as FNO's ``.mat`` files; or trajectories, as of `sdkd_plugin.data.navier_stokes`.
        n_train: samples for training.
        n_tests: samples of each test resolution.
        batch_size: of training.
        test_batch_sizes: of each test resolution.
        train_resolution: points along each axis.
        test_resolutions: points along each axis, each number once.
        frames_in: first frames of a trajectory, which are ``x``.
        frames_out: next frames, which are ``y``. The pairs of a folder have no frames.
        encode_input: whether the processor normalises ``x``.
        encode_output: whether it normalises ``y`` in training, and undoes it in evaluation.
        encoding: one mean and deviation a channel, or a channel and point.
        seed: of the order of the training samples, another in each epoch.

    Returns:
        the training loader, the test loaders by resolution, and the data processor. Samples are
        ``{"x": ..., "y": ...}`` of shape (channels, n, n).

    Raises:
        ValueError: if the source is missing, damaged, of another layout or too small, or an option
            does not fit.

    Example:
        >>> sizes = dict(n_train=4, batch_size=2, train_resolution=16)
        >>> sizes |= dict(n_tests=[2, 2], test_batch_sizes=[2, 2], test_resolutions=[8, 16])
        >>> _, tests, _ = load_navier_stokes(torch.randn(6, 20, 16, 16), **sizes)
        >>> next(iter(tests[8]))["y"].shape
        torch.Size([2, 10, 8, 8])

    Source: neuralop.data.datasets.navier_stokes; FNO, arXiv 2010.08895, section 5.3.
    """
    check_sizes(n_train=n_train, batch_size=batch_size, train_resolution=train_resolution)
    check_sizes(frames_in=frames_in, frames_out=frames_out)
    check_seed(seed)
    check_choice("encoding", encoding, get_args(Encoding))
    lists: tuple[Sequence[int], ...] = (n_tests, test_batch_sizes, test_resolutions)
    lengths = {len(values) if isinstance(values, Sized) else None for values in lists}
    if len(lengths) > 1 or None in lengths:
        raise ValueError(
            "`n_tests`, `test_batch_sizes` and `test_resolutions` are "
            f"{', '.join(map(shown, lists))}, expected an entry for every test resolution in each."
        )
    for n, size, resolution in zip(*lists, strict=True):
        check_sizes(n_tests=n, test_batch_sizes=size, test_resolutions=resolution)
    if len(set(test_resolutions)) < len(test_resolutions):
        raise ValueError(f"`test_resolutions` is {test_resolutions}, expected each of them once.")
    pixel_wise = encoding == "pixel-wise" and (encode_input or encode_output)
    if pixel_wise and (n_train < 2 or set(test_resolutions) - {train_resolution}):
        raise ValueError(
            "`encoding` is 'pixel-wise', which needs two training samples or more and tests at the "
            f"training resolution alone; `n_train` is {n_train} and `test_resolutions` "
            f"{shown(test_resolutions)}: take 'channel-wise'."
        )

    frames = (frames_in, frames_out)
    if isinstance(source, Tensor):
        read = _trajectories("source", source, frames, n_train, n_tests)
    elif Path(source).is_dir():
        read = _pairs(Path(source))
    else:
        read = _trajectories(str(source), read_trajectories(source), frames, n_train, n_tests)
    training = read("train", n_train, train_resolution)
    encoded = (encode_input, encode_output)
    normalisers = [UnitGaussianNormalizer(dim=_REDUCED[encoding]) if e else None for e in encoded]
    for normaliser, fields in zip(normalisers, training, strict=True):
        if normaliser is not None:
            normaliser.fit(fields)
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(*training), int(batch_size), shuffle=True, generator=order)
    tests = {
        resolution: DataLoader(TensorDataset(*read("test", n, resolution)), int(size))
        for n, size, resolution in zip(*lists, strict=True)
    }
    return train, tests, DefaultDataProcessor(*normalisers)


def _trajectories(
    name: str, fields: Tensor, frames: tuple[int, int], n_train: int, n_tests: Sequence[int]
) -> Callable[[str, int, int], Pair]:
    """A reader of the first or the last trajectories, cut into x and y."""
    shape, needed = tuple(fields.shape), n_train + max(n_tests, default=0)
    if fields.ndim != 4 or shape[2] != shape[3]:
        raise ValueError(f"`{name}` has shape {shape}, expected (samples, time, n, n).")
    check_finite(name, fields)
    if shape[0] < needed or shape[1] < sum(frames):
        raise ValueError(
            f"`{name}` has {shape[0]} trajectories of {shape[1]} frames, expected {needed} or more "
            f"(`n_train` and the largest of `n_tests`) of {sum(frames)} or more (`frames_in` and "
            "`frames_out` together)."
        )

    def read(part: str, n: int, resolution: int) -> Pair:
        if shape[3] % resolution:
            raise ValueError(f"the resolution is {resolution}, expected a divisor of {shape[3]}.")
        samples = fields[:n] if part == "train" else fields[-n:]
        samples = _every(shape[3] // resolution, samples[:, : sum(frames)])
        return samples[:, : frames[0]], samples[:, frames[0] :]

    return read


def _pairs(folder: Path) -> Callable[[str, int, int], Pair]:
    """A reader of the first samples of the host's files."""

    def read(part: str, n: int, resolution: int) -> Pair:
        name = re.compile(rf"nsforcing_{part}_([1-9]\d*)\.pt")
        files = {int(m[1]): file for file in folder.iterdir() if (m := name.fullmatch(file.name))}
        finest = min((size for size in files if size % resolution == 0), default=0)
        if not finest:
            raise ValueError(
                f"{folder} holds {sorted(file.name for file in files.values())}, expected "
                f"nsforcing_{part}_{resolution}.pt or one of a multiple of {resolution} points; "
                "`neuralop.data.datasets.NavierStokesDataset` downloads such files."
            )
        content = load_plain(file := files[finest])
        got = content if isinstance(content, dict) else {}
        shapes = {key: tuple(got[key].shape) for key in "xy" if isinstance(got.get(key), Tensor)}
        samples = (*shapes.get("x", ()), 0)[0]
        if samples < n or shapes != dict.fromkeys("xy", (samples, finest, finest)):
            raise ValueError(
                f"{file} holds a {type(content).__name__} with tensors of shape {shapes}, expected "
                f"a dict with 'x' and 'y' of shape ({n} or more, {finest}, {finest})."
            )
        for key in "xy":
            check_finite(f"{key} of {file}", got[key][:n])
        # The file leaves out the axis of its one channel.
        x, y = (_every(finest // resolution, got[key][:n, None]) for key in "xy")
        return x, y

    return read


def _every(step: int, fields: Tensor) -> Tensor:
    # A copy, so that the whole of a large file is not kept for a part of it.
    return fields[..., ::step, ::step].float().clone(memory_format=torch.contiguous_format)
