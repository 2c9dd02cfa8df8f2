"""WeatherBench's netCDF folders and zarr stores, written as the published ones are."""

import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from sdkd_plugin.data import WeatherData, latitude_weighted_rmse, read_weatherbench

LATITUDE = np.linspace(-78.75, 78.75, 8)  # 22.5 degrees, made as WeatherBench's grids are
LONGITUDE = np.arange(16) * 22.5
LEVELS = [50, 500, 850]


class Exploit:
    """Would make a folder if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def hours(start: str, periods: int, step: str = "h") -> pd.DatetimeIndex:
    return pd.date_range(start, periods=periods, freq=step)


def surface(times: pd.DatetimeIndex, name: str = "t2m", seed: int = 0) -> xr.DataArray:
    values = np.random.default_rng(seed).normal(280, 10, (len(times), 8, 16)).astype(np.float32)
    axes = {"time": times, "lat": LATITUDE, "lon": LONGITUDE}
    return xr.DataArray(values, axes, name=name, attrs={"units": "K"})


def pressure(times: pd.DatetimeIndex, name: str = "z", seed: int = 1) -> xr.DataArray:
    values = np.random.default_rng(seed).normal(0, 1e4, (len(times), 3, 8, 16)).astype(np.float32)
    axes = {"time": times, "level": np.int32(LEVELS), "lat": LATITUDE, "lon": LONGITUDE}
    return xr.DataArray(values, axes, name=name, attrs={"units": "m**2 s**-2"})


def write_year(root: Path, variable: str, array: xr.DataArray, year: str) -> Path:
    folder = root / f"{variable}_5.625deg"
    folder.mkdir(exist_ok=True)
    array.to_netcdf(folder / f"{variable}_{year}_5.625deg.nc", engine="h5netcdf")
    return folder


@pytest.fixture
def weatherbench1(tmp_path: Path) -> tuple[Path, xr.DataArray, xr.DataArray]:
    """The turn of a year, in two files for each of two variables."""
    times = hours("2016-12-31 14:00", 20)
    t2m, z = surface(times), pressure(times)
    for array, variable in ((t2m, "2m_temperature"), (z, "geopotential")):
        for year in ("2016", "2017"):
            write_year(tmp_path, variable, array.sel(time=year), year)
    return tmp_path, t2m, z


def weatherbench2(folder: Path, times: pd.DatetimeIndex, **encoding: Any) -> xr.Dataset:
    """Longitude before latitude, and north before south, as in some of the published stores."""
    data = xr.Dataset(
        {
            "2m_temperature": surface(times, "2m_temperature"),
            "geopotential": pressure(times, "geopotential"),
        }
    )
    stored = data.rename(lat="latitude", lon="longitude").isel(latitude=slice(None, None, -1))
    stored = stored.transpose("time", "level", "longitude", "latitude")
    stored.to_zarr(folder, zarr_format=2, encoding=encoding)
    return data


def test_netcdf_folders(weatherbench1: tuple[Path, xr.DataArray, xr.DataArray]) -> None:
    root, t2m, z = weatherbench1
    read = read_weatherbench(root, {"z": [850, 500], "t2m": None})
    assert read.fields.dtype == torch.float32
    assert read.channels == ("z_850", "z_500", "t2m")
    assert read.units == ("m**2 s**-2", "m**2 s**-2", "K")
    assert read.index.equals(t2m.indexes["time"])
    expected = np.stack([z.sel(level=850), z.sel(level=500), t2m], axis=1)
    assert np.array_equal(read.fields.numpy(), expected)
    assert np.array_equal(read.latitude.numpy(), LATITUDE.astype(np.float32))
    assert np.array_equal(read.longitude.numpy(), LONGITUDE.astype(np.float32))


@pytest.mark.parametrize(
    ("start", "stop", "every"),
    [
        (None, None, 6),
        (None, None, 7),
        ("2016-12-31 20:00", "2017-01-01 03:00", 1),
        ("2017", None, 3),
        (None, "2016", 4),
        (None, None, 13),
    ],
)
def test_times_are_chosen_across_files(
    weatherbench1: tuple[Path, xr.DataArray, xr.DataArray],
    start: str | None,
    stop: str | None,
    every: int,
) -> None:
    root, t2m, _ = weatherbench1
    expected = t2m.sel(time=slice(start, stop)).isel(time=slice(None, None, every))
    read = read_weatherbench(root, {"t2m": None}, start=start, stop=stop, every=every)
    assert read.index.equals(pd.DatetimeIndex(expected.indexes["time"]))
    assert np.array_equal(read.fields[:, 0].numpy(), expected.to_numpy())


def test_files_of_one_level(tmp_path: Path) -> None:
    z = pressure(hours("2017-01-01", 4)).sel(level=500)  # keeps the level as a scalar
    z.to_netcdf(tmp_path / "geopotential_500_2017_5.625deg.nc", engine="h5netcdf")
    for levels in ([500], None):
        read = read_weatherbench(tmp_path, {"z": levels})
        assert read.channels == ("z_500",)
        assert np.array_equal(read.fields[:, 0].numpy(), z.to_numpy())
    with pytest.raises(ValueError, match=r"levels \[850\] of 'z', expected some of \[500\]"):
        read_weatherbench(tmp_path, {"z": [850]})


def test_netcdf3(tmp_path: Path) -> None:
    t2m = surface(hours("2017-01-01", 4))
    t2m.to_netcdf(tmp_path / "t.nc", engine="scipy", format="NETCDF3_CLASSIC")
    read = read_weatherbench(tmp_path / "t.nc", {"t2m": None})
    assert np.array_equal(read.fields[:, 0].numpy(), t2m.to_numpy())


@pytest.mark.parametrize("how", ["path", "address"])
def test_zarr_store_comes_out_south_to_north(tmp_path: Path, how: str) -> None:
    store = tmp_path / "era5_64x32.zarr"
    data = weatherbench2(store, hours("2020-01-01", 8, "6h"))
    given = store if how == "path" else store.as_uri()
    read = read_weatherbench(given, {"2m_temperature": None, "geopotential": [500]}, every=2)
    assert read.channels == ("2m_temperature", "geopotential_500")
    assert np.array_equal(read.latitude.numpy(), LATITUDE.astype(np.float32))
    expected = np.stack([data["2m_temperature"], data["geopotential"].sel(level=500)], axis=1)
    assert np.array_equal(read.fields.numpy(), expected[::2])


def test_nothing_but_the_chosen_part_is_read(tmp_path: Path) -> None:
    store = tmp_path / "era5.zarr"
    weatherbench2(store, hours("2020-01-01", 4), geopotential={"chunks": (2, 1, 16, 8)})
    (store / "geopotential" / "1.0.0.0").write_bytes(b"damaged")
    read_weatherbench(store, {"geopotential": [500, 850]})
    read_weatherbench(store, {"geopotential": [50]}, stop="2020-01-01 01:00")
    with pytest.raises(ValueError, match=r"era5.zarr cannot be read.*Fetch it again"):
        read_weatherbench(store, {"geopotential": [50]})


def test_damaged_files_and_bombs_name_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "2m_temperature_2017.nc"
    surface(hours("2017-01-01", 50)).to_netcdf(file, engine="h5netcdf")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not netCDF", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"2m_temperature_2017.nc cannot be read as \w+"):
            read_weatherbench(tmp_path, {"t2m": None})
    monkeypatch.setattr("sdkd_plugin.data.reading._SMALL", 2**12)
    axes = {"time": hours("2017", 4), "lat": np.linspace(-80, 80, 512), "lon": np.arange(1024) / 3}
    still = xr.DataArray(np.zeros((4, 512, 1024)), axes, name="t2m")
    still.to_netcdf(file, engine="h5netcdf", encoding={"t2m": {"zlib": True}})
    with pytest.raises(ValueError, match=r"declares \d+ bytes in a file of \d+, expected at most"):
        read_weatherbench(file, {"t2m": None})
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match=r"empty.zarr cannot be read"):
        read_weatherbench(tmp_path / "empty.zarr", {"t2m": None})


@pytest.mark.parametrize("codecs", [{"compressor": {"id": "pickle"}}, {}])
def test_nothing_in_a_zarr_store_is_unpickled(tmp_path: Path, codecs: dict[str, Any]) -> None:
    store, trap = tmp_path / "era5.zarr", tmp_path / "trap"
    weatherbench2(store, hours("2020-01-01", 4))
    array = store / "geopotential" / ".zarray"
    filters = [{"id": "vlen-utf8"}] + [{"id": "pickle"}] * (not codecs)
    stored = {"dtype": "|O", "fill_value": "", "filters": filters}
    array.write_text(json.dumps(json.loads(array.read_text()) | stored | codecs))
    (store / ".zmetadata").unlink()
    for chunk in array.parent.glob("0*"):
        chunk.write_bytes(pickle.dumps(Exploit(trap)))
    with pytest.raises(ValueError, match=r"era5.zarr .*geopotential has a pickle filter"):
        read_weatherbench(store, {"2m_temperature": None})
    assert not trap.exists()


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"t850": None}, {}, r"`variables` has 't850', expected some of \['t2m', 'z'\]"),
        ({"z": [500, 700]}, {}, r"levels \[500, 700\] of 'z', expected some of \[50, 500, 850\]"),
        ({"z": []}, {}, r"levels \[\] of 'z', expected some of"),
        ({"t2m": [500]}, {}, r"asks for levels \[500\] of 't2m', .* None for a variable without"),
        ({}, {}, "`variables` is empty"),
        ({"z": None}, {"start": "2018"}, "from 2016-12-31 14:00:00 to 2017-01-01 09:00:00"),
        ({"z": None}, {"stop": "soon"}, "`stop` is 'soon', expected times such as"),
        ({"z": None}, {"every": 0}, "`every` is 0, expected an integer of at least 1"),
    ],
)
def test_unknown_choices_list_what_there_is(
    weatherbench1: tuple[Path, xr.DataArray, xr.DataArray],
    variables: dict[str, list[int] | None],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        read_weatherbench(weatherbench1[0], variables, **options)


T2M = surface(hours("2017-01-01", 6))
LATER = surface(hours("2017-01-01 06:00", 6))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (T2M.isel(time=[0, 2, 1, 3]), "from 2017-01-01 02:00:00 to 2017-01-01 01:00:00"),
        (T2M.isel(time=[0, 1, 1, 2]), "expected times that ascend"),
        (T2M.isel(time=[0, 1, 4, 5]), r"from 2017-01-01 01:00:00 to .* 04:00:00 .* equal steps"),
        (T2M.isel(time=[]), r"'time': 0.* expected numbers along time"),
        (T2M.drop_vars("time"), r"with coordinates \['lat', 'lon'\], expected numbers along"),
        (T2M.assign_coords(time=np.arange(6)), "dates of the standard calendar"),
        (T2M.isel(time=0), r"t2m' is float32 along {'lat': 8, 'lon': 16} .*, expected"),
        (T2M.expand_dims(number=[0]), "forecasts by lead time are not read"),
        (T2M.astype(str), "t2m' is .* along .*, expected numbers"),
        (T2M.where(LATITUDE[:, None] > 0), re.escape("(t2m)` has 384 of 768 values that are NaN")),
    ],
)
def test_arrays_that_are_no_weather(tmp_path: Path, array: xr.DataArray, message: str) -> None:
    array.to_netcdf(tmp_path / "file.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match=message):
        read_weatherbench(tmp_path / "file.nc", {"t2m": None})


def test_a_missing_year_is_a_gap(tmp_path: Path) -> None:
    for year in ("2015", "2017"):
        write_year(tmp_path, "2m_temperature", surface(hours(f"{year}-01-01", 4)), year)
    with pytest.raises(ValueError, match=r"from 2015-01-01 03:00:00 to 2017-01-01 00:00:00"):
        read_weatherbench(tmp_path, {"t2m": None})
    assert len(read_weatherbench(tmp_path, {"t2m": None}, start="2016").index) == 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (T2M, r"a.nc, .*b.nc goes from 2017-01-01 05:00:00 to 2017-01-01 00:00:00"),
        (LATER.isel(lat=slice(2, 6)), r"a.nc, .*b.nc cannot be read as one variable 't2m': .*lat"),
        (LATER.assign_attrs(units="degC"), r"a.nc, .*b.nc cannot be read as one variable 't2m'"),
        (pressure(hours("2017-01-01 06:00", 6), "t2m"), r"b.nc cannot be read as one variable"),
        (pressure(hours("2017-01-01 06:00", 6)), "t2m, z together cannot be read .*time"),
        (T2M.rename("t").assign_coords(lon=LONGITUDE - 180), "t, t2m together cannot be .*lon"),
    ],
)
def test_files_that_do_not_go_together(tmp_path: Path, other: xr.DataArray, message: str) -> None:
    T2M.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    other.to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    names = dict.fromkeys(sorted({"t2m", str(other.name)}))
    with pytest.raises(ValueError, match=message):
        read_weatherbench(tmp_path, names)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": torch.zeros(3, 2, 8, 4)}, r"`fields` has shape \(3, 2, 8, 4\), expected"),
        ({"units": ("K",)}, r"`units` has shape \(1,\), expected \(2,\)"),
        ({"latitude": torch.linspace(60, -60, 4)}, "`latitude` does not ascend"),
        ({"longitude": torch.zeros(8)}, "`longitude` does not ascend"),
        ({"index": hours("2017-01-01", 3)[[0, 2, 1]]}, "expected equal steps forward"),
        ({"index": hours("2017-01-01", 3)[[0, 0, 0]]}, "expected equal steps forward"),
    ],
)
def test_data_that_no_reader_would_build(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "fields": torch.zeros(3, 2, 4, 8),
        "latitude": torch.linspace(-60, 60, 4),
        "longitude": torch.arange(8.0) * 45,
        "index": hours("2017-01-01", 3),
        "channels": ("t2m", "z_500"),
        "units": ("K", "m**2 s**-2"),
    }
    WeatherData(**good)
    with pytest.raises(ValueError, match=message):
        WeatherData(**(good | change))


def test_without_xarray_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.nc").touch()
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"pip install 'sdkd_plugin\[weather\]'"):
        read_weatherbench(tmp_path, {"t2m": None})


def test_weighted_rmse_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    forecast, truth = torch.randn(2, 3, 5, 2, 8, 16, generator=generator).double()
    latitude = torch.from_numpy(LATITUDE)
    weights = np.cos(np.deg2rad(LATITUDE)) / np.cos(np.deg2rad(LATITUDE)).mean()
    error = (forecast - truth).numpy()
    expected = [np.sqrt((weights[:, None] * error[:, :, c] ** 2).mean()) for c in range(2)]
    measured = latitude_weighted_rmse(forecast, truth, latitude)
    assert measured.tolist() == pytest.approx(expected, rel=1e-12)
    # Rows on the poles have half a cell each.
    cap, middle = (1 - np.sin(np.pi / 4)), 2 * np.sin(np.pi / 4)
    truth, latitude = torch.zeros(1, 3, 2).double(), torch.tensor([-90.0, 0.0, 90.0]).double()
    at_pole, between = truth.clone(), truth.clone()
    at_pole[:, 0], between[:, 1] = 1, 1
    for forecast, share in ((at_pole, cap / 2), (between, middle / 2)):
        error = latitude_weighted_rmse(forecast, truth, latitude)
        assert error.tolist() == pytest.approx([share**0.5], rel=1e-12)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("latitude", [[0.0, 1.0, 0.5], [0.0, 95.0], [0.0, 0.0], [-100.0]])
def test_bad_latitudes(latitude: list[float]) -> None:
    fields = torch.zeros(1, len(latitude), 2)
    with pytest.raises(ValueError, match=r"`latitude` is .*, expected ascending, from -90 to 90"):
        latitude_weighted_rmse(fields, fields, torch.tensor(latitude))


def test_absent_files_are_named(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "no.zarr", "no.zarr does not exist"),
        (tmp_path, "holds no file"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{message}.*expected a netCDF file"):
            read_weatherbench(path, {"t2m": None})
