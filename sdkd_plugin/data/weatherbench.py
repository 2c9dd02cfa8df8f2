"""Reading WeatherBench: global weather on a grid of latitudes and longitudes.

Here live the reader of its netCDF folders (WeatherBench 1) and zarr stores (WeatherBench 2), and
what it returns. Errors weighted by area are in `latitude`; regridding, normalising and windows are
the caller's. xarray is imported by the reader alone: it is the optional extra ``weather``.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_finite, check_positive_int, check_shape

# The names that WeatherBench 1, WeatherBench 2 and the files of the ERA5 archive give their axes.
_AXES = {
    "time": ("time", "valid_time"),
    "level": ("level", "pressure_level"),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "longitude"),
}
_ZARR_MARKERS = (".zmetadata", ".zgroup", "zarr.json")
# What xarray and its backends raise for a file that is cut off or is something else.
_UNREADABLE = (OSError, ValueError, LookupError, RuntimeError, TypeError)
_INSTALL = "pip install 'sdkd_plugin[weather]'"


@dataclass(frozen=True, eq=False, kw_only=True)
class WeatherData:
    """Weather on a global grid, in equal steps of time.

    Args:
        fields: float32 ``(time, channels, lat, lon)``; rows go from south to north, columns
            eastwards from ``longitude[0]``.
        latitude: degrees north of each row, ascending.
        longitude: degrees east of each column, ascending.
        index: the time of each field (UTC), in equal steps.
        channels: the name of each channel: that of a variable, with ``_<level>`` where it has one.
        units: the unit of each channel as the files have it, empty where they have none.

    Raises:
        ValueError: if shapes do not match, fields are not finite, or coordinates or times are not
            in that order.
    """

    fields: Float[Tensor, "time channels lat lon"]
    latitude: Float[Tensor, " lat"]
    longitude: Float[Tensor, " lon"]
    index: pd.DatetimeIndex
    channels: tuple[str, ...]
    units: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = (len(self.index), len(self.channels), len(self.latitude), len(self.longitude))
        why = "the times of `index`, then `channels`, `latitude`, `longitude`"
        check_shape("fields", self.fields.shape, sizes, why)
        if len(self.units) != len(self.channels):
            raise ValueError(
                f"`units` has {len(self.units)} entries, expected {len(self.channels)}, one for "
                "each channel; leave unknown ones empty."
            )
        for channel, name in enumerate(self.channels):
            check_finite(f"fields[:, {channel}] ({name})", self.fields[:, channel])
        for argument, degrees in (("latitude", self.latitude), ("longitude", self.longitude)):
            if not bool((degrees.diff() > 0).all()):
                raise ValueError(
                    f"`{argument}` does not ascend (it goes from {float(degrees[0]):g} to "
                    f"{float(degrees[-1]):g} degrees); flip or roll it, and the fields with it."
                )
        _check_steps(self.index)


class _Piece(NamedTuple):
    """A variable's part in one file or store, not loaded yet; its axes have `_AXES`'s names."""

    source: str
    array: Any
    times: pd.DatetimeIndex


def read_weatherbench(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    variables: Mapping[str, Sequence[int] | None],
    *,
    start: str | None = None,
    stop: str | None = None,
    every: int = 1,
) -> WeatherData:
    """Read some variables, levels and times of WeatherBench; nothing else is loaded.

    WeatherBench 1 is folders of netCDF files, one for each variable and year, such as
    ``2m_temperature_5.625deg/2m_temperature_2017_5.625deg.nc``. WeatherBench 2 is zarr stores that
    hold all variables. Axes are found by their names, in whatever order and direction they are
    stored, and come out as (time, channels, lat, lon), south to north.

    Args:
        paths: a netCDF file, a folder (all ``*.nc`` in it and below), a zarr store, or several of
            these; a name with ``://`` is a zarr store that xarray opens through fsspec.
        variables: names as in the files (``t2m``, ``z``; ``2m_temperature``, ``geopotential``),
            each with its pressure levels in hPa; None stands for all of its levels, and for a
            variable without levels. Channels come in this order.
        start: first time, such as ``"2017"`` or ``"2017-01-01 06:00"``; None is the first there is.
        stop: last time, itself included: ``"2018"`` reaches to the end of that year.
        every: take every so many times, 6 for six-hourly out of hourly data.

    Returns:
        The chosen fields, in float32.

    Raises:
        ImportError: if xarray is not installed.
        FileNotFoundError: if a file, folder or store is absent or a folder holds no netCDF file.
        ValueError: if a file is damaged; if there is no such variable (listing those there are),
            level (likewise) or time; if times repeat, do not ascend or have gaps; if variables
            or files differ in times, grid or units; if values are NaN or Inf.

    Example:
        >>> import tempfile, xarray
        >>> hours = pd.date_range("2017-01-01", periods=12, freq="h")
        >>> axes = {"time": hours, "lat": [-45.0, 45.0], "lon": [0.0, 90.0, 180.0, 270.0]}
        >>> t2m = xarray.DataArray(np.ones((12, 2, 4)), axes, attrs={"units": "K"}, name="t2m")
        >>> file = Path(tempfile.mkdtemp()) / "2m_temperature_2017_5.625deg.nc"
        >>> _ = t2m.to_netcdf(file, engine="h5netcdf")
        >>> data = read_weatherbench(file, {"t2m": None}, every=6)
        >>> data.fields.shape, data.units
        (torch.Size([2, 1, 2, 4]), ('K',))

    Source:
        Rasp et al., WeatherBench, JAMES 2020, arXiv 2002.00469, and WeatherBench 2, JAMES 2024,
        arXiv 2308.15560.
    """
    check_positive_int("every", every)
    if not variables:
        raise ValueError("`variables` is empty, expected names such as {'t2m': None, 'z': [500]}.")
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    sources = [source for path in given for source in _sources(path)]
    if not sources:
        raise ValueError("`paths` is empty, expected at least one file, folder or store.")
    with ExitStack() as opened:
        datasets = {
            str(source): opened.enter_context(_open(source, engine)) for source, engine in sources
        }
        chosen: dict[str, list[_Piece]] = {}
        for name in variables:
            pieces = _pieces(name, datasets)
            chosen[name] = _select_times(name, pieces, start, stop, every)
        _check_alike(chosen)
        return _load(chosen, variables)


def _sources(path: str | os.PathLike[str]) -> list[tuple[str | Path, str | None]]:
    """Files and stores below a path, each with xarray's engine; None lets xarray find it."""
    if "://" in str(path):
        return [(str(path), "zarr")]
    path = Path(path)
    if path.is_file():
        return [(path, None)]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist, expected a netCDF file, a folder of them or a zarr store."
        )
    if path.suffix == ".zarr" or any((path / marker).exists() for marker in _ZARR_MARKERS):
        return [(path, "zarr")]
    files = sorted(path.rglob("*.nc"))
    if not files:
        raise FileNotFoundError(f"{path} holds no file *.nc and is no zarr store.")
    return [(file, None) for file in files]


def _open(source: str | Path, engine: str | None) -> Any:
    try:
        xarray = importlib.import_module("xarray")
    except ImportError as error:
        raise ImportError(f"reading WeatherBench needs xarray: {_INSTALL}") from error
    try:
        # Without chunks xarray needs no dask, and still reads what is indexed and no more. Wave
        # periods are in seconds, and no time differences.
        return xarray.open_dataset(source, engine=engine, chunks=None, decode_timedelta=False)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{source} cannot be read: {reason}. Fetch it again if it is damaged; netCDF and zarr "
            f"need {_INSTALL}."
        ) from error


def _pieces(name: str, datasets: Mapping[str, Any]) -> list[_Piece]:
    found = {source: data[name] for source, data in datasets.items() if name in data.data_vars}
    if not found:
        there = sorted({str(each) for data in datasets.values() for each in data.data_vars})
        raise ValueError(f"`variables` has {name!r}, expected some of {there}.")
    return [_piece(name, source, array) for source, array in found.items()]


def _piece(name: str, source: str, array: Any) -> _Piece:
    names = {
        alias: axis
        for axis, aliases in _AXES.items()
        for alias in aliases
        if alias in array.dims or alias in array.coords
    }
    array = array.rename({old: new for old, new in names.items() if old != new})
    axes = set(array.dims)
    if axes - {"level"} != {"time", "lat", "lon"}:
        raise ValueError(
            f"{source}: {name!r} has the axes {list(array.dims)}, expected time, lat and lon, and "
            "perhaps level; constants and forecasts by lead time are not read."
        )
    absent = axes - set(array.indexes)
    if absent:
        raise ValueError(f"{source}: the axes {sorted(absent)} of {name!r} have no coordinates.")
    times = array.indexes["time"]
    if not isinstance(times, pd.DatetimeIndex) or not len(times):
        raise ValueError(
            f"{source}: {len(times)} times of type {times.dtype}, expected dates of the standard "
            "calendar."
        )
    _check_ascending(source, times)
    if array.sizes["lat"] > 1 and array["lat"][0] > array["lat"][-1]:
        array = array.isel(lat=slice(None, None, -1))
    return _Piece(source, array, times)


def _check_ascending(source: str, times: pd.DatetimeIndex) -> None:
    wrong = ~(np.diff(times.to_numpy()) > np.timedelta64(0))  # NaT is wrong, too
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"{source}: time goes from {times[at]} to {times[at + 1]}, expected times that ascend "
            "and do not repeat; sort them and drop duplicates."
        )


def _select_times(
    name: str, pieces: list[_Piece], start: str | None, stop: str | None, every: int
) -> list[_Piece]:
    """The pieces in order of time, cut to the times wanted; those without any are left out."""
    pieces = sorted(pieces, key=lambda piece: piece.times[0])
    for one, other in pairwise(pieces):
        if other.times[0] <= one.times[-1]:
            raise ValueError(
                f"{name!r} is in {one.source} until {one.times[-1]} and in {other.source} from "
                f"{other.times[0]}, expected files that do not overlap; name the ones you mean."
            )
    selected, skip = [], 0
    for piece in pieces:
        try:
            bounds = piece.times.slice_indexer(start, stop)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`start` is {start!r} and `stop` is {stop!r}, expected times such as '2017' or "
                f"'2017-01-01 06:00' ({error})."
            ) from error
        wanted = range(len(piece.times))[bounds]
        # Steps go on across files, whatever their lengths.
        taken = slice(wanted.start + skip, wanted.stop, every)
        skip = (skip - len(wanted)) % every
        cut = _Piece(piece.source, piece.array.isel(time=taken), piece.times[taken])
        if len(cut.times):
            selected.append(cut)
    if not selected:
        raise ValueError(
            f"`start` is {start!r} and `stop` is {stop!r}, expected times from "
            f"{pieces[0].times[0]} to {pieces[-1].times[-1]}, which {name!r} has."
        )
    return selected


def _times(pieces: list[_Piece]) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(np.concatenate([piece.times.to_numpy() for piece in pieces]))


def _check_steps(index: pd.DatetimeIndex) -> None:
    steps = np.diff(index.to_numpy())
    wrong = (steps != steps[:1]) | ~(steps > np.timedelta64(0))
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"`index` steps by {index[1] - index[0]} and then from {index[at]} to {index[at + 1]}, "
            "expected equal steps forward; read the periods before and after a gap apart, with "
            "`start` and `stop`."
        )


def _check_alike(chosen: Mapping[str, list[_Piece]]) -> None:
    """Refuse variables of other times or units, or on another grid, than the rest."""
    (first, reference), *_ = chosen.items()
    index = _times(reference)
    _check_steps(index)
    for name, pieces in chosen.items():
        times = _times(pieces)
        if not times.equals(index):
            raise ValueError(
                f"{name!r} has {len(times)} times from {times[0]} to {times[-1]} and {first!r} "
                f"{len(index)} from {index[0]} to {index[-1]}, expected the same; narrow `start` "
                "and `stop`, or add the missing files."
            )
        for piece in pieces:
            for axis in ("lat", "lon"):
                got = piece.array[axis].to_numpy()
                expected = reference[0].array[axis].to_numpy()
                if got.shape != expected.shape or not np.allclose(got, expected):
                    raise ValueError(
                        f"{piece.source} has {len(got)} points from {got[0]:g} to {got[-1]:g} "
                        f"along {axis}, and {reference[0].source} {len(expected)} from "
                        f"{expected[0]:g} to {expected[-1]:g}, expected one grid; regrid one."
                    )
            if ("level" in piece.array.dims) != ("level" in pieces[0].array.dims):
                raise ValueError(
                    f"{piece.source} has {name!r} on the axes {list(piece.array.dims)} and "
                    f"{pieces[0].source} on {list(pieces[0].array.dims)}, expected the same."
                )
            if _unit(piece) != _unit(pieces[0]):
                raise ValueError(
                    f"{piece.source} has {name!r} in {_unit(piece)!r} and {pieces[0].source} in "
                    f"{_unit(pieces[0])!r}, expected one unit."
                )


def _unit(piece: _Piece) -> str:
    return str(piece.array.attrs.get("units", ""))


def _load(
    chosen: Mapping[str, list[_Piece]], variables: Mapping[str, Sequence[int] | None]
) -> WeatherData:
    levels = {name: _levels(name, pieces[0], variables[name]) for name, pieces in chosen.items()}
    reference = next(iter(chosen.values()))
    index = _times(reference)
    lat, lon = (_degrees(reference[0].array[axis]) for axis in ("lat", "lon"))
    # Filled piece by piece, so that no second copy of everything is ever held.
    n_channels = sum(len(each) for each in levels.values())
    fields = torch.empty(len(index), n_channels, len(lat), len(lon))
    channel = 0
    for name, pieces in chosen.items():
        channels = slice(channel, channel + len(levels[name]))
        channel = channels.stop
        row = 0
        for piece in pieces:
            rows = slice(row, row + len(piece.times))
            row = rows.stop
            array = piece.array
            if "level" in array.dims:
                array = array.sel(level=_levels(name, piece, levels[name]))
            else:
                array = array.expand_dims("level")
            array = array.transpose("time", "level", "lat", "lon")
            fields[rows, channels] = torch.from_numpy(_values(piece.source, array))
    return WeatherData(
        fields=fields,
        latitude=lat,
        longitude=lon,
        index=index,
        channels=tuple(
            name if level is None else f"{name}_{level:g}"
            for name in chosen
            for level in levels[name]
        ),
        units=tuple(_unit(chosen[name][0]) for name in chosen for _ in levels[name]),
    )


def _levels(name: str, piece: _Piece, wanted: Sequence[int] | None) -> list[Any]:
    """The levels to read, all of them for None; [None] where the variable has none."""
    there = piece.array.coords.get("level")
    present = [] if there is None else np.atleast_1d(there.to_numpy()).tolist()
    if wanted is None:
        return present or [None]
    if not present:
        raise ValueError(
            f"`variables` asks for levels {list(wanted)} of {name!r}, which has none in "
            f"{piece.source}; pass None."
        )
    if not wanted or set(wanted) - set(present):
        raise ValueError(
            f"`variables` asks for levels {list(wanted)} of {name!r}, expected some of {present}, "
            f"which {piece.source} has."
        )
    return list(wanted)


def _values(source: str, array: Any) -> np.ndarray:
    try:
        return np.ascontiguousarray(array.to_numpy(), dtype=np.float32)
    except _UNREADABLE as error:
        raise ValueError(f"{source} cannot be read: {error}. Fetch it again.") from error


def _degrees(coordinate: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(coordinate.to_numpy(), dtype=np.float32))
