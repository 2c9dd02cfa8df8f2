"""Traffic as data, and its readers: what they return, and what they say of bad files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sdkd_plugin.data import TrafficData, find_traffic, read_csv_pair, read_los_loop

LOS_LOOP = Path(__file__).parents[2] / "shared" / "data" / "los_loop"

SPEED = "71,72,73\n60,0,50\n61,62,51.5\n"
ADJACENCY = "1,0.5,0\n0.25,1,0\n0,0,1\n"


def pair(folder, speed=SPEED, adjacency=ADJACENCY):
    (folder / "speed.csv").write_text(speed)
    (folder / "adj.csv").write_text(adjacency)
    return folder / "speed.csv", folder / "adj.csv"


def read(folder, speed=SPEED, adjacency=ADJACENCY, **options):
    options = {"start": "2012-03-01", "missing": "zeros", **options}
    return read_csv_pair(*pair(folder, speed, adjacency), **options)


def parts(**changes):
    return {
        "speed": torch.tensor([[60.0, 50.0], [61.0, 51.0], [62.0, 52.0]]),
        "mask": torch.ones(3, 2, dtype=torch.bool),
        "edge_index": torch.tensor([[0], [1]]),
        "edge_weight": torch.tensor([0.5]),
        "node_ids": ("a", "b"),
        "index": pd.date_range("2012-03-01", periods=3, freq="5min"),
        "source": "two sensors",
        **changes,
    }


class TestCsvPair:
    def test_reads_what_is_there(self, tmp_path):
        data = read(tmp_path)
        nan = float("nan")
        expected = torch.tensor([[60, nan, 50], [61, 62, 51.5]])
        torch.testing.assert_close(data.speed, expected, equal_nan=True)
        assert data.mask.tolist() == [[True, False, True], [True, True, True]]
        assert data.edge_index.tolist() == [[0, 1], [1, 0]]  # directed, no self-loops
        assert data.edge_weight.tolist() == [0.5, 0.25]
        assert data.node_ids == ("71", "72", "73")
        assert str(data.index[1]) == "2012-03-01 00:05:00"
        assert data.source == "T-GCN csv pair speed.csv, adj.csv"

    def test_missing_is_what_the_caller_says(self, tmp_path):
        assert read(tmp_path, missing="none").mask.all()
        assert read(tmp_path, missing="nan").mask.all()
        gap = SPEED.replace("61,62", "61,")
        assert read(tmp_path, speed=gap, missing="nan").mask.tolist()[1] == [True, False, True]
        for missing in ("none", "zeros"):
            with pytest.raises(
                ValueError, match=r"speed.csv: line 3, column 2 is nan, expected .*missing='nan'"
            ):
                read(tmp_path, speed=gap, missing=missing)

    def test_byte_order_mark_line_ends_and_quotes_do_no_harm(self, tmp_path):
        speed, adjacency = pair(tmp_path)
        lines = '"71","72","73"\r\n"60",0,50\r\n61,62,51.5\r\n\r\n'
        speed.write_bytes(b"\xef\xbb\xbf" + lines.encode())
        data = read_csv_pair(speed, adjacency, start="2012-03-01", missing="zeros")
        assert data.node_ids[0] == "71"
        torch.testing.assert_close(data.speed, read(tmp_path).speed, equal_nan=True)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"speed": ""}, "speed.csv is empty, expected a csv file"),
            ({"speed": "71,72,73\n"}, "speed.csv has a header only"),
            ({"speed": SPEED[:-6]}, r"speed.csv: line 3 has 2 cells, expected 3 .*cut short"),
            ({"speed": SPEED + "60,61,62,63\n"}, "speed.csv: line 4 has 4 cells, expected 3"),
            ({"speed": SPEED.replace("62", "fast")}, "speed.csv: .* convert string 'fast'"),
            ({"speed": SPEED.replace("62", "True")}, "speed.csv: .* convert string 'True'"),
            ({"speed": SPEED.replace("62", "-1")}, "line 3, column 2 is -1, expected a finite num"),
            ({"speed": SPEED.replace("62", "inf")}, "speed.csv: line 3, column 2 is inf"),
            ({"speed": "60.5,61.5\n60,61\n"}, r"speed.csv: line 1 is '60.5.*header of sensor ids"),
            ({"speed": "71,71,73\n60,61,62\n"}, "line 1 is '71,71,73', expected a header"),
            ({"speed": "71,72,73\n0,0,0\n"}, "every reading is missing, with `missing='zeros'`"),
            ({"adjacency": ""}, "adj.csv is empty"),
            ({"adjacency": ADJACENCY[:-6]}, r"adj.csv has rows and columns \(2, 3\), expected"),
            ({"adjacency": "1,0\n0,1\n"}, r"\(2, 2\), .* as speed.csv has sensors: 3"),
            ({"adjacency": ADJACENCY[:-3]}, "adj.csv: line 3 has 2 cells, expected 3"),
            ({"adjacency": ADJACENCY.replace("0.5", "near")}, "adj.csv: .* convert string 'near'"),
            ({"adjacency": ADJACENCY.replace("0.5", "-0.5")}, "line 1, column 2 is -0.5, expected"),
            ({"adjacency": ADJACENCY.replace("0.5", "")}, "adj.csv: line 1, column 2 is nan"),
            ({"start": "the first"}, "`start` is 'the first' and `freq` is '5min', expected a"),
            ({"freq": "often"}, "`freq` is 'often', expected a time"),
        ],
    )
    def test_what_is_wrong_is_named_with_its_place(self, tmp_path, change, match):
        with pytest.raises(ValueError, match=match):
            read(tmp_path, **change)

    def test_absent_and_binary_files_are_named(self, tmp_path):
        speed, adjacency = pair(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"nowhere.csv does not exist, expected a csv"):
            read_csv_pair(speed, tmp_path / "nowhere.csv", start="2012-03-01", missing="none")
        speed.write_bytes(b"\x89HDF\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"speed.csv is not text, expected a csv file"):
            read_csv_pair(speed, adjacency, start="2012-03-01", missing="none")


class TestLosLoop:
    @pytest.mark.skipif(not LOS_LOOP.is_dir(), reason="the shared Los-loop files are not here")
    def test_real_week(self):
        data = read_los_loop(LOS_LOOP)
        assert data.speed.shape == (2016, 207)
        assert data.mask.all()
        assert str(data.index[-1]) == "2012-03-07 23:55:00"
        assert data.edge_index.shape == (2, 2833 - 207)
        assert float(data.speed.mean()) == pytest.approx(58.89, abs=0.01)
        columns = pd.read_csv(LOS_LOOP / "los_speed.csv")
        np.testing.assert_allclose(data.speed.numpy(), columns.to_numpy(), rtol=1e-6)

    def test_cut_file_is_refused_though_every_row_is_whole(self, tmp_path):
        rng = np.random.default_rng(0)
        speed = rng.uniform(1, 70, size=(2016, 207)).astype(np.float32)
        header = ",".join(str(700000 + k) for k in range(207))
        path = tmp_path / "los_speed.csv"
        np.savetxt(path, speed, fmt="%.4f", delimiter=",", header=header, comments="")
        np.savetxt(tmp_path / "los_adj.csv", np.eye(207), fmt="%g", delimiter=",")
        data = read_los_loop(tmp_path)
        np.testing.assert_allclose(data.speed.numpy(), speed, atol=1e-4)
        assert data.edge_index.shape == (2, 0)
        assert data.positions is None
        places = tmp_path / "sensor_locations.csv"
        rows = [f"{700000 + k},{34 + k / 100},-118" for k in reversed(range(207))]
        places.write_text("\n".join(["sensor_id,latitude,longitude", *rows]))
        north = read_los_loop(tmp_path).positions[:, 1]
        np.testing.assert_allclose(north.numpy(), 34 + np.arange(207) / 100, rtol=1e-6)
        places.write_text("\n".join(["sensor_id,latitude,longitude", *rows[1:]]))
        with pytest.raises(ValueError, match=r"lacks \['700206'\], expected the columns"):
            read_los_loop(tmp_path)
        path.write_text("\n".join(path.read_text().splitlines()[:1500]))
        with pytest.raises(ValueError, match=r"los_speed.csv has \(1499, 207\) rows and sens"):
            read_los_loop(tmp_path)


class TestFindTraffic:
    @pytest.mark.parametrize(
        ("names", "kind", "speed"),
        [
            (["los_speed.csv", "los_adj.csv", "sensor_locations.csv"], "los_loop", "los_speed.csv"),
            (["my_speed.csv", "graph_adj.csv", "notes.txt"], "csv_pair", "my_speed.csv"),
            (["metr_la.h5", "metr_la_dist.npy", "locations.csv"], "metr_la", "metr_la.h5"),
            (
                ["metr_la.h5", "distances_la.csv", "sensor_ids_la.txt", "sensor_locations_la.csv"],
                "metr_la",
                "metr_la.h5",
            ),
        ],
    )
    def test_recognises_by_name(self, tmp_path, names, kind, speed):
        for name in names:
            (tmp_path / name).touch()
        found = find_traffic(tmp_path)
        assert found.kind == kind
        assert found.speed == tmp_path / speed
        assert (found.adjacency is None) == (kind == "metr_la")

    def test_lists_what_it_looked_for(self, tmp_path):
        (tmp_path / "metr_la.h5").touch()
        with pytest.raises(
            FileNotFoundError,
            match=r"no known traffic data.*los_speed.csv.*metr_la_dist.npy.*Found metr_la.h5",
        ):
            find_traffic(tmp_path)

    def test_several_data_sets_are_not_guessed_between(self, tmp_path):
        for name in ("a_speed.csv", "a_adj.csv", "b_speed.csv", "b_adj.csv"):
            (tmp_path / name).touch()
        with pytest.raises(ValueError, match=r"more than one .*a_speed.csv, b_speed.csv"):
            find_traffic(tmp_path)


class TestTrafficData:
    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"speed": torch.ones(3, 2, dtype=torch.int64)}, "`speed` is torch.int64"),
            ({"speed": torch.full((3, 2), float("nan"))}, "`speed` has 6 of 6 values that are NaN"),
            ({"speed": torch.full((3, 2), -1.0)}, "`speed` goes down to -1, expected none below"),
            ({"mask": torch.ones(2, 2, dtype=torch.bool)}, r"`mask` has shape \(2, 2\)"),
            ({"mask": torch.ones(3, 2)}, "`mask` is of torch.float32, expected torch.bool"),
            ({"mask": torch.zeros(3, 2, dtype=torch.bool)}, "`mask` is false everywhere"),
            ({"node_ids": ("a",)}, "`node_ids` has 1 names"),
            ({"node_ids": ("a", "a")}, "`node_ids` has 2 names, 1 different"),
            ({"edge_index": torch.tensor([0, 1])}, r"`edge_index` is .* of shape \(2,\), exp"),
            ({"edge_index": torch.tensor([[0], [2]])}, "refers to nodes 0 to 2, expected 0 to 1"),
            ({"edge_index": torch.tensor([[-1], [1]])}, "refers to nodes -1 to 1"),
            ({"edge_index": torch.ones(2, 1)}, "`edge_index` is torch.float32"),
            ({"positions": torch.ones(3, 2)}, r"`positions` has shape \(3, 2\), expected \(2, 2\)"),
            ({"edge_weight": torch.ones(2)}, r"`edge_weight` has shape \(2,\), expected \(1,\)"),
            ({"edge_weight": torch.tensor([-0.5])}, "`edge_weight` goes down to -0.5"),
            ({"edge_weight": torch.tensor([float("nan")])}, "`edge_weight` has 1 of 1 values"),
            ({"index": pd.date_range("2012", periods=2)}, "`index` has 2 times, expected 3"),
            (
                {"index": pd.DatetimeIndex(["2012-03-01", "2012-03-02", "2012-03-04"])},
                "`index` goes from .* expected equal steps",
            ),
            ({"index": pd.date_range("2012-03-01", periods=3)[::-1]}, "`index` goes from"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes, match):
        with pytest.raises(ValueError, match=match):
            TrafficData(**parts(**changes))

    def test_filled_looks_back_in_time_except_before_the_first_reading(self):
        nan = float("nan")
        speed = torch.tensor([[nan, 50.0, nan], [61.0, nan, nan], [nan, 52.0, nan]])
        data = TrafficData(**parts(speed=speed, mask=~speed.isnan(), node_ids=("a", "b", "silent")))
        expected = torch.tensor([[61.0, 50.0, 55.5], [61.0, 50.0, 55.5], [61.0, 52.0, 56.5]])
        torch.testing.assert_close(data.filled(), expected)
        assert data.speed.isnan().sum() == 6
