"""Reading TaxiBJ: taxi flows over Beijing, half an hour a frame, with days missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_not_negative, check_positive_int
from sdkd_plugin._explained import explained
from sdkd_plugin._files import PathLike
from sdkd_plugin._plain import reading
from sdkd_plugin.data.reading import check_index, check_size, files_at, given_paths, parse_time

SLOT = pd.Timedelta(minutes=30)
SLOTS_A_DAY = 48


@explained
@dataclass(frozen=True, eq=False, kw_only=True)
class TaxiFlows:
    """How many taxis enter and leave each cell of a city's grid in each half hour.

    Args:
        flow: taxis in half an hour, inflow before outflow; finite and not negative.
        index: the full or half hour at which each frame begins, ascending; frames may be missing.

    Raises:
        ValueError: if flows or times are not so.

    Example:
        >>> index = pd.date_range("2013-07-01", periods=6, freq="30min").delete(2)
        >>> flows = TaxiFlows(flow=torch.zeros(5, 2, 4, 4), index=index)
        >>> flows.windows(2, 1)
        tensor([[2, 3, 4]])
    """

    flow: Float[Tensor, "time flows rows columns"]
    index: pd.DatetimeIndex

    def __post_init__(self) -> None:
        shape = tuple(self.flow.shape)
        wrong_shape = len(shape) != 4 or shape[1] != 2 or not self.flow.numel()
        if wrong_shape or not self.flow.is_floating_point():
            raise ValueError(
                f"`flow` is {self.flow.dtype} of shape {shape}, expected floating point of shape "
                "(time, 2, rows, columns), inflow before outflow."
            )
        check_not_negative("flow", self.flow, "scale flows afterwards")
        check_index("`index`", self.index, len(self.flow))
        odd = self.index != self.index.floor("30min")
        if odd.any():
            found = self.index[int(odd.argmax())]
            raise ValueError(f"`index` has {found}, expected the full and half hours of frames.")

    def windows(
        self,
        n_input: int,
        n_target: int,
        *,
        start: str | pd.Timestamp | None = None,
        stop: str | pd.Timestamp | None = None,
    ) -> Int[Tensor, "windows frames"]:
        """The frames of each window of consecutive half hours, without gaps.

        ``start`` and ``stop`` bound the targets alone, so one time splits training from test data:
        no target of windows with ``start`` there is in windows with ``stop`` there.

        Args:
            n_input: frames to read.
            n_target: frames to forecast, right after them.
            start: no target is earlier.
            stop: every target is earlier.

        Returns:
            Positions in ``flow``, int64, in order of time: ``flow[windows]`` has shape
            ``(windows, n_input + n_target, 2, rows, columns)``.

        Raises:
            ValueError: for a number or bound out of range, or where there is no such window.
        """
        check_positive_int("n_input", n_input)
        check_positive_int("n_target", n_target)
        frames = n_input + n_target
        first = np.arange(max(len(self.index) - frames + 1, 0))
        last, target = first + frames - 1, first + n_input
        # Times ascend by whole slots, so only frames without a gap are this far apart.
        kept = self.index[last] - self.index[first] == (frames - 1) * SLOT
        if start is not None:
            kept &= self.index[target] >= parse_time("start", start)
        if stop is not None:
            kept &= self.index[last] < parse_time("stop", stop)
        if not kept.any():
            raise ValueError(
                f"`n_input` is {n_input} and `n_target` is {n_target}, but no {frames} consecutive "
                f"half hours with targets from {start} until {stop} are in the {len(self.index)} "
                f"frames from {self.index[0]} to {self.index[-1]}; take shorter windows."
            )
        return torch.from_numpy(first[kept])[:, None] + torch.arange(frames)


@explained
def read_taxibj(paths: PathLike | Sequence[PathLike]) -> TaxiFlows:
    """Read one or several of the files ``BJ13_M32x32_T30_InOut.h5`` to ``BJ16...``.

    A file holds ``data``, flows of shape (time, 2, rows, columns), and ``date``, a string for each
    frame such as ``2013070101``: the day, then the half hour of that day from 01 to 48. Several
    files are joined in order of time; slot 01 is indexed as 00:00.

    Args:
        paths: a file, a folder (all ``*_InOut.h5`` in it), or several of either.

    Raises:
        FileNotFoundError: if a file or folder is absent, or a folder holds no such file.
        ValueError: if a file is damaged or holds something else, dates do not ascend, flows are
            negative or not finite, files overlap in time or differ in their grid, or flows have
            over 256 MiB and over 100 times the file's size.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "BJ13_M32x32_T30_InOut.h5"
        >>> with h5py.File(file, "w") as content:
        ...     content["data"] = np.ones((2, 2, 32, 32))
        ...     content["date"] = [b"2013070101", b"2013070102"]
        >>> flows = read_taxibj(file)
        >>> flows.flow.shape, str(flows.index[1])
        (torch.Size([2, 2, 32, 32]), '2013-07-01 00:30:00')

    Source: Zhang et al., Deep Spatio-Temporal Residual Networks for Citywide Crowd Flows
    Prediction, AAAI 2017, arXiv 1610.00081: the files and their README.
    """
    what = "TaxiBJ files such as BJ13_M32x32_T30_InOut.h5"
    files = [file for path in given_paths(paths) for file in files_at(path, "*_InOut.h5", what)]
    parts = sorted((_read(file) for file in files), key=lambda flows: flows.index[0])
    index = pd.DatetimeIndex(np.concatenate([flows.index.to_numpy() for flows in parts]))
    together = ", ".join(str(file) for file in files)
    check_index(f"time in {together}", index)
    grids = {tuple(flows.flow.shape[2:]) for flows in parts}
    if len(grids) > 1:
        raise ValueError(f"{together} have the grids {grids}, expected one; read them apart.")
    return TaxiFlows(flow=torch.cat([flows.flow for flows in parts]), index=index)


def _read(file: Path) -> TaxiFlows:
    with reading(file, "a TaxiBJ file"), h5py.File(file) as content:
        there = {name: it for name, it in content.items() if isinstance(it, h5py.Dataset)}
        if not {"data", "date"} <= set(there):
            raise ValueError(f"it holds the datasets {sorted(there)}, expected 'data' and 'date'")
        data, date = there["data"], there["date"]
        if data.dtype.kind not in "fiu" or data.ndim != 4 or date.shape != data.shape[:1]:
            raise ValueError(
                f"`data` is {data.dtype} of shape {data.shape} and `date` of shape {date.shape}, "
                "expected numbers of shape (time, 2, rows, columns) and (time,)"
            )
        check_size(file, data.nbytes + date.nbytes)
        index = _parse(date.asstr()[:])
        return TaxiFlows(flow=torch.from_numpy(data[:].astype(np.float32)), index=index)


def _parse(dates: np.ndarray) -> pd.DatetimeIndex:
    texts = pd.Series(dates, dtype=object)
    texts = texts.where(texts.str.fullmatch(r"\d{10}"))
    days = pd.to_datetime(texts.str[:8], format="%Y%m%d", errors="coerce")
    slots = pd.to_numeric(texts.str[8:])
    bad = days.isna() | ~slots.between(1, SLOTS_A_DAY)
    if bad.any():
        first = int(bad.to_numpy().argmax())
        raise ValueError(
            f"`date` of frame {first} is {dates[first]!r}, expected year, month, day and the half "
            f"hour from 01 to {SLOTS_A_DAY}, such as '2013070101'"
        )
    return pd.DatetimeIndex(days + (slots - 1) * SLOT)
