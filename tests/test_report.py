"""Tables, comparisons and the folder of a run."""

import time

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from sdkd_plugin import Bands, GridTransform, Spectrum
from sdkd_plugin.report import (
    append_rows,
    choose_device,
    command_line_errors,
    environment,
    forecast_scores,
    format_table,
    milliseconds_a_forecast,
    paired_change,
    parameter_count,
)
from sdkd_plugin.report.figures import error_spectra


@pytest.fixture
def rows() -> pd.DataFrame:
    seeds = [0, 1, 2, 3]
    alone, taught = [1.0, 1.2, 1.1, 1.3], [0.8, 1.1, 0.9, 1.0]
    return pd.DataFrame(
        {"model": ["alone"] * 4 + ["taught"] * 4, "seed": seeds * 2, "mse": alone + taught}
    )


def test_scores_are_means_over_elements_and_samples():
    truth, forecast = torch.randn(2, 5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    transform, bands = GridTransform((8, 6)), Bands.split(0.5)
    error = (forecast - truth).double()
    norms = error.flatten(1).norm(dim=1) / truth.double().flatten(1).norm(dim=1)
    found = forecast_scores(forecast, truth, transform, bands)
    assert found["mse"] == pytest.approx(float(error.square().mean()))
    assert found["mae"] == pytest.approx(float(error.abs().mean()))
    assert found["relative_l2"] == pytest.approx(float(norms.mean()))
    assert found["band_0"] + found["band_1"] == pytest.approx(found["mse"])
    low = transform.filter(error, (transform.frequencies < 0.5).double())
    assert found["band_0"] == pytest.approx(float(low.square().mean()))


def test_scores_leave_out_what_was_not_observed():
    truth, forecast = torch.zeros(3, 3, 8), torch.ones(3, 3, 8)
    forecast[0, 1] = 3.0
    truth[1, 1:], truth[2] = torch.nan, torch.nan
    forecast, truth = forecast + 1, truth + 1
    bands = Bands.split(0.5)
    found = forecast_scores(
        forecast, truth, GridTransform((8,)), bands, mask=~truth.isnan(), at={"second": 1}
    )
    assert found["mae"] == pytest.approx((3 * 8 + 3 * 8) / (4 * 8))
    assert found["mse"] == pytest.approx((3 * 8 + 9 * 8) / (4 * 8))
    assert found["mae_second"] == pytest.approx(3.0)
    assert found["relative_l2"] == pytest.approx(((11 / 3) ** 0.5 + 1) / 2)
    assert found["band_0"] + found["band_1"] == pytest.approx(found["mse"])


def test_appended_rows_keep_the_old_ones(tmp_path):
    file = tmp_path / "new" / "rows.csv"
    append_rows(file, [{"a": 1, **environment(torch.device("cpu"))}])
    append_rows(file, [{"a": 2, "b": "x"}])
    rows = pd.read_csv(file)
    assert rows.a.tolist() == [1, 2]
    assert rows.b.isna().tolist() == [True, False]
    assert rows.torch[0] == torch.__version__
    assert [path.name for path in file.parent.iterdir()] == ["rows.csv"]


def test_a_table_shows_mean_and_deviation(rows):
    table = format_table(rows, index=["model"], columns={"mse": ("MSE", ".2f")})
    assert table.splitlines()[2:] == ["| alone | 1.15 ± 0.13 |", "| taught | 0.95 ± 0.13 |"]


def test_a_paired_change_is_scipys_test(rows):
    change = paired_change(rows, column="mse", of={"model": "taught"}, against={"model": "alone"})
    assert change.relative == pytest.approx(3.8 / 4.6 - 1)
    expected = scipy.stats.ttest_rel([0.8, 1.1, 0.9, 1.0], [1.0, 1.2, 1.1, 1.3]).pvalue
    assert change.p_value == pytest.approx(expected)
    assert str(change).startswith("-17.4% (p = 0.0")


def test_different_seeds_are_not_compared(rows):
    with pytest.raises(ValueError, match=r"seeds \[0, 1, 2, 3\] .* and \[0, 1, 2\]"):
        paired_change(rows[:-1], column="mse", of={"model": "alone"}, against={"model": "taught"})


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ValueError("two\nlines"), 2, "program: error: two lines"),
        (KeyboardInterrupt(), 130, "program: interrupted"),
    ],
)
def test_a_program_ends_in_one_line(error, code, shown, capsys):
    with pytest.raises(SystemExit) as ended, command_line_errors("program"):
        raise error
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(shown)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no CUDA device; use --device cpu"):
        choose_device("cuda")


def test_costs():
    assert parameter_count(torch.nn.Conv2d(2, 3, 3)) == 2 * 3 * 9 + 3
    assert parameter_count(torch.nn.ParameterList([torch.zeros(3, dtype=torch.cfloat)])) == 6
    calls = []
    slow = milliseconds_a_forecast(lambda x: calls.append(time.sleep(0.02)), 1, repetitions=4)
    assert len(calls) == 7
    assert 20 <= slow < 2000


def test_error_spectra_keep_the_energy():
    spectrum = Spectrum(torch.tensor([0.0, 0.01, 0.5, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    (line,) = error_spectra({"a": spectrum}, []).axes[0].lines
    np.testing.assert_allclose(line.get_xdata(), [1 / 64, 33 / 64, 63 / 64])
    np.testing.assert_allclose(line.get_ydata(), [3, 3, 4])
