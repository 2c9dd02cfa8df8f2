"""Reading TaxiBJ: taxi flows over Beijing, half an hour a frame, with days missing.

Here live the reader of the h5 files, the flows with their times, and the windows that stay clear of
the gaps. Sensors on a road network are in `traffic`; scaling and batching are the caller's.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_finite, check_positive_int

SLOT = pd.Timedelta(minutes=30)
SLOTS_A_DAY = 48


@dataclass(frozen=True, eq=False, kw_only=True)
class TaxiFlows:
    """How many taxis enter and leave each cell of a city's grid in each half hour.

    Args:
        flow: taxis in half an hour, float32 ``(time, 2, rows, columns)``, inflow before outflow.
        index: the full or half hour at which each begins, ascending; where it jumps, frames are
            missing.

    Raises:
        ValueError: if the flows are of another shape or type, not finite or negative, or the times
            do not match them, do not ascend or are not full or half hours.

    Example:
        >>> index = pd.date_range("2013-07-01", periods=6, freq="30min").delete(2)
        >>> flows = TaxiFlows(flow=torch.zeros(5, 2, 4, 4), index=index)
        >>> flows.windows(2, 1)
        tensor([[2, 3, 4]])
    """

    flow: Float[Tensor, "time flows rows columns"]
    index: pd.DatetimeIndex

    def __post_init__(self) -> None:
        if (
            self.flow.ndim != 4
            or self.flow.shape[1] != 2
            or not self.flow.numel()
            or not self.flow.is_floating_point()
        ):
            raise ValueError(
                f"`flow` is {self.flow.dtype} of shape {tuple(self.flow.shape)}, expected "
                "floating point of shape (time, 2, rows, columns), inflow before outflow."
            )
        check_finite("flow", self.flow)
        if bool((self.flow < 0).any()):
            raise ValueError(
                f"`flow` goes down to {float(self.flow.min()):g}, expected counts of at least 0; "
                "pass the flows as they are and scale them afterwards."
            )
        if len(self.index) != len(self.flow):
            raise ValueError(
                f"`index` has {len(self.index)} times, expected {len(self.flow)}, one for each "
                "frame of `flow`."
            )
        _check_ascending("`index`", self.index)
        odd = self.index != self.index.floor("30min")
        if odd.any():
            raise ValueError(
                f"`index` has {self.index[int(odd.argmax())]}, expected full and half hours; a "
                "frame is indexed by the beginning of its half hour."
            )

    @property
    def incomplete_days(self) -> pd.DatetimeIndex:
        """Days of which some half hours are there and some are not.

        Windows avoid the gaps by themselves; who compares with work that drops such days whole
        (as ST-ResNet does) finds them here.

        Example:
            >>> index = pd.date_range("2013-07-01", periods=50, freq="30min")
            >>> TaxiFlows(flow=torch.zeros(50, 2, 4, 4), index=index).incomplete_days
            DatetimeIndex(['2013-07-02'], dtype='datetime64[ns]', freq=None)
        """
        days, slots = np.unique(self.index.normalize(), return_counts=True)
        return pd.DatetimeIndex(days[slots < SLOTS_A_DAY])

    def windows(
        self,
        n_input: int,
        n_target: int,
        *,
        start: str | pd.Timestamp | None = None,
        stop: str | pd.Timestamp | None = None,
    ) -> Int[Tensor, "windows frames"]:
        """Which frames make up each window of consecutive half hours; none spans a gap.

        ``start`` and ``stop`` bound the targets alone: windows that ``stop`` at a time and those
        that ``start`` there have no target in common, nor is a target of the later ones an input
        of the earlier. So one time splits training from test data.

        Args:
            n_input: frames to read.
            n_target: frames to forecast, right after them.
            start: no target is earlier.
            stop: every target is earlier.

        Returns:
            Positions in ``flow``, int64, in order of time: with ``w`` of them ``flow[w]`` has shape
            ``(windows, n_input + n_target, 2, rows, columns)``.

        Raises:
            ValueError: if a number of frames is not positive, a bound is no time, or there is no
                such window.

        Example:
            >>> index = pd.date_range("2013-07-01", periods=10, freq="30min")
            >>> flows = TaxiFlows(flow=torch.zeros(10, 2, 4, 4), index=index)
            >>> train = flows.windows(2, 2, stop="2013-07-01 03:00")
            >>> test = flows.windows(2, 2, start="2013-07-01 03:00")
            >>> len(train), train[-1].tolist(), test[0].tolist()
            (3, [2, 3, 4, 5], [4, 5, 6, 7])
        """
        check_positive_int("n_input", n_input)
        check_positive_int("n_target", n_target)
        frames = n_input + n_target
        first = np.arange(max(len(self.index) - frames + 1, 0))
        last, target = first + frames - 1, first + n_input
        # Times ascend by whole slots, so only frames without a gap take this long and no longer.
        kept = self.index[last] - self.index[first] == (frames - 1) * SLOT
        if start is not None:
            kept &= self.index[target] >= _time("start", start)
        if stop is not None:
            kept &= self.index[last] < _time("stop", stop)
        if not kept.any():
            bounds = f" with targets from {start} until {stop}" if start or stop else ""
            raise ValueError(
                f"`n_input` is {n_input} and `n_target` is {n_target}, but no {frames} consecutive "
                f"half hours{bounds} are in the {len(self.index)} frames from {self.index[0]} to "
                f"{self.index[-1]}; take shorter windows or other bounds."
            )
        return torch.from_numpy(first[kept])[:, None] + torch.arange(frames)


def read_taxibj(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> TaxiFlows:
    """Read one or several of the files ``BJ13_M32x32_T30_InOut.h5`` to ``BJ16...``.

    A file holds ``data``, flows of shape (time, 2, rows, columns), and ``date``, a string for each
    frame such as ``2013070101``: the day, then the half hour of that day from 01 to 48. Several
    files are put together in order of time.

    Args:
        paths: a file, a folder (all ``*_InOut.h5`` in it), or several of either.

    Returns:
        float32 flows; slot 01 is indexed as 00:00.

    Raises:
        FileNotFoundError: if a file or folder is absent, or a folder holds no such file.
        ValueError: if a file is damaged, lacks a dataset or has one of another shape; if dates are
            no dates, repeat or do not ascend; if flows are negative, NaN or Inf; if files overlap
            in time or differ in their grid. The message names the file.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "BJ13_M32x32_T30_InOut.h5"
        >>> with h5py.File(file, "w") as content:
        ...     content["data"] = np.ones((2, 2, 32, 32))
        ...     content["date"] = [b"2013070101", b"2013070102"]
        >>> flows = read_taxibj(file)
        >>> flows.flow.shape, str(flows.index[1])
        (torch.Size([2, 2, 32, 32]), '2013-07-01 00:30:00')

    Source:
        Zhang et al., Deep Spatio-Temporal Residual Networks for Citywide Crowd Flows Prediction,
        AAAI 2017, arXiv 1610.00081: the files and their README.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [file for path in given for file in _files(Path(path))]
    if not files:
        raise ValueError("`paths` is empty, expected at least one file or folder.")
    parts = sorted(((file, *_read(file)) for file in files), key=lambda part: part[2][0])
    for (file, flow, index), (later, other, others) in pairwise(parts):
        if others[0] <= index[-1]:
            raise ValueError(
                f"{file} reaches to {index[-1]} and {later} starts at {others[0]}, expected files "
                "that do not overlap; give each one once."
            )
        if other.shape[1:] != flow.shape[1:]:
            raise ValueError(
                f"{file} has a grid of {flow.shape[2:]} and {later} one of {other.shape[2:]}, "
                "expected one grid; read them apart."
            )
    flows = torch.from_numpy(np.concatenate([flow for _, flow, _ in parts]))
    times = np.concatenate([index.to_numpy() for _, _, index in parts])
    return TaxiFlows(flow=flows, index=pd.DatetimeIndex(times))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, expected a TaxiBJ file or a folder.")
    found = sorted(path.glob("*_InOut.h5"))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no file *_InOut.h5, expected some such as BJ13_M32x32_T30_InOut.h5."
        )
    return found


def _read(file: Path) -> tuple[np.ndarray, pd.DatetimeIndex]:
    try:
        with h5py.File(file) as content:
            datasets = {name: it for name, it in content.items() if isinstance(it, h5py.Dataset)}
            if not {"data", "date"} <= set(datasets):
                raise ValueError(
                    f"it holds the datasets {sorted(datasets)}, expected 'data' and 'date'"
                )
            flow = np.asarray(datasets["data"])
            dates = np.asarray(datasets["date"].asstr()[:])
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a TaxiBJ file: {error}") from error
    if flow.ndim != 4 or flow.shape[1] != 2 or not flow.size or flow.dtype.kind not in "fiu":
        raise ValueError(
            f"{file}: `data` is {flow.dtype} of shape {flow.shape}, expected numbers of shape "
            "(time, 2, rows, columns), inflow before outflow."
        )
    if dates.shape != flow.shape[:1]:
        raise ValueError(
            f"{file}: `date` has shape {dates.shape}, expected {flow.shape[:1]}, one for each "
            "frame of `data`."
        )
    if not (flow >= 0).all() or not np.isfinite(flow).all():
        frame = int(np.argwhere(~((flow >= 0) & np.isfinite(flow)))[0, 0])
        raise ValueError(
            f"{file}: `data` has negative, NaN or infinite flows, first at {dates[frame]}; "
            "fetch the file again, or leave out those frames and build `TaxiFlows` yourself."
        )
    index = _parse(file, dates)
    _check_ascending(f"{file}: `date`", index)
    return flow.astype(np.float32, copy=False), index


def _parse(file: Path, dates: np.ndarray) -> pd.DatetimeIndex:
    texts = pd.Series(dates, dtype=object)
    wellformed = texts.str.fullmatch(r"\d{10}")
    days = pd.to_datetime(texts.where(wellformed).str[:8], format="%Y%m%d", errors="coerce")
    slots = pd.to_numeric(texts.where(wellformed).str[8:])
    bad = days.isna() | ~slots.between(1, SLOTS_A_DAY)
    if bad.any():
        first = int(bad.to_numpy().argmax())
        raise ValueError(
            f"{file}: `date` of frame {first} is {dates[first]!r}, expected year, month, day and "
            f"the half hour from 01 to {SLOTS_A_DAY}, such as '2013070101'."
        )
    return pd.DatetimeIndex(days + (slots - 1) * SLOT)


def _check_ascending(what: str, index: pd.DatetimeIndex) -> None:
    times = index.to_numpy()
    wrong = ~(np.diff(times) > np.timedelta64(0))  # NaT is wrong, too
    if index.hasnans or wrong.any():
        at = int(wrong.argmax()) if wrong.any() else 0
        after = index[at + 1] if len(index) > 1 else index[at]
        raise ValueError(
            f"{what} goes from {index[at]} to {after} at frame {at + 1}, expected times that "
            "ascend and do not repeat; sort the frames and drop duplicates."
        )


def _time(argument: str, given: str | pd.Timestamp) -> pd.Timestamp:
    try:
        return pd.Timestamp(given)
    except ValueError as error:
        raise ValueError(
            f"`{argument}` is {given!r}, expected a time such as '2016-03-13' ({error})."
        ) from error
