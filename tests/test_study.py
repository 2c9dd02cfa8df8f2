"""A study: equal steps, rows that are kept, labels, teachers, tables."""

import dataclasses
import re
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from sdkd_plugin import Bands, GridTransform, LatentPair
from sdkd_plugin.data import Symmetry
from sdkd_plugin.models import UNet
from sdkd_plugin.study import Arm, Samples, Task, standard_arms, study
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
    task = dataclasses.replace(task, extra_scores=lambda forecast, samples: {"bias": 0.0})
    run = partial(study, task, student=make_student, teacher=teacher, folder=tmp_path, **QUICK)
    assert set(run().rows.bias.dropna()) == {0.0}


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
    names = ("bands", "spectra", "fields", "latency", "steps", "training")
    pictures = {f"{name}.png" for name in names}
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
