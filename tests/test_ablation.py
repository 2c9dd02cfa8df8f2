"""The ablation, small but whole: its rows, its splits, its table, and bad options."""

import dataclasses
import importlib
import math
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import scipy.stats
import torch

from sdkd_plugin.data import simulate_traffic

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUARTER, ALL = "a quarter of the labels", "all labels"


@pytest.fixture
def ablation(monkeypatch, tmp_path):
    """The benchmark's modules, and systems that train in seconds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "cache"))
    names = ["data", "report", "rows", "systems", "training"]
    parts = {name: importlib.import_module(f"_ablation_{name}") for name in names}
    monkeypatch.setattr(parts["training"], "_PROBLEMS", {})
    monkeypatch.setattr(parts["training"], "_ANSWERS", {})
    main = importlib.import_module("ablation")
    small = {name: shrunk(parts, name) for name in main.SYSTEMS["quick"]}
    monkeypatch.setitem(main.SYSTEMS, "quick", small)
    return SimpleNamespace(main=main, small=small, **parts)


def shrunk(parts, name):
    quick = parts["systems"].SYSTEMS["quick"][name]
    training = parts["systems"].Training(steps=3, lr=1e-2, batch_size=2, validations=2)
    network = parts["systems"].Network
    if name == "traffic":
        tiny = {"hidden_size": 8, "emb_size": 4, "n_layers": 1}
        return dataclasses.replace(
            quick,
            teachers=(network("GraphAlterNet", tiny), network("GraphMixer", tiny)),
            student=network("GraphMixer", tiny | {"hidden_size": 4}),
            teaching=training,
            learning=training,
        )
    sizes = {"resolution": 16, "solver_resolution": 16, "training": 8, "validation": 2, "test": 3}
    return dataclasses.replace(
        quick,
        data=dataclasses.replace(quick.data, **sizes),
        teachers=(
            network("STAlterNet", {"width": 4, "depth": 1, "heads": 1, "n_downsampling": 1}),
            network("SimVP", {"width": 2, "latent_width": 8, "depth": 1, "n_downsampling": 1}),
        ),
        student=network("UNet", {"width": 2, "depth": 1}),
        teaching=training,
        learning=training,
    )


@cache
def two_days():
    """Simulated traffic with one gap, five readings long."""
    data = simulate_traffic(n_sensors=8, days=2, seed=1, progress=False)
    mask = torch.ones_like(data.mask)
    mask[550:555, 3] = False
    return dataclasses.replace(data, speed=data.filled(), mask=mask)


@pytest.fixture
def traffic(ablation, monkeypatch):
    """Two simulated days in place of the measured week."""
    data = two_days()
    monkeypatch.setattr(ablation.data, "read_traffic", lambda folder: data)
    return data


def run(ablation, monkeypatch, out, *arguments):
    argv = ["ablation.py", "--jobs", "1", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    ablation.main.main()
    return pd.read_csv(out / "ablation_quick.csv"), (out / "ablation_quick.md").read_text()


TINY = ("--systems", "ns_1e-3", "--rows", "alone", "plain", "--seeds", "1")


def test_from_data_to_table(ablation, monkeypatch, tmp_path):
    rows, text = run(ablation, monkeypatch, tmp_path, *TINY)
    by_name = rows.groupby("row").size()
    assert by_name.to_dict() == {
        "persistence": 1,
        "teacher 1: STAlterNet": 1,
        "teacher 2: SimVP": 1,
        "student alone": 2,
        "plain-MSE distillation": 2,
    }
    torch.testing.assert_close(
        torch.tensor((rows.band_0 + rows.band_1).to_numpy()), torch.tensor(rows.mse.to_numpy())
    )
    assert {"hardware", "torch", "seed", "protocol", "date"} <= set(rows.columns)
    chosen = rows[(rows.row == "plain-MSE distillation") & (rows.setting == QUARTER)].iloc[0]
    line = next(x for x in text.splitlines() if x.startswith(f"| {QUARTER} | plain-MSE"))
    assert f"| {chosen.relative_l2:.4f} | {chosen.mse:.5f} |" in line
    assert "Each row changes one thing" in text
    assert "| teacher 2: SimVP | - | - |" in text
    assert "(p =" not in text  # with one seed there is nothing to test
    assert str(tmp_path) not in text


def test_resuming_trains_only_what_is_missing(ablation, monkeypatch, tmp_path):
    trained = []
    real = ablation.main.run
    monkeypatch.setattr(ablation.main, "run", lambda task: trained.append(task) or real(task))
    first, text = run(ablation, monkeypatch, tmp_path, *TINY)
    trained.clear()
    again, same = run(ablation, monkeypatch, tmp_path, *TINY, "--resume")
    assert not trained
    assert len(again) == len(first)
    assert same == text
    more, _ = run(ablation, monkeypatch, tmp_path, *TINY[:-1], "2", "--resume")
    assert {task.seed for task in trained if task.row} == {1}
    assert sum(more.row == "student alone") == 4
    teachers = more[more.row == "teacher 1: STAlterNet"]
    assert teachers.mse.nunique() == 1  # trained again, to the same


def test_rows_of_another_protocol_stay_out_of_the_table(ablation, monkeypatch, tmp_path):
    run(ablation, monkeypatch, tmp_path, *TINY)
    system = ablation.small["ns_1e-3"]
    monkeypatch.setitem(ablation.small, "ns_1e-3", dataclasses.replace(system, kd_weight=3.0))
    rows, text = run(ablation, monkeypatch, tmp_path, *TINY)
    assert rows.protocol.nunique() == 2 * 3  # teachers and two rows, twice
    assert text.count("| student alone |") == 2  # one a setting
    assert not [line for line in text.splitlines() if line.startswith("|") and "±" in line]
    assert "The teacher counts 3 times" in text


@pytest.mark.parametrize("name", ["ns_1e-5", "traffic"])
def test_every_row_trains_and_is_another_lesson(name, ablation, traffic, tmp_path, device):
    system = ablation.small[name]
    task = ablation.training.Task(name, system, tmp_path, tmp_path, device.type)
    for index in range(2):
        ablation.training.run(dataclasses.replace(task, seed=index))
    error = "mae_average" if name == "traffic" else "mse"
    found = {}
    for key, row in ablation.rows.ROWS.items():
        for setting in row.settings:
            student = dataclasses.replace(task, row=key, setting=setting)
            (record,) = ablation.training.run(student)
            assert record["row"] == row.name
            found[key, setting] = record[error]
    assert all(math.isfinite(value) for value in found.values())
    # A student that is worse than its teacher on all samples does not feel the bound.
    distinct = {k: v for k, v in found.items() if k[0] != "bounded"}
    assert len(set(distinct.values())) == len(distinct), distinct
    assert len({row.name for row in ablation.rows.ROWS.values()}) == len(ablation.rows.ROWS)


def test_options_reach_the_distiller(ablation, tmp_path):
    task = ablation.training.Task("ns_1e-3", ablation.small["ns_1e-3"], None, tmp_path, "cpu")
    problem = ablation.training.problem_of(task)

    def distiller(key):
        row = ablation.rows.ROWS[key]
        networks = [*task.system.teachers[: row.n_teachers], task.system.student]
        *teachers, student = [network.build(problem, seed=0) for network in networks]
        return ablation.training.distiller_of(task, row, student, teachers)

    assert distiller("bounded").teacher_bound == 0.0
    assert distiller("plain").kd_weight == 10.0
    assert distiller("twice").kd_weight == 20.0
    assert distiller("plain").loss.weighting.weights.tolist() == [1.0, 1.0]
    assert distiller("fixed").loss.weighting.weights.tolist() == [1.0, 2.0]
    assert len(distiller("camkd").teachers) == 2
    assert distiller("matching").augmentation is not None
    assert distiller("latent_bands").teacher_taps(0) == ("latent_high", "latent_low")


@pytest.mark.slow
def test_processes_give_the_rows_of_one(ablation, monkeypatch, tmp_path):
    one, _ = run(ablation, monkeypatch, tmp_path / "one", *TINY)
    two, _ = run(ablation, monkeypatch, tmp_path / "two", *TINY, "--jobs", "2")
    key = ["setting", "row", "seed", "mse", "relative_l2"]
    one, two = (rows[key].sort_values(key[:3]).reset_index(drop=True) for rows in (one, two))
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=0)


def test_windows_of_traffic_do_not_overlap_in_their_targets(ablation, traffic):
    problem = ablation.data.Traffic().problem(Path(), 0.25, torch.device("cpu"))
    steps = len(traffic.index)
    readings = traffic.filled()
    ends = [round(0.7 * steps), round(0.8 * steps), steps]
    starts = [12, *ends[:2]]
    parts = (problem.training, problem.validation, problem.test)
    for part, begin, end in zip(parts, starts, ends, strict=True):
        assert len(part) == end - begin - 11
        torch.testing.assert_close(
            problem.physical(part.y[0, :, :, 0]), readings[begin : begin + 12]
        )
        torch.testing.assert_close(problem.physical(part.y[-1, :, :, 0]), readings[end - 12 : end])
        torch.testing.assert_close(
            problem.physical(part.x[0, :, :, 0]), readings[begin - 12 : begin]
        )
    assert int((~problem.test.mask).sum()) == 12 * 5  # five gaps, each in twelve windows
    assert problem.labelled(0.25, seed=7).nonzero().max() == round(0.25 * len(problem.training)) - 1


def test_traffic_scores_only_what_was_observed(ablation, traffic):
    problem = ablation.data.Traffic().problem(Path(), 0.25, torch.device("cpu"))
    test = problem.test
    forecast = test.y + 2 / problem.scale
    forecast[:, 5] += 1 / problem.scale
    forecast = torch.where(test.mask, forecast, 1e6)
    scores = problem.scores(forecast)
    wanted = {"mae_15": 2.0, "mae_30": 3.0, "mae_60": 2.0}
    assert scores | wanted == pytest.approx(scores, rel=1e-4)
    counts = test.mask.sum((0, 2, 3))
    assert scores["mae_average"] == pytest.approx(
        float((2 * counts.sum() + counts[5]) / counts.sum()), rel=1e-4
    )


def test_persistence_and_labels_of_turbulence(ablation):
    problem = ablation.small["ns_1e-3"].data.problem(None, 0.25, torch.device("cpu"))
    forecast = ablation.data.persistence(problem.test)
    truth = problem.physical(problem.test.y)
    last = problem.physical(problem.test.x[:, 9:])
    relative = (last - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    assert problem.scores(forecast)["relative_l2"] == pytest.approx(float(relative.mean()))
    drawn = [problem.labelled(0.25, seed) for seed in range(4)]
    assert all(int(labelled.sum()) == 2 for labelled in drawn)
    assert len({tuple(labelled.tolist()) for labelled in drawn}) > 1
    assert bool(problem.labelled(1.0, 0).all())


def test_batches_have_one_size_and_a_seed(ablation):
    def take(n, indices, size, seed):
        return list(islice(ablation.training.batches(torch.tensor(indices), size, seed), n))

    first = take(3, [3, 5, 7, 9, 11], 2, 0)
    assert all(len(batch) == 2 for batch in first)
    assert set(torch.cat(first[:2]).tolist()) < {3, 5, 7, 9, 11}
    assert all(map(torch.equal, first, take(3, [3, 5, 7, 9, 11], 2, 0)))
    assert not all(map(torch.equal, first, take(3, [3, 5, 7, 9, 11], 2, 1)))
    assert sorted(take(1, [1, 2], 4, 0)[0].tolist()) == [1, 2]  # fewer than a batch


def test_a_diverged_training_is_named(ablation, tmp_path):
    system = ablation.small["ns_1e-3"]
    wild = dataclasses.replace(system.teaching, lr=1e30)
    task = ablation.training.Task(
        "ns_1e-3", dataclasses.replace(system, teaching=wild), None, tmp_path, "cpu"
    )
    with pytest.raises(RuntimeError, match="ns_1e-3: teacher, 0: diverged"):
        ablation.training.run(task)


def test_the_table_says_what_differs_and_what_does_not(ablation):
    keys = ("alone", "plain", "fixed", "relative", "mean", "aekd")
    names = {key: ablation.rows.ROWS[key].name for key in keys}
    errors = {
        "alone": [1.0, 1.1, 0.9],
        "plain": [0.50, 0.60, 0.55],
        "fixed": [0.40, 0.51, 0.45],
        "relative": [0.52, 0.57, 0.56],
        "mean": [0.50, 0.59, 0.56],
        "aekd": [0.51, 0.57, 0.56],
    }
    rows = pd.DataFrame(
        {"setting": QUARTER, "row": names[key], "seed": seed, "relative_l2": value}
        | {"system": "ns_1e-3", "hardware": "a machine", "source": "made up"}
        | dict.fromkeys(["mse", "band_0", "band_1"], value)
        for key, values in errors.items()
        for seed, value in enumerate(values)
    )
    text = ablation.report.report(rows, {"ns_1e-3": ablation.small["ns_1e-3"]}, ["None is."])
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| a q")}
    p = scipy.stats.ttest_rel(errors["fixed"], errors["plain"]).pvalue
    assert (
        f"| {1.36 / 1.65 - 1:+.1%} (p = {p:.2g}) | - | 0.4533 ± 0.0551 |" in lines[names["fixed"]]
    )
    p = scipy.stats.ttest_rel(errors["plain"], errors["alone"]).pvalue
    assert f"| {1.65 / 3 - 1:+.1%} (p = {p:.2g}) | - | - |" in lines[names["plain"]]
    # The aggregation of two teachers is compared with their mean.
    p = scipy.stats.ttest_rel(errors["aekd"], errors["mean"]).pvalue
    assert f"| {1.64 / 1.65 - 1:+.1%} (p = {p:.2g}) | 0.5467" in lines[names["aekd"]]
    assert list(lines) == list(names.values())
    assert f"p < 0.05: lower: {names['fixed']}." in text
    assert f"not told apart: {names['relative']}; {names['mean']}; {names['aekd']}." in text
    assert "None is." in text
    # Other seeds are no pairs.
    text = ablation.report.report(rows[1:], {"ns_1e-3": ablation.small["ns_1e-3"]}, [])
    assert f"| {QUARTER} | {names['plain']} | - | - | - |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--systems", "traffic"], "--systems traffic needs --data"),
        (["--systems", "traffic", "--data", "nowhere"], "nowhere/los_speed.csv does not exist"),
        (["--rows", "magic"], "invalid choice: 'magic'"),
        (["--systems", "weather"], "invalid choice: 'weather'"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, ablation, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(ablation, monkeypatch, tmp_path, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_traffic_without_data_is_left_out_and_said_so(ablation, monkeypatch):
    options = SimpleNamespace(preset="quick", systems=None, data=None)
    systems, left_out = ablation.main.chosen_systems(options)
    assert list(systems) == ["ns_1e-3", "ns_1e-5"]
    assert left_out == ["Traffic is left out: no folder was given with `--data`."]
