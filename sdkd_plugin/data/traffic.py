"""Readers of measured traffic: the T-GCN csv layout, and which layout a folder holds."""

import re
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch

from sdkd_plugin._checks import check_choice, shown
from sdkd_plugin._explained import explained
from sdkd_plugin.data.sensors import TrafficData

Missing = Literal["none", "zeros", "nan"]
TrafficKind = Literal["los_loop", "csv_pair", "metr_la"]

_LOS_LOOP_SHAPE = (2016, 207)
# tsl's MetrLA opens a folder without a download where either of these sets is complete.
_METR_LA = (
    {"metr_la.h5", "metr_la_dist.npy", "locations.csv"},
    {"metr_la.h5", "distances_la.csv", "sensor_ids_la.txt", "sensor_locations_la.csv"},
)
_DECIMAL = re.compile(r"\d*\.\d*[1-9]\d*")  # a reading; 60.0 may be an id
_EMPTY_CELL = re.compile(r"(^|,)[ \t]*(?=,|$)")


@dataclass(frozen=True)
class TrafficFiles:
    """What `find_traffic` found.

    ``kind`` is ``"los_loop"`` (for `read_los_loop`), ``"csv_pair"`` (for
    `read_csv_pair`) or ``"metr_la"`` (for tsl's ``MetrLA(root=folder)``, without adjacency).
    """

    kind: TrafficKind
    folder: Path
    speed: Path
    adjacency: Path | None = None


@explained
def find_traffic(folder: str | Path) -> TrafficFiles:
    """Which traffic data a folder holds, by the names of its files.

    Known are T-GCN's Los-loop files (``los_speed.csv``, ``los_adj.csv``), any other pair
    ``*speed*.csv`` and ``*adj*.csv``, and the files of tsl's ``MetrLA``.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing known is in it.
        ValueError: if more than one data set is in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected one that holds traffic data.")
    names = sorted(path.name for path in folder.iterdir())
    tables = [name for name in names if name.lower().endswith(".csv")]
    found = [
        TrafficFiles(
            "los_loop" if (speed, adjacency) == ("los_speed.csv", "los_adj.csv") else "csv_pair",
            folder,
            folder / speed,
            folder / adjacency,
        )
        for speed in tables
        for adjacency in tables
        if "speed" in speed.lower() and "adj" in adjacency.lower()
    ]
    if any(layout <= set(names) for layout in _METR_LA):
        found.append(TrafficFiles("metr_la", folder, folder / "metr_la.h5"))
    if len(found) > 1:
        listed = ", ".join(each.speed.name for each in found)
        raise ValueError(f"{folder} holds more than one traffic data set: {listed}, expected one.")
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no known traffic data, expected los_speed.csv with los_adj.csv, "
            "another pair *speed*.csv with *adj*.csv, or tsl's METR-LA: "
            f"{' or '.join(', '.join(sorted(layout)) for layout in _METR_LA)}. Found "
            f"{', '.join(names[:8]) + (', ...' if len(names) > 8 else '') or 'nothing'}."
        )
    return found[0]


@explained
def read_los_loop(folder: str | Path) -> TrafficData:
    """Read Los-loop: one week of METR-LA, 1 to 7 March 2012, 207 sensors, gaps interpolated.

    The folder holds ``los_speed.csv`` and ``los_adj.csv``, and perhaps ``sensor_locations.csv``
    with the columns ``sensor_id``, ``latitude`` and ``longitude``.

    Raises:
        FileNotFoundError: if one of the first two files is absent.
        ValueError: if a file is damaged, or not 2016 steps of 207 sensors.

    Source: Zhao et al., T-GCN, IEEE T-ITS 2019, arXiv 1811.05320; readings of METR-LA from DCRNN,
    Li et al. 2018, arXiv 1707.01926.
    """
    folder = Path(folder)
    speed, adjacency = folder / "los_speed.csv", folder / "los_adj.csv"
    data = read_csv_pair(speed, adjacency, start="2012-03-01", missing="none")
    if (shape := tuple(data.speed.shape)) != _LOS_LOOP_SHAPE:
        raise ValueError(
            f"{speed} has {shape} rows and sensors, expected {_LOS_LOOP_SHAPE}; it is cut short or "
            "not Los-loop. Fetch it again, or read it with `read_csv_pair`."
        )
    places = folder / "sensor_locations.csv"
    return replace(data, positions=_positions(places, data.node_ids)) if places.exists() else data


def _positions(path: Path, node_ids: tuple[str, ...]) -> torch.Tensor:
    """East and north of each sensor, in degrees of latitude."""
    table = pd.read_csv(path, dtype={"sensor_id": str})
    columns = {"sensor_id", "latitude", "longitude"}
    if missing := columns - set(table) or set(node_ids) - set(table["sensor_id"]):
        raise ValueError(
            f"{path} lacks {sorted(missing)[:5]}, expected the columns {sorted(columns)} and a row "
            "for each sensor; correct the file or remove it."
        )
    table = table.drop_duplicates("sensor_id").set_index("sensor_id").loc[list(node_ids)]
    north = table["latitude"].to_numpy(np.float32)
    east = table["longitude"].to_numpy(np.float32) * np.cos(np.deg2rad(north.mean()))
    return torch.from_numpy(np.stack([east, north], 1).astype(np.float32))


@explained
def read_csv_pair(
    speed_csv: str | Path,
    adjacency_csv: str | Path,
    *,
    start: str | datetime,
    missing: Missing,
    freq: str = "5min",
) -> TrafficData:
    r"""Read the T-GCN layout: a csv of speeds and a csv of the weighted adjacency.

    Entry (i, j) of the adjacency becomes the edge i -> j where it is above 0, but for self-loops.

    Args:
        speed_csv: a header of sensor ids, then one row for each step, in miles an hour.
        adjacency_csv: one row of weights for each sensor, no header.
        start: time of the first row. The files do not hold it and it is never guessed.
        missing: how the file marks what was not measured: ``"zeros"``, ``"nan"`` (or an empty
            cell), or ``"none"`` where nothing is missing.
        freq: the step between rows, as pandas writes it.

    Raises:
        FileNotFoundError: if a file is absent.
        ValueError: if a file is damaged, of the wrong shape or negative, or an option is unknown.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "speed.csv").write_text("a,b\n60,0\n55,50\n")
        >>> _ = (folder / "adj.csv").write_text("1,0.5\n0,1\n")
        >>> files = folder / "speed.csv", folder / "adj.csv"
        >>> data = read_csv_pair(*files, start="2012-03-01", missing="zeros")
        >>> data.mask.sum().item(), data.edge_index.tolist()
        (3, [[0], [1]])
    """
    check_choice("missing", missing, get_args(Missing))
    speed_csv, adjacency_csv = Path(speed_csv), Path(adjacency_csv)
    lines = _read_lines(speed_csv)
    header = lines[0]
    ids = tuple(cell.strip().strip('"') for cell in header.split(","))
    if "" in ids or len(set(ids)) != len(ids) or any(map(_DECIMAL.fullmatch, ids)):
        raise ValueError(
            f"{speed_csv}: line 1 is {header[:60]!r}, expected a header of sensor ids, each "
            "different and none a decimal number; add the header."
        )
    speed = _read_numbers(speed_csv, lines, skip=1, gaps=missing == "nan")
    observed: np.ndarray = speed != 0 if missing == "zeros" else ~np.isnan(speed)
    if not observed.any():
        raise ValueError(f"{speed_csv}: every reading is missing, with `missing={missing!r}`.")
    adjacency = _read_numbers(adjacency_csv, _read_lines(adjacency_csv), skip=0, gaps=False)
    if adjacency.shape != (len(ids), len(ids)):
        raise ValueError(
            f"{adjacency_csv} has rows and columns {adjacency.shape}, expected as many of both, "
            f"without a header, as {speed_csv.name} has sensors: {len(ids)}."
        )
    np.fill_diagonal(adjacency, 0.0)
    rows, columns = adjacency.nonzero()
    try:
        index = pd.date_range(pd.Timestamp(start), periods=len(speed), freq=freq)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`start` is {shown(start)} and `freq` is {shown(freq)}, expected a time such as "
            f"'2012-03-01' and a step such as '5min' ({str(error)[:200]})."
        ) from error
    return TrafficData(
        speed=torch.from_numpy(np.where(observed, speed, np.nan).astype(np.float32)),
        mask=torch.from_numpy(observed),
        edge_index=torch.from_numpy(np.stack([rows, columns]).astype(np.int64)),
        edge_weight=torch.from_numpy(adjacency[rows, columns].astype(np.float32)),
        node_ids=ids,
        index=index,
        source=f"T-GCN csv pair {speed_csv.name}, {adjacency_csv.name}",
    )


def _read_numbers(path: Path, lines: list[str], skip: int, gaps: bool) -> np.ndarray:
    """Numbers of at least 0 below ``skip`` header lines; NaN and empty cells only with ``gaps``."""
    lines = [_EMPTY_CELL.sub(r"\1nan", line) for line in lines]
    columns = lines[0].count(",") + 1
    if len(lines) == skip:
        raise ValueError(f"{path} has a header only, expected a row of readings for each step.")
    for number, line in enumerate(lines, start=1):
        if line.count(",") + 1 != columns:
            raise ValueError(
                f"{path}: line {number} has {line.count(',') + 1} cells, expected {columns} as "
                "line 1 has; the file is cut short or damaged, fetch it again."
            )
    try:
        numbers = np.loadtxt(lines[skip:], delimiter=",", ndmin=2, comments=None, quotechar='"')
    except ValueError as error:
        raise ValueError(f"{path}: row and column counted below the header: {error}") from error
    wrong = (numbers < 0) | np.isinf(numbers)
    if not gaps:
        wrong |= np.isnan(numbers)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{path}: line {row + 1 + skip}, column {column + 1} is {numbers[row, column]:g}, "
            "expected a finite number of at least 0; `missing='nan'` allows for speeds that are "
            "NaN or empty."
        )
    return numbers


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
