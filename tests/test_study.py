"""A study: equal steps, rows that are kept, labels, teachers, tables, and the tasks by name."""

import dataclasses
import re
from functools import partial

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from torch import nn

from sdkd_plugin import Bands, GridTransform, LatentPair
from sdkd_plugin.data import Symmetry, simulate_traffic
from sdkd_plugin.models import GraphMixer, UNet
from sdkd_plugin.study import (
    Arm,
    Samples,
    Task,
    navier_stokes_task,
    rayleigh_benard_task,
    standard_arms,
    study,
    taxibj_task,
    traffic_task,
    weatherbench_task,
)
from sdkd_plugin.study.training import _batches


def samples(n: int, seed: int) -> Samples:
    x = torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Samples(x, x.flip(1) + 0.5 * x.roll(1, -1))


make_student = partial(nn.Conv2d, 2, 2, 3, padding=1)
make_net = partial(UNet, in_channels=2, out_channels=2, width=2, depth=1)
QUICK = {"steps": 4, "batch_size": 3, "validations": 2, "seeds": 1}


@pytest.fixture
def task() -> Task:
    return Task(
        train=samples(12, 0),
        validation=samples(4, 1),
        test=samples(4, 2),
        transform=GridTransform((8, 8)),
        bands=Bands.split(0.5),
        scale=2.0,
        offset=1.0,
        baselines={"persistence": lambda s: s.x},
    )


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(9)
    return make_net()


def test_a_student_alone_is_plain_training(task, teacher):
    result = study(task, student=make_student, arms=[Arm("alone", kd_weight=0)], lr=1e-2, **QUICK)
    torch.manual_seed(0)
    model = make_student()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    order = _batches(torch.arange(12), 3, 0)
    least = []
    for step in range(4):
        index = next(order)
        loss = (model(task.train.x[index]) - task.train.y[index]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step in (1, 3):
            error = (model(task.validation.x) - task.validation.y).square().mean()
            least.append(
                (float(error.detach()), {k: v.clone() for k, v in model.state_dict().items()})
            )
    error, state = min(least, key=lambda pair: pair[0])
    (found,) = result.models("alone")
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-7)
    row = result.rows[result.rows.model == "alone"].iloc[0]
    assert row.validation == pytest.approx(error)
    mse = float((found(task.test.x) - task.test.y).detach().square().mean())
    assert row.mse == pytest.approx(4 * mse)  # the scale is 2
    assert row.band_0 + row.band_1 == pytest.approx(row.mse)


def test_every_number_has_a_row_and_nothing_given_is_changed(task, teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teachers, random = [teacher, make_net()], torch.get_rng_state()
    result = study(task, student=make_student, teacher=teachers, **QUICK)
    assert torch.equal(torch.get_rng_state(), random)
    assert teacher.training
    assert all(torch.equal(value, before[k]) for k, value in teacher.state_dict().items())
    names = ["persistence", "teacher 1", "teacher 2", "mean of the teachers"]
    assert result.rows.model.tolist() == [*names, *(arm.name for arm in standard_arms())]
    assert result.rows.mse.nunique() == 7
    persistence = 4 * float((task.test.x - task.test.y).square().mean())
    assert result.rows.mse[0] == pytest.approx(persistence)
    students = result.rows[-3:]
    assert set(students.steps) == {4}
    assert set(students.parameters) == {2 * 2 * 9 + 2}
    with pytest.raises(RuntimeError, match="unequal steps and validations"):
        dataclasses.replace(result, rows=result.rows.assign(steps=range(7)))


def test_a_stopped_study_goes_on(task, teacher, tmp_path, monkeypatch):
    run = partial(study, task, student=make_student, teacher=teacher, folder=tmp_path, **QUICK)
    whole = study(task, student=make_student, teacher=teacher, **QUICK)
    trained = []
    real = task.__class__.labelled

    def counted(self, share, seed):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(seed)
        return real(self, share, seed)

    monkeypatch.setattr(Task, "labelled", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(list(tmp_path.iterdir())) == 2  # the student alone and plain-MSE distillation
    trained[:] = [None]
    resumed = run()
    assert trained == [None, 0]  # only the last arm
    pd.testing.assert_series_equal(resumed.rows.mse, whole.rows.mse)
    # Other options, weights or data are another protocol: theirs stay, unused.
    torch.manual_seed(10)
    trained[:] = []
    monkeypatch.setattr(Task, "labelled", real)
    other = run(teacher=make_net())
    assert other.rows.mse[2] == whole.rows.mse[2]  # the student alone has no teacher
    assert other.rows.mse[3] != whole.rows.mse[3]
    assert len(list(tmp_path.iterdir())) == 3 + 2
    assert set(run(lr=1e-2).rows.protocol[2:]).isdisjoint(whole.rows.protocol)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_processes(task, teacher):
    arms = [*standard_arms(labels=0.5, latents=[LatentPair()]), Arm("mixed", augmentation="mixup")]
    task = dataclasses.replace(task, baselines={})
    run = partial(study, task, student=make_net, teacher=teacher, arms=arms, **QUICK)
    scores = ["model", "mse", "mae", "validation", "parameters"]
    one, two = (run(jobs=jobs).rows[scores] for jobs in (1, 2))
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=0)


def test_arms_learn_from_what_they_say(task, teacher):
    rows = []
    real = Samples.select

    def watched(self, index, device="cpu"):
        if isinstance(index, torch.Tensor):
            rows.extend(index.tolist())
        return real(self, index, device)

    teach = {"student": make_student, "teacher": teacher, **QUICK, "steps": 40}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "select", watched)
        study(task, arms=[Arm("alone", kd_weight=0, labels=0.25)], **teach)
        assert set(rows) == set(task.labelled(0.25, 0).nonzero()[:, 0].tolist())
        assert len(set(rows)) == 3
        rows.clear()
        study(task, arms=[Arm("taught", labels=0.25)], **teach)
        assert set(rows) == set(range(12))
    assert len({tuple(task.labelled(0.25, seed).tolist()) for seed in range(4)}) > 1
    first = dataclasses.replace(task, labels_first=True).labelled(0.25, 7)
    assert first.nonzero()[:, 0].tolist() == [0, 1, 2]


def test_seeds_may_be_named(task, teacher, tmp_path):
    run = partial(study, task, student=make_student, teacher=teacher, folder=tmp_path)
    arms = [Arm("alone", kd_weight=0), Arm("taught", weighting=(1.0, 1.0))]
    named, counted = (run(arms=arms, **{**QUICK, "seeds": seeds}) for seeds in ([2, 1], 3))
    assert named.rows.seed.dropna().tolist()[-4:] == [2, 1, 2, 1]
    two, one = (dict(model.state_dict()) for model in named.models("taught"))
    for i, state in ((2, two), (1, one)):
        for name, value in counted.models("taught")[i].state_dict().items():
            assert torch.equal(state[name], value)
    assert "2 seed(s)" in named.report()
    assert named.page()


def test_labels_that_an_arm_may_not_see_do_not_matter(task, teacher):
    arms = [Arm("taught", labels=0.5)]
    run = partial(study, student=make_student, teacher=teacher, arms=arms, **QUICK)
    y = task.train.y.clone()
    y[~task.labelled(0.5, 0)] = 1e6
    spoilt = dataclasses.replace(task, train=dataclasses.replace(task.train, y=y))
    assert run(spoilt).rows.mse[2] == run(task).rows.mse[2]


def test_options_reach_the_loss(task, teacher):
    teachers = [teacher, make_student()]  # the second has no tap
    options = [
        {},
        {"kd_weight": 3.0},
        {"weighting": "relative"},
        {"teachers": 1},
        {"aggregation": "camkd"},
        {"augmentation": "noise"},
        {"latents": (LatentPair(),), "teachers": 1},
        {"teacher_bound": 0.0, "labels": 0.5},
        {"model": make_student},
    ]
    arms = [Arm(str(i), **each) for i, each in enumerate(options)]
    result = study(task, student=make_net, teacher=teachers, arms=arms, **{**QUICK, "steps": 8})
    assert result.rows.mse.nunique() == 4 + len(options)


class Scaled(nn.Module):
    """A factor for each point of the grid."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((8, 8), factor))
        self.latent = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.latent(self.factor * x)


def test_a_symmetry_moves_labels_and_teachers_forecasts_with_the_inputs(task):
    shifts = [lambda w: w.roll(1, -1), lambda w: -w.roll(1, -2)]
    x = torch.ones(12, 2, 8, 8)
    x[:, :, :4] = 0  # half of the points are never seen without the symmetry
    only = Samples(x, 2 * x, torch.rand(12, 2, 8, 8) < 0.9)
    task = dataclasses.replace(task, train=only, baselines={})
    moved = dataclasses.replace(task, symmetry=Symmetry("shifts", shifts))
    arms = [Arm("alone", kd_weight=0), Arm("taught", labels=0.5)]
    run = partial(study, teacher=Scaled(2.0), lr=0.1, **{**QUICK, "steps": 12})
    taps = Arm("latents", latents=(LatentPair(),))
    result = run(moved, student=partial(Scaled, 0.0), arms=[*arms, taps])
    plain = run(task, student=partial(Scaled, 0.0), arms=arms)
    for arm in result.arms:
        assert (result.models(arm.name, setting=arm.setting)[0].factor != 0).all()
    for arm in plain.arms:
        (model,) = plain.models(arm.name, setting=arm.setting)
        assert (model.factor[:4] == 0).all()
    # The right factors have no error wherever a sample is moved, so that they stay.
    kept = run(moved, student=partial(Scaled, 2.0), arms=arms)
    for arm in kept.arms:
        (model,) = kept.models(arm.name, setting=arm.setting)
        assert (model.factor == 2).all()
    assert "moved by the symmetries of shifts" in kept.protocol()
    assert set(result.rows.protocol.dropna()).isdisjoint(plain.rows.protocol.dropna())


def test_a_table_compares_with_the_first_arms_and_the_base(task, teacher):
    arms = [*standard_arms(), Arm("again", weighting="fixed", kd_weight=2.0, base="SDKD")]
    arms += standard_arms(labels=0.5)[:2]
    result = study(task, student=make_student, teacher=teacher, arms=arms, **{**QUICK, "seeds": 3})
    lines = [line.split(" | ") for line in result.table().splitlines()]
    heads = ["MSE against student alone", "MSE against plain-MSE distillation", "its base"]
    assert [head in cell for head, cell in zip(heads, lines[0][2:5], strict=True)] == [True] * 3
    cells = {(line[0].strip("| "), line[1]): line[2:5] for line in lines[2:]}
    against = str(result.change("again", "SDKD"))
    assert "p = " in against
    assert cells["all labels", "again"][2] == against
    assert cells["all labels", "student alone"] == ["-", "-", "-"]
    half = str(
        result.change("plain-MSE distillation", "student alone", setting="50% of the labels")
    )
    assert cells["50% of the labels", "plain-MSE distillation"] == [half, "-", "-"]
    means = result.rows.groupby("model").validation.mean()
    assert f"validation data: {means.idxmin()}." in result.report()


def test_a_folder_has_table_rows_and_pictures(task, teacher, tmp_path):
    result = study(task, student=make_student, teacher=teacher, **QUICK)
    result.write(tmp_path / "out")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    pictures = {f"{name}.png" for name in ("bands", "spectra", "fields", "latency", "training")}
    assert set(written) == {"report.html", "table.md", "results.csv", *pictures}
    assert all(v.startswith(b"\x89PNG") for k, v in written.items() if k.endswith("png"))
    assert written["table.md"].decode() == result.report()
    assert "p = " not in result.report().split("\n\n")[1]  # one seed is no test


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "`seeds` is 0, expected an integer of at least 1"),
        ({"seeds": [1, 1]}, "`seeds` is [1, 1], expected one or more, each once"),
        ({"steps": 1}, "`steps` is 1, expected an integer of at least 2"),
        ({"lr": -1.0}, "`lr` is -1.0, expected a finite number above 0"),
        ({"teacher": ()}, "`teacher` has 0 teachers, expected at least 1 for 'plain-MSE"),
        ({"arms": [Arm("a", teachers=2)]}, "has 1 teachers, expected 2 for 'a'"),
        ({"student": None}, "`student` is None, but 'student alone' has no model of its own"),
        ({"arms": [Arm("a"), Arm("a", kd_weight=2.0)]}, "'a' for all labels, which is taken"),
        ({"arms": [Arm("teacher")]}, "`arms` has 'teacher' for all labels, which is taken"),
        ({"arms": [Arm("a", labels=0.01, kd_weight=0)]}, "is 0.01 for 'a': none of 12 samples"),
        ({"jobs": 2, "student": lambda: make_student()}, "no lambdas, or jobs=1"),
    ],
)
def test_bad_studies(options, message, task, teacher):
    with pytest.raises(ValueError, match=re.escape(message)):
        study(task, **{"student": make_student, "teacher": teacher, **QUICK, **options})


def test_bad_tasks_arms_and_trainings(task, as_shipped):
    with pytest.raises(ValueError, match=r"12 samples, but \{'y': 4\} of the others"):
        dataclasses.replace(task, validation=Samples(task.train.x, task.test.y))
    bad = dataclasses.replace(task.test, x=task.test.x * torch.nan)
    with pytest.raises(ValueError, match=r"`test.x` has 512 of 512 values that are NaN"):
        dataclasses.replace(task, test=bad)
    with pytest.raises(ValueError, match=r"`labels` is 0 for 'a', expected a share in \(0, 1\]"):
        Arm("a", labels=0, kd_weight=0)
    with pytest.raises(ValueError, match="`teachers` is 0, expected an integer of at least 1"):
        Arm("a", teachers=0)
    broken = make_net()
    nn.init.constant_(next(broken.parameters()), torch.nan)
    with pytest.raises(ValueError, match=r"forecast of teacher` has .* NaN"):
        study(task, student=make_student, teacher=broken, **QUICK)
    with pytest.raises(RuntimeError, match="task: alone, seed 0 diverged"):
        study(task, student=make_net, arms=[Arm("alone", kd_weight=0)], **{**QUICK, "lr": 1e30})


def trained(task: Task, make: partial) -> pd.Series:
    """The row of a model that is trained for a few steps."""
    result = study(task, student=make, arms=[Arm("alone", kd_weight=0)], lr=1e-3, **QUICK)
    assert {"persistence", "alone"} == set(result.rows.model)
    return result.rows.iloc[0]


def test_trajectories_and_convection(tmp_path, monkeypatch):
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path / "cache"))
    fields = torch.randn(9, 5, 8, 8)
    np.save(tmp_path / "u.npy", fields.numpy())
    task = navier_stokes_task(tmp_path / "u.npy", sizes=(4, 2, 2), frames=(3, 2))
    torch.testing.assert_close(task.physical(task.test.y), fields[6:8, 3:])
    assert task.train.x.mean() == pytest.approx(0, abs=1e-6)
    last = fields[6:8, 2:3].expand(-1, 2, -1, -1)
    row = trained(task, partial(nn.Conv2d, 3, 2, 1))
    assert row.mse == pytest.approx(float((last - fields[6:8, 3:]).square().mean()), rel=1e-4)
    with pytest.raises(ValueError, match=r"shape \(9, 5, 8, 8\), expected .* at least 200"):
        navier_stokes_task(tmp_path / "u.npy")
    small = {"resolution": (16, 8), "solver_resolution": (16, 12), "rayleigh": 1e4, "spin_up": 0.0}
    layer = rayleigh_benard_task(sizes=(2, 1, 1), frames=(2, 1), **small)
    assert layer.transform.boundary == "reflect"
    assert layer.train.x.shape == (2, 2, 16, 8)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    trained(layer, partial(nn.Conv2d, 2, 1, 1))


def test_taxi_flows(tmp_path):
    index = pd.date_range("2013-07-01", periods=60, freq="30min").delete([20])
    flows = np.random.default_rng(0).poisson(5, (59, 2, 8, 8))
    with h5py.File(tmp_path / "BJ13_M32x32_T30_InOut.h5", "w") as content:
        content["data"] = flows
        slots = index.hour * 2 + index.minute // 30 + 1
        content["date"] = [f"{d:%Y%m%d}{s:02d}".encode() for d, s in zip(index, slots, strict=True)]
    task = taxibj_task(tmp_path, validation="2013-07-01 15:00", test="2013-07-01 22:00")
    assert [len(part) for part in (task.train, task.validation, task.test)] == [15, 11, 13]
    expected = torch.from_numpy(flows[-4:].reshape(8, 8, 8)).float()
    torch.testing.assert_close(task.physical(task.test.y[-1]), expected)
    last = np.tile(flows[-5], (4, 1, 1)).reshape(8, 8, 8)
    task = dataclasses.replace(task, test=task.test.select(slice(-1, None)))
    row = trained(task, partial(nn.Conv2d, 8, 8, 1))
    assert row.mae == pytest.approx(np.abs(last - flows[-4:].reshape(8, 8, 8)).mean(), rel=1e-4)


def test_weather(tmp_path):
    hours = pd.date_range("2016-12-30", periods=120, freq="6h")
    axes = {"time": hours, "lat": [-45.0, 45.0], "lon": [0.0, 90.0, 180.0, 270.0]}
    for name, size in {"t2m": 10.0, "u10": 0.1}.items():
        values = size * np.random.default_rng(0).normal(size=(120, 2, 4))
        field = xarray.DataArray(values, axes, name=name)
        field.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    task = weatherbench_task(
        tmp_path,
        {"t2m": None, "u10": None},
        validation="2017-01-10",
        test="2017-01-20",
        every=1,
        frames=(2, 1),
    )
    assert [len(part) for part in (task.train, task.validation, task.test)] == [42, 38, 34]
    row = trained(task, partial(nn.Conv2d, 4, 2, 1))
    assert row.rmse_t2m == pytest.approx(100 * row.rmse_u10, rel=1e-3)
    assert row.rmse_t2m == pytest.approx(10 * 2**0.5, rel=0.2)  # of two independent fields
    with pytest.raises(ValueError, match="`test` has 0 times, expected at least 3"):
        weatherbench_task(
            tmp_path, {"t2m": None}, validation="2017", test="2019", frames=(2, 1), every=1
        )


def test_traffic_windows_do_not_overlap_in_their_targets():
    data = simulate_traffic(n_sensors=8, days=2, seed=1, progress=False)
    mask = torch.ones_like(data.mask)
    mask[550:555, 3] = False
    data = dataclasses.replace(data, speed=data.filled(), mask=mask)
    task, steps, readings = traffic_task(data), len(data.index), data.filled()
    ends = [12, round(0.7 * steps), round(0.8 * steps), steps]
    for part, begin, end in zip(
        (task.train, task.validation, task.test), ends, ends[1:], strict=False
    ):
        assert len(part) == end - begin - 11
        for at, first in ((0, begin), (-1, end - 12)):
            torch.testing.assert_close(
                task.physical(part.y[at, ..., 0]), readings[first : first + 12]
            )
            torch.testing.assert_close(
                task.physical(part.x[at, ..., 0]), readings[first - 12 : first]
            )
    assert int((~task.test.mask).sum()) == 12 * 5  # five gaps, each in twelve windows
    assert task.at == {"15": 2, "30": 5, "60": 11}
    hours = dataclasses.replace(data, index=pd.date_range("2024", periods=steps, freq="1h"))
    assert traffic_task(hours).at == {"60": 0, "180": 2, "360": 5, "720": 11}
    make = partial(
        GraphMixer,
        input_size=1,
        exog_size=2,
        window=12,
        horizon=12,
        n_nodes=8,
        hidden_size=8,
        emb_size=4,
        n_layers=1,
    )
    row = trained(task, make)
    error = (task.test.x[:, -1:] - task.test.y) * task.test.mask * task.scale
    assert row.mae_30 == pytest.approx(float(error[:, 5].abs().sum() / task.test.mask[:, 5].sum()))
    result = study(task, student=make, arms=[Arm("alone", kd_weight=0)], **QUICK)
    # a graph has spectra, a map by its eigenvectors and series, and no plane
    assert set(result.figures()) == {"bands", "latency", "spectra", "sensors", "series", "training"}
