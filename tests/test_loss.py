"""The distillation loss: its parts, the teachers it keeps, and everything it must not change."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import BANDS, GRID, LATENTS, X, Y, make_loss, net, random, refusals, same, teacher_net
from torch import Tensor, nn

from sdkd_plugin import (
    AdaptiveWeighting,
    AEKDAggregation,
    Bands,
    ConfidenceWeighting,
    DistillationLoss,
    GridTransform,
    LatentPair,
    TeacherOutput,
    frequency_aligned_loss,
)

FORECAST = random(*Y.shape, seed=7)


def two_teachers() -> list[nn.Module]:
    return [teacher_net(), net(6, seed=4)]


def fitted(**options: object) -> tuple[DistillationLoss, nn.Module]:
    """A loss of latents and the student it was fitted to."""
    student = net()
    return make_loss(latents=LATENTS, **options).fit_latents(student, X[:2]), student


def of_latents(loss: DistillationLoss, student: nn.Module, **options: object):
    return loss(student(X), X, Y, latents={"0": student[0](X)}, **options)


def test_the_total_is_the_sum_of_the_named_parts(device: torch.device):
    loss, student = fitted(weighting=(0.5, 2.0), kd_weight=0.7)
    loss, student, x = loss.to(device), student.to(device), X.to(device)
    forecast = student(x)
    terms = loss(forecast, x, latents={"0": student[0](x)})
    (theirs,) = loss.teacher_outputs(x)
    kd = frequency_aligned_loss(forecast, theirs.forecast, loss.transform, BANDS, (0.5, 2.0))
    latents = [pair.weight * terms.features[pair.name] for pair in LATENTS]
    torch.testing.assert_close(terms.total, 0.7 * (kd + sum(latents)))
    assert list(terms.features) == ["0<-0", "0<-3"]
    assert terms.band_weights.tolist() == [0.5, 2.0]
    assert terms.teacher_weights.tolist() == [1]
    assert terms.task is None
    torch.testing.assert_close(
        terms.frequency.sum(), F.mse_loss(forecast, theirs.forecast).detach()
    )
    parts = [terms.frequency, terms.band_weights, terms.teacher_weights, *terms.features.values()]
    assert terms.total.requires_grad
    assert not any(part.requires_grad for part in parts)


def test_with_task_adds_the_task_term_and_scalars_names_all():
    terms, task = make_loss()(FORECAST, X), torch.tensor(3.0, requires_grad=True)
    assert "task" not in terms.scalars()
    together = terms.with_task(task)
    torch.testing.assert_close(together.total, terms.total + 3)
    names = ["total", "task", "kd_band_0", "kd_band_1", "weight_0", "weight_1", "teacher_weight_0"]
    assert list(together.scalars()) == names
    assert not any(value.requires_grad for value in together.scalars().values())


def test_without_weight_no_teacher_runs_and_no_term_is_made_up():
    def teacher(x: Tensor) -> Tensor:
        raise AssertionError

    terms = make_loss(teacher=teacher, kd_weight=0.0)(FORECAST, X, Y)
    assert terms.total == 0
    assert (terms.frequency, terms.band_weights, terms.teacher_weights) == (None, None, None)
    assert terms.features == {}
    task = torch.tensor(0.1, requires_grad=True)
    assert terms.with_task(task).total is task


def test_defaults_are_those_documented():
    loss = DistillationLoss(teacher_net(), GridTransform(GRID))
    assert loss.bands == Bands.split(0.25)
    assert (loss.kd_weight, loss.resolutions, loss.check_finite) == (1, "equal", True)
    assert loss(FORECAST, X).band_weights.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, False),
        ({"weighting": "adaptive"}, False),
        ({"aggregation": "aekd"}, False),
        ({"weighting": ConfidenceWeighting(2, decay=None)}, False),
        ({"weighting": "confidence"}, True),
        ({"aggregation": "camkd"}, True),
        ({"teacher_bound": 0.0}, True),
    ],
)
def test_needs_labels(options: dict, needs: bool):
    assert make_loss(**options).needs_labels is needs


def test_labels_and_masks_change_nothing_where_they_judge_no_teacher():
    loss, hidden = make_loss(), torch.full_like(Y, torch.nan)
    masked = loss(FORECAST, X, hidden, torch.zeros_like(Y, dtype=torch.bool))
    assert loss(FORECAST, X).total == loss(FORECAST, X, Y).total == masked.total


def test_teachers_are_bit_identical_after_training():
    given = two_teachers()
    before = [copy.deepcopy(teacher.state_dict()) for teacher in given]
    student = net()
    loss = make_loss(teacher=given, latents=LATENTS).fit_latents(student, X)
    forecasts = [teacher(X) for teacher in loss.teachers]
    optimiser = torch.optim.Adam([*student.parameters(), *loss.parameters()], 1e-2)
    for mode in (True, False, True):
        loss.train(mode)
        of_latents(loss, student.train()).total.backward()
        optimiser.step()
        assert not any(module.training for each in loss.teachers for module in each.modules())
    for mine, theirs, state in zip(loss.teachers, given, before, strict=True):
        assert same(state.values(), mine.state_dict().values())
        assert same(state.values(), theirs.state_dict().values())
        assert all(p.grad is None and not p.requires_grad for p in mine.parameters())
        assert all(p.grad is None and p.requires_grad for p in theirs.parameters())
        assert all(module.training for module in theirs.modules())
    assert same(forecasts, [teacher(X) for teacher in loss.teachers])


def test_teachers_are_no_parameters_state_or_children():
    loss, _ = fitted(weighting="adaptive")
    theirs = {id(tensor) for tensor in loss.teachers[0].state_dict(keep_vars=True).values()}
    assert not theirs & {id(p) for p in loss.parameters()}
    assert loss.teachers[0] not in set(loss.modules())
    names = {".".join(name.split(".")[:3]) for name in loss.state_dict()}
    measured = {f"trust.{name}" for name in ("errors", "weights")}
    measured.add("frequency.weighting.averages")
    assert names == measured | {f"latent_losses.by_pair.{i}" for i in "01"}
    assert {id(p) for p in loss.parameters()} == {id(p) for p in loss.latent_losses.parameters()}


def test_what_was_given_stays_where_it_was_when_the_loss_moves(device: torch.device):
    teacher, transform = teacher_net(), GridTransform(GRID, "reflect")
    weighting, aggregation = AdaptiveWeighting(2), AEKDAggregation()
    loss, other = (
        make_loss(
            teacher=teacher, transform=transform, weighting=weighting, aggregation=aggregation
        )
        for _ in range(2)
    )
    # One memory until the loss moves.
    assert loss.teachers[0][0].weight.data_ptr() == teacher[0].weight.data_ptr()
    loss.to(device, torch.float64)
    x, forecast = (tensor.to(device, torch.float64) for tensor in (X, FORECAST))
    terms = loss(forecast, x)
    assert (terms.total.dtype, terms.total.device.type) == (torch.float64, device.type)
    assert terms.frequency.dtype == terms.band_weights.dtype == torch.float64
    for given in (teacher, transform, weighting, other.teachers[0], other):
        tensors = [*given.parameters(), *given.buffers()]
        assert {t.device.type for t in tensors} == {"cpu"}
    assert {p.dtype for p in (*teacher.parameters(), *other.teachers[0].parameters())} == {
        torch.float32
    }
    loss.to("meta")
    assert teacher(X).device.type == transform(FORECAST).device.type == "cpu"
    assert not any(value.any() for value in weighting.buffers())
    assert not any(value.any() for value in other.frequency.weighting.buffers())
    assert loss.aggregation is not aggregation
    assert other(FORECAST, X).total.dtype == torch.float32


def test_copies_pickles_and_checkpoints_give_the_same_terms():
    loss, student = fitted(weighting="adaptive")
    for _ in range(3):
        of_latents(loss, student)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(1.5)
    loaded, _ = fitted(weighting="adaptive")
    loaded.load_state_dict(loss.state_dict())
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loaded]  # noqa: S301
    expected = of_latents(loss, student).total
    for twin in twins:
        assert twin.teachers[0] is not loss.teachers[0]
        assert torch.equal(of_latents(twin, student).total, expected)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_known_outputs_give_the_terms_of_live_ones(context: type):
    loss, student = fitted()
    x = X.clone().requires_grad_()
    with context():
        outputs = loss.teacher_outputs(x)
    assert set(outputs[0].latents) == {"0", "3"}
    assert not outputs[0].forecast.requires_grad
    results = []
    for options in ({"outputs": outputs}, {}):
        student.zero_grad()
        terms = of_latents(loss, student, **options)
        terms.total.backward()
        results.append([terms.total, terms.frequency, *[p.grad for p in student.parameters()]])
    assert same(*results)


def test_inputs_that_no_teacher_accepts_are_ignored():
    def teacher(x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        return FORECAST if shift is None else FORECAST + shift

    loss = make_loss(teacher=[teacher, net()])
    unused = torch.full((2,), torch.nan)
    assert loss(FORECAST, X, other=unused).total == loss(FORECAST, X).total
    assert loss(FORECAST, X, shift=torch.ones(())).total > loss(FORECAST, X).total
    with pytest.raises(ValueError, match="`shift` has 1 of 1 values that are NaN or Inf"):
        loss(FORECAST, X, shift=torch.tensor(torch.nan))


def test_an_autocast_step_is_compared_in_float32(device: torch.device):
    loss, student = fitted()
    loss, student, x = loss.to(device), student.to(device), X.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        terms = loss(student(x), x, latents={"0": student[0](x)})
    assert {terms.frequency.dtype, terms.band_weights.dtype, terms.total.dtype} == {torch.float32}
    terms.total.backward()
    assert all(p.grad.isfinite().all() for p in (*student.parameters(), *loss.parameters()))
    exact = loss(student(x), x, latents={"0": student[0](x)})
    torch.testing.assert_close(terms.frequency, exact.frequency, rtol=0.05, atol=0)


def test_the_mean_of_several_teachers_is_distilled():
    loss = make_loss(teacher=nn.ModuleList(two_teachers()), weighting=(0.5, 2.0))
    mean = torch.stack([teacher(X) for teacher in loss.teachers]).mean(0)
    expected = frequency_aligned_loss(FORECAST, mean, loss.transform, BANDS, (0.5, 2.0))
    terms = loss(FORECAST, X)
    torch.testing.assert_close(terms.total, expected)
    assert terms.teacher_weights.tolist() == [0.5, 0.5]
    twice = make_loss(teacher=[teacher_net(), teacher_net()])(FORECAST, X)
    torch.testing.assert_close(twice.total, make_loss()(FORECAST, X).total)


@pytest.mark.parametrize(
    ("margin", "kept"), [(0.5, [0, 1, 0, 1]), (0.6, [1, 1, 0, 1]), (0.8, [1, 1, 1, 1])]
)
def test_teacher_bound_by_hand(margin: float, kept: list[int]):
    y = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, torch.nan], [torch.nan, torch.nan]])
    student = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.5, 9.0], [9.0, 9.0]])
    teacher = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    # Errors: .5 against 1, 2 against 1, .25 against 1; nothing observed, which is distilled.
    options = {"weighting": (1.0, 1.0), "teacher_bound": margin, "transform": GridTransform((2,))}
    y, student, teacher = (tensor[:, None] for tensor in (y, student, teacher))
    loss = make_loss(bands=Bands.split(0.5), **options)
    student.requires_grad_()
    terms = loss(student, y=y, mask=~y.isnan(), outputs=[TeacherOutput(teacher)])
    squares = (student - teacher).square().mean((1, 2)).detach()
    expected = (squares * torch.tensor(kept)).mean()
    torch.testing.assert_close(terms.total.detach(), expected)
    # The reported distance is that of all samples.
    torch.testing.assert_close(terms.frequency.sum(), squares.mean())
    (gradient,) = torch.autograd.grad(terms.total, student)
    assert gradient.flatten(1).any(1).tolist() == [bool(k) for k in kept]
    unlabelled = loss(student, outputs=[TeacherOutput(teacher)])
    torch.testing.assert_close(unlabelled.total.detach(), squares.mean())


def test_bands_in_which_a_teacher_is_0_are_named_once():
    def mean(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3), keepdim=True).expand(-1, 3, *GRID)

    loss = make_loss(teacher=[net(), mean], weighting="relative")
    message = r"the forecast of teacher 1 \(.*\) is 0 in the bands \[1\] \(0 is the lowest\)"
    with pytest.warns(UserWarning, match=message) as caught:
        assert loss(FORECAST, X).total.isfinite()
    assert [Path(each.filename) for each in caught] == [Path(__file__)]  # at the caller
    loss(FORECAST, X)
    make_loss(teacher=mean, check_finite=False)(FORECAST, X)


test_construction_refuses = refusals(
    ({"teacher": []}, "`teacher` is an empty sequence, expected at least one teacher"),
    ({"teacher": "unet"}, "`teacher` is 'unet', expected a module, a function, or a sequence"),
    ({"teacher": [net(), None]}, "`teacher` is None, expected a module, a function, or"),
    ({"teacher": nn.Conv2d}, "`teacher` is <class 'torch.*Conv2d'>, expected a module"),
    ({"transform": GRID}, "`transform` is of type tuple, expected AbstractTransform, such as"),
    ({"bands": 0.25}, r"`bands` is of type float, expected Bands, such as Bands.split\(0.25\)"),
    ({"weighting": "adaptiv"}, r"`weighting` is 'adaptiv', .* Did you mean 'adaptive'\?"),
    ({"weighting": 3}, r"`weighting` is 3, expected one of \['fixed', 'relative', "),
    ({"weighting": (1.0,)}, "`weights` has 1 values, expected 2: one for each band"),
    ({"weighting": AdaptiveWeighting(3)}, "`weights` has 3 values, expected 2: .* Adap"),
    ({"kd_weight": -0.5}, "`kd_weight` is -0.5, expected a finite number at least 0"),
    ({"kd_weight": float("nan")}, "`kd_weight` is nan, expected a finite number at least 0"),
    ({"aggregation": "aked"}, r"`aggregation` is 'aked', expected one of .* mean 'aekd'\?"),
    ({"teacher_bound": -1}, "`teacher_bound` is -1, expected a finite number at least 0"),
    ({"resolutions": "any"}, r"`resolutions` is 'any', expected one of \['equal', 'shared'\]"),
    ({"latents": LATENTS[0]}, r"`latents` is of type LatentPair, expected Sequence, such as"),
    ({"latents": ["0"]}, r"`latents` is of type str, expected LatentPair, such as"),
    ({"latents": [LATENTS[0]] * 2}, r"`latents` is \['0<-0', '0<-0'\], expected each pair onc"),
    (
        {"latents": [LatentPair("0", "0", teacher_index=1)]},
        "`LatentPair.teacher_index` is 1, expected a teacher from 0 to 0",
    ),
    (
        {"latents": [LatentPair("0", "latent")]},
        r"`Sequential` has no tap 'latent'; it names \[\], and any module path will do",
    ),
    of=make_loss,
)


SEEN = torch.ones_like(Y, dtype=torch.bool)
ONE = torch.arange(Y.numel()).reshape(Y.shape) == 7
BAD_Y, BAD_X = Y.masked_fill(ONE, torch.inf), X.masked_fill(ONE[:, :2], torch.nan)


test_a_batch_is_refused = refusals(
    ({}, "`x` and `outputs` are None, expected one of them"),
    ({"x": X[:0]}, r"`x` has shape \(0, 2, 8, 9\), expected at least one sample"),
    ({"x": BAD_X}, "`x` has 1 of 720 values that are NaN or Inf"),
    ({"x": X, "y": BAD_Y}, "`y` has 1 of 1080 values that are NaN or Inf"),
    ({"x": X, "y": BAD_Y, "mask": SEEN}, "`y` has 1 of 1080 values that are NaN or Inf"),
    ({"x": X, "y": Y[:1]}, r"`y` has shape \(1, 3, 8, 9\), expected \(5, 3, 8, 9\)"),
    ({"x": X, "mask": SEEN}, "`mask` is given but `y` is None"),
    ({"x": X, "y": Y, "mask": SEEN.float()}, "`mask` is of torch.float32, expected torch.bool"),
    ({"x": X, "y": Y, "mask": SEEN[:, :2]}, r"`mask` has shape \(5, 2, 8, 9\), expected \(5,"),
    ({"x": X, "y": Y, "mask": SEEN[0]}, r"`mask` has shape \(3, 8, 9\), expected \(5, 3, 8, 9"),
    ({"outputs": ()}, "`outputs` has 0 entries, expected 1: one a teacher"),
    (
        {"outputs": [TeacherOutput(BAD_Y)]},
        r"`forecast of teacher 0 \(Sequential\)` has 1 of 1080 values that are NaN or Inf",
    ),
    (
        {"outputs": [TeacherOutput(Y[:, :1])]},
        r"`forecast of teacher 0 \(S.*\)` has shape \(5, 1, 8, 9\), expected \(5, 3, 8",
    ),
    of=lambda **batch: make_loss()(FORECAST, **batch),
)


def test_nan_passes_only_where_finite_values_are_not_checked():
    bad = [TeacherOutput(BAD_Y)]
    assert not make_loss(check_finite=False)(FORECAST, outputs=bad).total.isfinite()
