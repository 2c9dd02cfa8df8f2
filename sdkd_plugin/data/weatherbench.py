"""Reading WeatherBench, global weather on grids of latitudes and longitudes, through xarray.

xarray and zarr are imported by the reader alone: they are the optional extra ``weather``.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sdkd_plugin._checks import check_finite, check_positive_int, check_shape
from sdkd_plugin._explained import explained
from sdkd_plugin._files import PathLike
from sdkd_plugin._plain import reading
from sdkd_plugin.data.reading import check_index, check_size, files_at, given_paths

# The names that WeatherBench 1, WeatherBench 2 and the files of the ERA5 archive give their axes.
_AXES = {"valid_time": "time", "pressure_level": "level", "latitude": "lat", "longitude": "lon"}
_ZARR_MARKERS = (".zmetadata", ".zgroup", "zarr.json")
_INSTALL = "pip install 'sdkd_plugin[weather]'"


@explained
@dataclass(frozen=True, eq=False, kw_only=True)
class WeatherData:
    """Weather on a global grid, in equal steps of time.

    Args:
        fields: float32, rows from south to north, columns eastwards from ``longitude[0]``.
        latitude: degrees north of each row, ascending.
        longitude: degrees east of each column, ascending.
        index: the time of each field (UTC), in equal steps.
        channels: the variable of each channel, with ``_<level>`` where it has one.
        units: the unit of each channel as the files have it, empty where they have none.

    Raises:
        ValueError: if the data are not so.
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
        check_shape("units", (len(self.units),), sizes[1:2], "one a channel, empty if unknown")
        for channel, name in enumerate(self.channels):
            check_finite(f"fields[:, {channel}] ({name})", self.fields[:, channel])
        for argument, degrees in (("latitude", self.latitude), ("longitude", self.longitude)):
            if not bool((degrees.diff() > 0).all()):
                raise ValueError(f"`{argument}` does not ascend; flip or roll it and the fields.")
        check_index("`index`", self.index, equal_steps=True)


@explained
def read_weatherbench(
    paths: PathLike | Sequence[PathLike],
    variables: Mapping[str, Sequence[int] | None],
    *,
    start: str | None = None,
    stop: str | None = None,
    every: int = 1,
) -> WeatherData:
    """Read some variables, levels and times of WeatherBench; nothing else is loaded.

    WeatherBench 1 is folders of netCDF files, one for each variable and year, WeatherBench 2 zarr
    stores. Axes are found by their names, in any order and direction. Nothing in a store is
    executed: a pickle filter is refused. So is a netCDF variable of over 256 MiB and over 100 times
    its file's size.

    Args:
        paths: a netCDF file, a folder (all ``*.nc`` in it and below), a zarr store, or several of
            these; a name with ``://`` is a zarr store that is opened through fsspec.
        variables: names as in the files (``t2m``, ``z``; ``2m_temperature``, ``geopotential``),
            each with its pressure levels in hPa; None reads all of its levels, and a variable
            without levels. Channels come in this order.
        start: first time, such as ``"2017"`` or ``"2017-01-01 06:00"``; None is the earliest.
        stop: last time, inclusive: ``"2018"`` reaches to the end of that year.
        every: read every so many times, 6 for six-hourly out of hourly data.

    Raises:
        ImportError: if xarray or zarr 3 is not installed.
        FileNotFoundError: if a file, folder or store is absent or a folder holds no netCDF file.
        ValueError: if a file is damaged; if there is no such variable, level or time; if times
            have gaps or do not ascend; if files differ in times, grid or units; if values are not
            finite numbers.

    Example:
        >>> import tempfile, xarray
        >>> hours = pd.date_range("2017-01-01", periods=12, freq="h")
        >>> axes = {"time": hours, "lat": [-45.0, 45.0], "lon": [0.0, 90.0, 180.0, 270.0]}
        >>> t2m = xarray.DataArray(np.ones((12, 2, 4)), axes, name="t2m")
        >>> file = Path(tempfile.mkdtemp()) / "2m_temperature_2017_5.625deg.nc"
        >>> _ = t2m.to_netcdf(file, engine="h5netcdf")
        >>> read_weatherbench(file, {"t2m": None}, every=6).fields.shape
        torch.Size([2, 1, 2, 4])

    Source: Rasp et al., WeatherBench, JAMES 2020, arXiv 2002.00469, and WeatherBench 2, JAMES
    2024, arXiv 2308.15560.
    """
    check_positive_int("every", every)
    if not variables:
        raise ValueError("`variables` is empty, expected names such as {'t2m': None, 'z': [500]}.")
    sources = [source for path in given_paths(paths) for source in _sources(path)]
    with ExitStack() as opened:
        datasets = {source: opened.enter_context(_open(source)) for source in sources}
        chosen = [
            _load(name, levels, datasets, start, stop, every) for name, levels in variables.items()
        ]
    with reading(f"{', '.join(variables)} together", "WeatherBench"):
        xarray = importlib.import_module("xarray")
        xarray.align(*chosen, join="exact", copy=False, exclude="level")
    grid, channels = chosen[0], [(array, level) for array in chosen for level in _levels(array)]
    return WeatherData(
        fields=torch.from_numpy(np.concatenate([array.to_numpy() for array in chosen], axis=1)),
        latitude=torch.from_numpy(grid["lat"].to_numpy()),
        longitude=torch.from_numpy(grid["lon"].to_numpy()),
        index=grid.indexes["time"],
        channels=tuple(f"{a.name}_{n:g}" if n is not None else str(a.name) for a, n in channels),
        units=tuple(str(array.attrs["units"]) for array, _ in channels),
    )


def _sources(path: PathLike) -> list[str]:
    """The files and zarr stores at a path."""
    folder = Path(path)
    is_store = folder.suffix == ".zarr" or any((folder / each).exists() for each in _ZARR_MARKERS)
    if "://" in str(path) or (folder.is_dir() and is_store):
        return [str(path)]
    return [str(file) for file in files_at(path, "**/*.nc", "a netCDF file, a zarr store")]


def _open(source: str) -> Any:
    is_zarr = not Path(source).is_file()
    try:
        xarray = importlib.import_module("xarray")
        zarr = importlib.import_module("zarr") if is_zarr else None
    except ImportError as error:
        raise ImportError(f"reading WeatherBench needs {error.name}: {_INSTALL}") from error
    if zarr and int(zarr.__version__.split(".")[0]) < 3:
        raise ImportError(f"zarr {zarr.__version__} runs pickle filters, zarr 3 needed: {_INSTALL}")
    with reading(source, f"WeatherBench (netCDF and zarr need {_INSTALL})"):
        if zarr:
            for name, array in zarr.open_group(source, mode="r").arrays():
                if "pickle" in str((array.filters, array.compressors)).lower():
                    raise ValueError(f"{name} has a pickle filter, which would run code")
        # Without chunks xarray needs no dask and still reads only what is indexed. Wave periods
        # are in seconds and are not time differences.
        return xarray.open_dataset(
            source, engine="zarr" if zarr else None, chunks=None, decode_timedelta=False
        )


def _load(
    name: str,
    levels: Sequence[int] | None,
    datasets: Mapping[str, Any],
    start: str | None,
    stop: str | None,
    every: int,
) -> Any:
    """A variable at the levels and times wanted, from all files that hold it, in float32."""
    pieces = {
        source: _normalised(name, source, data[name])
        for source, data in datasets.items()
        if name in data.data_vars
    }
    if not pieces:
        there = sorted({str(each) for data in datasets.values() for each in data.data_vars})
        raise ValueError(f"`variables` has {name!r}, expected some of {there}.")
    pieces = dict(sorted(pieces.items(), key=lambda piece: piece[1].indexes["time"][0]))
    what = f"time of {name!r} in {', '.join(pieces)}"
    index = pd.DatetimeIndex(np.concatenate([each["time"].to_numpy() for each in pieces.values()]))
    check_index(what, index)
    try:
        times = index[index.slice_indexer(start, stop)][::every]
        if not len(times):
            raise ValueError("none is there")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`start` is {start!r} and `stop` is {stop!r}, expected times such as '2017' or "
            f"'2017-01-01 06:00' from {index[0]} to {index[-1]} ({error})."
        ) from error
    check_index(what, times, equal_steps=True)
    chosen = []
    for source, array in pieces.items():
        at = np.flatnonzero(array.indexes["time"].isin(times))
        if len(at):
            array = _at_levels(source, array, levels).isel(time=slice(at[0], at[-1] + 1, every))
            with reading(source, "WeatherBench"):
                chosen.append(array.astype(np.float32).load())
    with reading(", ".join(pieces), f"one variable {name!r}"):
        xarray = importlib.import_module("xarray")
        how = {"join": "exact", "combine_attrs": "identical", "coords": "minimal"}
        return xarray.concat(chosen, "time", compat="equals", **how)


def _normalised(name: str, source: str, array: Any) -> Any:
    """The array with our names of axes, from south to north, with its unit as only attribute."""
    there = {*array.dims, *array.coords}
    array = array.rename({old: new for old, new in _AXES.items() if old in there})
    axes, times = set(array.dims), array.indexes.get("time")
    if (
        axes - {"level"} != {"time", "lat", "lon"}
        or not axes <= set(array.indexes)
        or not isinstance(times, pd.DatetimeIndex)
        or not len(times)
        or array.dtype.kind not in "fiu"
    ):
        raise ValueError(
            f"{source}: {name!r} is {array.dtype} along {dict(array.sizes)} with coordinates "
            f"{sorted(array.indexes)}, expected numbers along time, lat, lon and perhaps level, "
            "with coordinates and dates of the standard calendar; constants and forecasts by lead "
            "time are not read."
        )
    if Path(source).is_file():
        with reading(source, "WeatherBench"):
            check_size(Path(source), array.nbytes)
    if array["lat"][0] > array["lat"][-1]:
        array = array.isel(lat=slice(None, None, -1))
    kept = {"time", "level", "lat", "lon"} & set(array.coords)
    array = array.drop_vars(set(array.coords) - kept)
    array.attrs = {"units": array.attrs.get("units", "")}
    return array.assign_coords({axis: array[axis].astype(np.float32) for axis in ("lat", "lon")})


def _at_levels(source: str, array: Any, wanted: Sequence[int] | None) -> Any:
    """The array as (time, level, lat, lon) at some levels, or at all of them for None."""
    present = _levels(array)
    if wanted is not None and (not wanted or set(wanted) - set(present)):
        raise ValueError(
            f"`variables` asks for levels {list(wanted)} of {array.name!r}, expected some of "
            f"{present}, which {source} has; give None for a variable without levels."
        )
    if "level" not in array.dims:
        array = array.expand_dims("level")
    elif wanted is not None:
        array = array.sel(level=list(wanted))
    return array.transpose("time", "level", "lat", "lon")


def _levels(array: Any) -> list[Any]:
    """The levels of a variable; [None] where it has none."""
    return np.atleast_1d(array["level"]).tolist() if "level" in array.coords else [None]


@explained
def latitude_weighted_rmse(
    forecast: Float[Tensor, "*times channels lat lon"],
    truth: Float[Tensor, "*times channels lat lon"],
    latitude: Float[Tensor, " lat"],
) -> Float[Tensor, " channels"]:
    """The root mean square error of each channel, with grid cells weighted by their areas.

    ``sqrt(mean over times, lat, lon of w_lat (forecast - truth)^2)``, w_i the area of a cell over
    the mean area, ``~ sin(upper edge of row i) - sin(lower edge)``, edges halfway between rows and
    at the poles. The mean over times is under the root, as in WeatherBench 2. ``latitude`` is
    degrees north of each row, ascending as in `WeatherData`.

    Raises:
        ValueError: if shapes do not match, or latitudes do not ascend from -90 to 90.

    Example:
        >>> truth = torch.zeros(5, 1, 2, 4)
        >>> latitude_weighted_rmse(truth + 3, truth, torch.tensor([-45.0, 45.0]))
        tensor([3.])

    Source: Rasp et al., WeatherBench 2, arXiv 2308.15560, section 3.
    """
    check_shape("truth", truth.shape, forecast.shape, "as `forecast` has")
    check_shape("latitude", latitude.shape, forecast.shape[-2:-1], "one for each row")
    pole = latitude.new_tensor([90.0])
    steps = torch.cat([-pole, latitude, pole]).diff()
    if not bool((steps[1:-1] > 0).all() and (steps >= 0).all()):
        raise ValueError(f"`latitude` is {latitude.tolist()}, expected ascending, from -90 to 90.")
    edges = torch.cat([-pole, (latitude[1:] + latitude[:-1]) / 2, pole]).double()
    areas = torch.sin(edges * math.pi / 180).diff().to(forecast)
    squares = (areas / areas.mean())[:, None] * (forecast - truth).square()
    return squares.mean((-2, -1)).reshape(-1, forecast.shape[-3]).mean(0).sqrt()
