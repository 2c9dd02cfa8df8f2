"""TaxiBJ's h5 files, written as the published ones are, and the windows between their gaps."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from sdkd_plugin.data import TaxiFlows, read_taxibj

NAME = "BJ13_M32x32_T30_InOut.h5"


def dates_of(index: pd.DatetimeIndex) -> np.ndarray:
    """Day and half hour as TaxiBJ writes them: 00:00 is slot 01, 23:30 is slot 48."""
    slots = index.hour * 2 + index.minute // 30 + 1
    pairs = zip(index.strftime("%Y%m%d"), slots, strict=True)
    return np.array([f"{day}{slot:02d}".encode() for day, slot in pairs])


def write(file: Path, index: pd.DatetimeIndex, grid: tuple[int, int] = (32, 32)) -> np.ndarray:
    counts = np.random.default_rng(len(index)).integers(0, 1300, (len(index), 2, *grid))
    with h5py.File(file, "w") as content:
        content["data"] = counts.astype(np.float64)
        content["date"] = dates_of(index)
    return counts


def half_hours(start: str, periods: int, without: list[int] | None = None) -> pd.DatetimeIndex:
    return pd.date_range(start, periods=periods, freq="30min").delete(without or [])


def flows(index: pd.DatetimeIndex) -> TaxiFlows:
    return TaxiFlows(flow=torch.zeros(len(index), 2, 4, 4), index=index)


def test_flows_and_times_are_those_of_the_file(tmp_path: Path) -> None:
    index = half_hours("2013-07-01", 50)
    counts = write(tmp_path / NAME, index)
    read = read_taxibj(tmp_path / NAME)
    assert read.flow.dtype == torch.float32
    assert np.array_equal(read.flow.numpy(), counts)
    assert read.index.equals(index)


def test_years_are_joined_in_order_of_time(tmp_path: Path) -> None:
    late, early = half_hours("2014-03-01", 3), half_hours("2013-10-29 22:30", 3)
    # Not the order of the names.
    counts = {
        name: write(tmp_path / f"{name}_InOut.h5", i) for name, i in {"A": late, "B": early}.items()
    }
    read = read_taxibj(tmp_path)
    assert read.index.equals(early.append(late))
    assert np.array_equal(read.flow.numpy(), np.concatenate([counts["B"], counts["A"]]))
    listed = read_taxibj([tmp_path / "A_InOut.h5", tmp_path / "B_InOut.h5"])
    assert torch.equal(listed.flow, read.flow)
    # The five months between are a gap like any other.
    assert read.windows(2, 1).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("n_input", "n_target"), [(1, 1), (4, 4), (10, 2)])
def test_windows_are_all_those_without_a_gap(n_input: int, n_target: int) -> None:
    generator = np.random.default_rng(0)
    missing = generator.choice(200, 12, replace=False)
    index = half_hours("2015-11-01", 200, without=missing.tolist())
    there = set(index)
    frames = n_input + n_target
    step = pd.Timedelta(minutes=30)
    expected = [
        [index.get_loc(time + k * step) for k in range(frames)]
        for time in index
        if all(time + k * step in there for k in range(frames))
    ]
    assert flows(index).windows(n_input, n_target).tolist() == expected


def test_one_time_splits_training_from_test() -> None:
    index = half_hours("2016-03-12", 96, without=[20, 61])
    data, split = flows(index), "2016-03-13"
    everything = data.windows(4, 3)
    train, test = data.windows(4, 3, stop=split), data.windows(4, 3, start=split)
    assert index[int(train.max())] == pd.Timestamp("2016-03-12 23:30")
    assert index[int(test[:, 4:].min())] == pd.Timestamp(split)
    # What is in neither has targets on both sides.
    astride = [w for w in everything.tolist() if w not in train.tolist() + test.tolist()]
    assert len(astride) == 2
    assert all(index[w[4]] < pd.Timestamp(split) <= index[w[6]] for w in astride)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"date": ["2013070101", "2013070149"]}, r"frame 1 is '2013070149', expected .*01 to 48"),
        ({"date": ["2013070100", "2013070101"]}, "`date` of frame 0 is '2013070100'"),
        ({"date": ["2013070101", "2013130101"]}, "`date` of frame 1 is '2013130101'"),
        ({"date": ["201307011", "noon"]}, "`date` of frame 0 is '201307011'"),
        ({"date": ["2013070102", "2013070101"]}, "from 2013-07-01 00:30:00 to 2013-07-01 00:00:00"),
        ({"date": ["2013070101", "2013070101"]}, "expected times that ascend"),
        ({"date": ["2013070101"]}, r"`date` of shape \(1,\), expected"),
        ({"date": [2013070101, 2013070102]}, "HDF5 string datatype"),
        ({"data": np.zeros((2, 32, 32))}, r"`data` is float64 of shape \(2, 32, 32\)"),
        ({"data": np.zeros((2, 3, 32, 32))}, r"of shape \(2, 3, 32, 32\), expected floating"),
        ({"data": np.full((2, 2, 32, 32), -1.0)}, "`flow` goes down to -1, expected none below 0"),
        ({"data": np.full((2, 2, 32, 32), np.nan)}, "`flow` has 4096 of 4096 values that are NaN"),
        ({"data": np.full((2, 2, 32, 32), b"x")}, r"`data` is \|S1"),
        ({"data": None}, r"it holds the datasets \['date'\], expected 'data' and 'date'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"data": np.zeros((2, 2, 32, 32)), "date": ["2013070101", "2013070102"]}
    with h5py.File(tmp_path / NAME, "w") as content:
        for name, value in (good | change).items():
            if value is not None:
                content[name] = value
    with pytest.raises(ValueError, match=f"{NAME} cannot be read.*{message}"):
        read_taxibj(tmp_path / NAME)


def test_damaged_files_and_bombs_name_themselves(tmp_path: Path) -> None:
    file = tmp_path / NAME
    write(file, half_hours("2013-07-01", 50))
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not h5", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{NAME} cannot be read as a TaxiBJ file"):
            read_taxibj(file)
    with h5py.File(file, "w") as content:  # a terabyte of fill values
        content.create_dataset("data", (2**26, 2, 32, 32), "f8", chunks=(1, 2, 32, 32))
        content.create_dataset("date", (2**26,), "S10", chunks=(1024,))
    with pytest.raises(ValueError, match=r"declares \d+ bytes in a file of \d+, expected at most"):
        read_taxibj(file)


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist, expected TaxiBJ files"):
        read_taxibj(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no file \*_InOut.h5"):
        read_taxibj(tmp_path)
    with pytest.raises(ValueError, match="`paths` is empty"):
        read_taxibj([])


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    write(tmp_path / "A_InOut.h5", half_hours("2013-07-01", 4))
    write(tmp_path / "B_InOut.h5", half_hours("2013-07-01 01:30", 4))
    with pytest.raises(ValueError, match=r"A_InOut.h5, .*B_InOut.h5 goes from 2013-07-01 01:30:00"):
        read_taxibj(tmp_path)
    write(tmp_path / "B_InOut.h5", half_hours("2014-07-01", 4), grid=(16, 8))
    with pytest.raises(ValueError, match=r"the grids .*\(16, 8\).*, expected one"):
        read_taxibj(tmp_path)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": torch.zeros(3, 4, 4)}, r"`flow` is torch.float32 of shape \(3, 4, 4\), expected"),
        ({"flow": torch.zeros(3, 2, 4, 4, dtype=torch.int64)}, "`flow` is torch.int64"),
        ({"index": half_hours("2013-07-01", 2)}, "`index` has 2 times, expected 3"),
        ({"index": half_hours("2013-07-01", 3)[::-1]}, r"`index` goes from .* times that ascend"),
        ({"index": pd.DatetimeIndex(["2013-07-01", pd.NaT, "2013-07-02"])}, "`index` goes .*NaT"),
        ({"index": half_hours("2013-07-01 00:10", 3)}, "`index` has 2013-07-01 00:10:00, expected"),
    ],
)
def test_flows_that_no_reader_would_build(change: dict[str, Any], message: str) -> None:
    good = {"flow": torch.zeros(3, 2, 4, 4), "index": half_hours("2013-07-01", 3)}
    with pytest.raises(ValueError, match=message):
        TaxiFlows(**good | change)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ((4, 1), {}, "no 5 consecutive half hours .* are in the 7 frames from"),
        ((4, 5), {}, "no 9 consecutive"),
        ((1, 1), {"start": "2014"}, "no 2 consecutive half hours with targets from 2014 until"),
        ((1, 1), {"start": "soon"}, "`start` is 'soon', expected a time"),
        ((0, 1), {}, "`n_input` is 0, expected an integer of at least 1"),
    ],
)
def test_windows_that_do_not_exist(
    frames: tuple[int, int], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flows(half_hours("2013-07-01", 8, without=[4])).windows(*frames, **options)
