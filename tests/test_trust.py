"""What a teacher keeps of its weight: known answers, no harm by a useless one, state and hosts."""

import warnings

import pytest
import torch
from small import random
from torch import nn

from sdkd_plugin import (
    Bands,
    DistillationLoss,
    GridTransform,
    SDKDDistiller,
    measure_teachers,
)
from sdkd_plugin.losses.trust import TeacherTrust
from sdkd_plugin.study import Arm, Samples, Task, study

GRID, BANDS = GridTransform((8, 8)), Bands.split(0.25)


class Known(nn.Module):
    """Forecasts a field that it was given."""

    def __init__(self, forecast: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("forecast", forecast)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forecast


def fields(n: int = 400) -> list[torch.Tensor]:
    return [random(n, 1, 8, 8, seed=i) for i in range(4)]


def measured(teacher: torch.Tensor, student: torch.Tensor, y: torch.Tensor, **batch: object):
    loss = DistillationLoss(Known(teacher), GRID, BANDS)
    return loss, measure_teachers(loss, Known(student), [{"x": y, "y": y, **batch}])


def test_a_better_teacher_keeps_its_weight():
    y, a, b, _ = fields()
    _, report = measured(y + 0.1 * a, y + 0.2 * b, y)
    assert report.weights.tolist() == [1, 1]
    assert not report.worse


@pytest.mark.parametrize(("size", "weight"), [(1.0, 1.0), (1.1**0.5, 0.524), (1.25**0.5, 0.0)])
def test_a_worse_teacher_fades(size: float, weight: float):
    y, a, b, _ = fields(20_000)
    # With independent errors D = S + T.
    _, report = measured(y + size * a, y + b, y)
    torch.testing.assert_close(report.weights, torch.full((2,), weight), rtol=0, atol=0.12)


def test_a_teacher_that_shares_the_students_error_and_adds_its_own_loses_all():
    y, a, b, _ = fields()
    _, report = measured(y + a + b, y + a, y)
    assert float(report.weights.max()) < 0.1


def test_each_band_is_judged_by_itself_and_label_noise_cancels():
    y, a, b, noise = fields(4000)
    low = GRID.filter(a, lambda f: (f < 0.25).float())
    _, clean = measured(y + low, y + 0.3 * b, y)
    assert clean.weights[0] < 0.2
    assert clean.weights[1] == 1
    _, noisy = measured(y + low, y + 0.3 * b, y + 2 * noise)
    torch.testing.assert_close(noisy.weights, clean.weights, rtol=0, atol=0.1)


def test_it_warns_once_and_the_report_reads_as_a_table():
    y, a, b, _ = fields(8)
    loss = DistillationLoss(Known(y + 2 * a), GRID, BANDS)
    batch = {"x": y, "y": y}
    message = r"not the better one(.|\n)*weight of the teacher"
    with pytest.warns(UserWarning, match=message) as caught:
        report = measure_teachers(loss, Known(y + b), [batch], {"zero": torch.zeros_like})
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_teachers(loss, Known(y + b), [batch])
    assert [line.split()[0] for line in str(report).splitlines()[1:]] == [
        "student",
        "teacher",
        "zero",
        "weight",
    ]
    assert report.scalars()["zero_mse"] == pytest.approx(float(y.square().mean()), rel=1e-5)


def test_the_loss_and_its_gradient_have_the_measured_weights():
    y, a, b, _ = fields(4000)
    loss, report = measured(y + 1.02 * a, y + b, y)
    student = (y + b).requires_grad_()
    terms = loss(student, y)
    assert torch.equal(terms.band_weights, report.weights * torch.tensor([1.0, 2.0]))
    assert 0 < float(report.weights.min()) < 1
    plain = DistillationLoss(Known(y + 1.02 * a), GRID, BANDS, trust=False)
    expected = plain(student, y).frequency * terms.band_weights
    assert float(terms.total.detach()) == pytest.approx(float(expected.sum()), rel=1e-5)
    again = DistillationLoss(Known(y + 1.02 * a), GRID, BANDS)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(student, y).total, terms.total)
    assert loss.half().trust.weights.dtype == torch.float32


def test_without_a_measurement_nothing_changes():
    y, a, b, _ = fields(4)
    pair = [DistillationLoss(Known(y + a), GRID, BANDS, trust=on) for on in (True, False)]
    first, second = (loss(y + b, y).total for loss in pair)
    assert torch.equal(first, second)


def test_masked_labels_are_left_out_and_errors_name_what_is_wrong():
    y, a, b, _ = fields(8)
    seen = torch.ones_like(y, dtype=torch.bool)
    seen[0] = False
    _, some = measured(y + 0.1 * a, y + b, y.masked_fill(~seen, torch.nan), mask=seen)
    _, rest = measured((y + 0.1 * a)[1:], (y + b)[1:], y[1:])
    torch.testing.assert_close(some.errors["teacher"], rest.errors["teacher"])
    with pytest.raises(ValueError, match="no label was observed"):
        TeacherTrust(2).update()
    with pytest.raises(ValueError, match="NaN"):
        measured(y, y, y * torch.nan)


def test_a_useless_teacher_does_not_hurt_a_study():
    """A linear map with noisy labels; the teacher is wrong by the student's own size."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(1, 1, 3, 3, generator=generator)
    x = torch.randn(60, 1, 8, 8, generator=generator)
    y = nn.functional.conv2d(nn.functional.pad(x, (1,) * 4, "circular"), kernel)
    split = [Samples(x[a:b], y[a:b]) for a, b in ((0, 30), (30, 45), (45, 60))]
    names = dict(zip(("train", "validation", "test"), split, strict=True))
    task = Task(**names, transform=GRID, bands=BANDS)

    def student() -> nn.Module:
        return nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")

    teacher = student()
    nn.init.constant_(teacher.weight, 1.0)
    arms = [Arm("alone", kd_weight=0), Arm("safe"), Arm("hurt", trust=False)]
    options = {"seeds": 1, "steps": 400, "lr": 0.05, "validations": 20}
    rows = study(task, student=student, teacher=teacher, arms=arms, **options).rows
    mse = rows.set_index("model").mse
    assert mse["hurt"] > 100 * mse["alone"]
    assert mse["safe"] < mse["alone"] + 1e-3 * mse["hurt"]


def test_the_distiller_passes_the_option_on():
    model = nn.Conv2d(1, 1, 1)
    assert SDKDDistiller(nn.Conv2d(1, 1, 1), model, GRID, trust=False).loss.trust is None
