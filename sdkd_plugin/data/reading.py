"""What the readers share: which files there are, their size, and their times."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sdkd_plugin._checks import shown
from sdkd_plugin._files import PathLike

_SMALL = 256 * 2**20
_MOST_EXPANSION = 100


def given_paths(paths: PathLike | Sequence[PathLike]) -> list[PathLike]:
    """One path or several as a list, which must not be empty."""
    given: list[PathLike] = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ValueError("`paths` is empty, expected at least one file or folder.")
    return given


def files_at(path: PathLike, pattern: str, what: str) -> list[Path]:
    """A file itself, or the files of a folder that match ``pattern``, sorted."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist, expected {what} or a folder.")
    found = sorted(path.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{path} holds no file {pattern}, expected {what}.")
    return found


def check_size(file: Path, n_bytes: int) -> None:
    """Refuse an array, not yet read, of over 256 MiB and over 100 times the size of its file."""
    on_disk = file.stat().st_size
    if n_bytes > max(_SMALL, _MOST_EXPANSION * on_disk):
        raise ValueError(
            f"it declares {n_bytes} bytes in a file of {on_disk}, expected at most "
            f"{_MOST_EXPANSION} times as many"
        )


def check_index(
    what: str, index: pd.DatetimeIndex, rows: int | None = None, *, equal_steps: bool = False
) -> None:
    """Refuse times that do not ascend, are not as many as rows or, if wanted, step unequally."""
    if rows is not None and len(index) != rows:
        raise ValueError(f"{what} has {len(index)} times, expected {rows}, one for each row.")
    steps = np.diff(index.to_numpy())
    wrong = ~(steps > np.timedelta64(0))  # also for NaT
    if equal_steps:
        wrong |= steps != steps[:1]
    if wrong.any() or index.hasnans:
        at = int(wrong.argmax()) if len(wrong) else 0
        how = (
            "equal steps forward; split at gaps" if equal_steps else "times that ascend; sort them"
        )
        raise ValueError(
            f"{what} goes from {index[at]} to {index[-1 if at + 1 == len(index) else at + 1]} at "
            f"position {at + 1}, expected {how} and drop duplicates."
        )


def parse_time(argument: str, given: object) -> pd.Timestamp:
    """A time that a caller wrote."""
    try:
        return pd.Timestamp(given)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        expected = "expected a time such as '2016-03-13'"
        raise ValueError(
            f"`{argument}` is {shown(given)}, {expected} ({str(error)[:200]})."
        ) from error
