"""Readers of measured traffic.

What lives here: the T-GCN csv layout (:func:`read_csv_pair`, :func:`read_los_loop`), and
:func:`find_traffic`, which says what a folder holds.
What doesn't: what the readers return (``traffic_data``), tsl's own data sets (the adapters wrap
them), and the simulator for machines without data (``traffic_simulator``).
"""

import io
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sdkd_plugin._checks import check_choice
from sdkd_plugin.data.traffic_data import TrafficData

Missing = Literal["none", "zeros", "nan"]
TrafficKind = Literal["los_loop", "csv_pair", "metr_la"]

LOS_LOOP_START = "2012-03-01"
LOS_LOOP_SHAPE = (2016, 207)

# tsl's MetrLA opens a folder without a download where either of these sets is complete.
_METR_LA_BUILT = ("metr_la.h5", "metr_la_dist.npy", "locations.csv")
_METR_LA_RAW = ("metr_la.h5", "distances_la.csv", "sensor_ids_la.txt", "sensor_locations_la.csv")


@dataclass(frozen=True)
class TrafficFiles:
    """What :func:`find_traffic` found.

    Args:
        kind: ``"los_loop"`` (for :func:`read_los_loop`), ``"csv_pair"`` (for
            :func:`read_csv_pair`) or ``"metr_la"`` (for tsl's ``MetrLA(root=folder)``).
        folder: where the files lie.
        speed: the file of readings.
        adjacency: the file of weights; None for tsl's own layout, which holds distances.
        locations: the file of coordinates, where there is one.
    """

    kind: TrafficKind
    folder: Path
    speed: Path
    adjacency: Path | None = None
    locations: Path | None = None


def find_traffic(folder: str | Path) -> TrafficFiles:
    """Say which traffic data a folder holds, by file names alone.

    Known are T-GCN's Los-loop files (``los_speed.csv``, ``los_adj.csv``), any other pair
    ``*speed*.csv`` and ``*adj*.csv``, and what tsl's ``MetrLA`` keeps in its folder.

    Args:
        folder: the folder to look into, not below it.

    Returns:
        The files and their kind.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing known is in it.
        ValueError: if more than one data set is in it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("los_speed.csv", "los_adj.csv"):
        ...     (folder / name).touch()
        >>> find_traffic(folder).kind
        'los_loop'
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected one that holds traffic data.")
    names = sorted(path.name for path in folder.iterdir())
    found = _csv_pairs(folder, names)
    if any(set(layout) <= set(names) for layout in (_METR_LA_BUILT, _METR_LA_RAW)):
        found.append(TrafficFiles("metr_la", folder, folder / "metr_la.h5"))
    if len(found) > 1:
        listed = ", ".join(each.speed.name for each in found)
        raise ValueError(
            f"{folder} holds more than one traffic data set ({listed}), expected one; move the "
            "others to folders of their own."
        )
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no known traffic data. Looked for los_speed.csv with los_adj.csv; "
            "for another pair *speed*.csv with *adj*.csv; and for tsl's METR-LA, "
            f"{', '.join(_METR_LA_BUILT)} or {', '.join(_METR_LA_RAW)}. "
            f"Found {', '.join(names[:8]) + (', ...' if len(names) > 8 else '') or 'nothing'}."
        )
    return found[0]


def _csv_pairs(folder: Path, names: list[str]) -> list[TrafficFiles]:
    csv = [name for name in names if name.lower().endswith(".csv")]
    speeds = [name for name in csv if "speed" in name.lower()]
    adjacencies = [name for name in csv if "adj" in name.lower()]
    locations = [folder / name for name in csv if "locations" in name.lower()]
    pairs = [
        (speed, adjacency)
        for speed in speeds
        for adjacency in adjacencies
        if speed.lower().replace("speed", "") == adjacency.lower().replace("adj", "")
    ]
    if len(speeds) == len(adjacencies) == 1:
        pairs = [(speeds[0], adjacencies[0])]
    return [
        TrafficFiles(
            "los_loop" if (speed, adjacency) == ("los_speed.csv", "los_adj.csv") else "csv_pair",
            folder,
            folder / speed,
            folder / adjacency,
            locations[0] if len(locations) == 1 else None,
        )
        for speed, adjacency in pairs
    ]


def read_los_loop(folder: str | Path) -> TrafficData:
    """Read Los-loop: one week of METR-LA, 1 to 7 March 2012, 207 sensors, gaps interpolated.

    Args:
        folder: holds ``los_speed.csv``, ``los_adj.csv`` and, if there, ``sensor_locations.csv``.

    Returns:
        2016 steps of five minutes; nothing is missing.

    Raises:
        FileNotFoundError: if a file is absent.
        ValueError: if a file is damaged, or not 2016 steps of 207 sensors.

    Example:
        >>> read_los_loop("empty")
        Traceback (most recent call last):
        FileNotFoundError: empty/los_speed.csv does not exist, expected a csv file; check the path.

    Source:
        Zhao et al., T-GCN, IEEE T-ITS 2019, arXiv 1811.05320; sensors and readings from Jagadish
        et al. 2014 by way of DCRNN, Li et al. 2018, arXiv 1707.01926.
    """
    folder = Path(folder)
    locations = folder / "sensor_locations.csv"
    data = read_csv_pair(
        folder / "los_speed.csv",
        folder / "los_adj.csv",
        locations=locations if locations.exists() else None,
        start=LOS_LOOP_START,
        missing="none",
    )
    if tuple(data.speed.shape) != LOS_LOOP_SHAPE:
        steps, sensors = data.speed.shape
        raise ValueError(
            f"{folder / 'los_speed.csv'} holds {steps} rows of {sensors} sensors, expected "
            f"{LOS_LOOP_SHAPE[0]} rows of {LOS_LOOP_SHAPE[1]}; it is cut short or not Los-loop. "
            "Fetch it again, or read another pair with `read_csv_pair` and its own start."
        )
    return data


def read_csv_pair(
    speed_csv: str | Path,
    adjacency_csv: str | Path,
    *,
    start: str | datetime,
    missing: Missing,
    locations: str | Path | None = None,
    freq: str = "5min",
) -> TrafficData:
    r"""Read the T-GCN layout: a csv of speeds and a csv of the weighted adjacency.

    Entry (i, j) of the adjacency becomes the edge i -> j where it is above 0. Self-loops are
    dropped: a layer that wants them adds its own, and a Laplacian does not see them.

    Args:
        speed_csv: a header of sensor ids, then one row for each step, in miles an hour.
        adjacency_csv: one row of weights for each sensor, no header.
        start: time of the first row. The files do not hold it and it is never guessed.
        missing: how the file marks what was not measured: ``"zeros"``, ``"nan"`` (or an empty
            cell), or ``"none"`` where nothing is missing; then a NaN is an error.
        locations: a csv with the columns ``sensor_id``, ``latitude`` and ``longitude``.
        freq: the step between rows, as pandas writes it.

    Returns:
        The readings as float32; what is missing is NaN and masked out.

    Raises:
        FileNotFoundError: if a file is absent.
        ValueError: if a file is cut short, ragged, not numeric, of the wrong shape or negative, or
            an option is unknown; the message names the file and the place.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "speed.csv").write_text("a,b\n60,0\n55,50\n")
        >>> _ = (folder / "adj.csv").write_text("1,0.5\n0,1\n")
        >>> data = read_csv_pair(
        ...     folder / "speed.csv", folder / "adj.csv", start="2012-03-01", missing="zeros"
        ... )
        >>> data.mask.sum().item(), data.edge_index.tolist()
        (3, [[0], [1]])
    """
    check_choice("missing", missing, get_args(Missing))
    speed_csv, adjacency_csv = Path(speed_csv), Path(adjacency_csv)
    ids, speed = _read_speed(speed_csv)
    observed = _observed(speed_csv, speed, missing)
    adjacency = _read_adjacency(adjacency_csv, len(ids), speed_csv)
    np.fill_diagonal(adjacency, 0.0)
    rows, columns = adjacency.nonzero()
    return TrafficData(
        speed=torch.from_numpy(np.where(observed, speed, np.nan).astype(np.float32)),
        mask=torch.from_numpy(observed),
        edge_index=torch.from_numpy(np.stack([rows, columns]).astype(np.int64)),
        edge_weight=torch.from_numpy(adjacency[rows, columns].astype(np.float32)),
        node_ids=ids,
        index=_regular_index(start, len(speed), freq),
        source=f"T-GCN csv pair {speed_csv.name}, {adjacency_csv.name}",
        positions=None if locations is None else _read_locations(Path(locations), ids),
    )


def _regular_index(start: str | datetime, steps: int, freq: str) -> pd.DatetimeIndex:
    try:
        return pd.date_range(pd.Timestamp(start), periods=steps, freq=freq)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`start` is {start!r} and `freq` is {freq!r}, expected a time such as '2012-03-01' "
            f"and a step such as '5min' ({error})."
        ) from error


def _read_speed(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    lines = _read_lines(path)
    ids = tuple(cell.strip().strip('"') for cell in lines[0].split(","))
    if "" in ids or len(set(ids)) != len(ids) or any(_is_reading(cell) for cell in ids):
        raise ValueError(
            f"{path}: line 1 is {lines[0][:60]!r}, expected a header of sensor ids, each different "
            "and none a decimal number; add the header."
        )
    if len(lines) == 1:
        raise ValueError(f"{path} has a header only, expected a row of readings for each step.")
    speed = _parse(path, lines, header=1)
    bad = np.argwhere((speed < 0) | np.isinf(speed))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{path}: line {row + 2}, column {column + 1} is {speed[row, column]:g}, expected a "
            "finite speed of at least 0; write missing readings as 0 or leave them empty."
        )
    return ids, speed


def _is_reading(cell: str) -> bool:
    """A decimal number in the header is a reading: the file has no header."""
    try:
        return not float(cell).is_integer()
    except (ValueError, OverflowError):
        return False


def _observed(path: Path, speed: np.ndarray, missing: Missing) -> np.ndarray:
    gaps = np.isnan(speed)
    if missing != "nan" and gaps.any():
        row, column = np.argwhere(gaps)[0]
        raise ValueError(
            f"{path}: {gaps.sum()} readings are NaN or empty, first in line {row + 2}, column "
            f"{column + 1}, expected none with `missing={missing!r}`; pass `missing='nan'`."
        )
    observed: np.ndarray = speed != 0 if missing == "zeros" else ~gaps
    if not observed.any():
        raise ValueError(f"{path}: every reading is missing, with `missing={missing!r}`.")
    return observed


def _read_adjacency(path: Path, sensors: int, speed_csv: Path) -> np.ndarray:
    lines = _read_lines(path)
    shape = (len(lines), lines[0].count(",") + 1)
    if shape != (sensors, sensors):
        raise ValueError(
            f"{path} has {shape[0]} rows of {shape[1]} columns, expected {sensors} of {sensors} "
            f"without a header, for the {sensors} sensors of {speed_csv.name}."
        )
    weights = _parse(path, lines, header=0)
    bad = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{path}: line {row + 1}, column {column + 1} is {weights[row, column]:g}, expected a "
            "finite weight of at least 0; weights are similarities, 0 where there is no edge."
        )
    return weights


def _read_locations(path: Path, ids: tuple[str, ...]) -> Tensor:
    rows = [line.split(",") for line in _read_lines(path)]
    wanted = ("sensor_id", "latitude", "longitude")
    header = [cell.strip() for cell in rows[0]]
    if not set(wanted) <= set(header):
        raise ValueError(f"{path} has the columns {header}, expected {list(wanted)}.")
    name, north, east = (header.index(column) for column in wanted)
    try:
        places = {row[name].strip(): (float(row[east]), float(row[north])) for row in rows[1:]}
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is cut short or has a coordinate that is not a number, expected numbers in "
            f"`latitude` and `longitude` ({error})."
        ) from error
    absent = [each for each in ids if each not in places]
    if absent:
        raise ValueError(
            f"{path} lacks {len(absent)} of {len(ids)} sensors, first {absent[0]!r}; add them or "
            "pass `locations=None`."
        )
    return torch.tensor([places[each] for each in ids], dtype=torch.float32)


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a csv file; check the path.")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text, expected a csv file in UTF-8 ({error}).") from error
    if not lines:
        raise ValueError(f"{path} is empty, expected a csv file.")
    return lines


def _parse(path: Path, lines: list[str], header: int) -> np.ndarray:
    columns = lines[0].count(",") + 1
    # pandas pads a short row with NaN without a word, so the cells are counted first.
    for number, line in enumerate(lines, start=1):
        if line.count(",") + 1 != columns:
            raise ValueError(
                f"{path}: line {number} has {line.count(',') + 1} cells, expected {columns} as "
                "line 1 has; the file is cut short or damaged, fetch it again."
            )
    body = io.StringIO("\n".join(lines[header:]))
    try:
        frame = pd.read_csv(body, header=None, skip_blank_lines=False, dtype=np.float64)
        return frame.to_numpy(copy=True)
    except ValueError:
        body.seek(0)
        cells = pd.read_csv(body, header=None, skip_blank_lines=False, dtype=str)
    bad = cells.notna() & cells.apply(pd.to_numeric, errors="coerce").isna()
    row, column = np.argwhere(bad.to_numpy())[0]
    raise ValueError(
        f"{path}: line {row + 1 + header}, column {column + 1} is {cells.iat[row, column]!r}, "
        "expected a number."
    )
