"""Distillation by neuraloperator's trainer: task losses, masks, resuming, evaluation, units."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from neuralop_parts import (
    LATENT,
    assert_same,
    distillation,
    fields,
    fno,
    l1,
    measuring,
    run,
    train,
    unet,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import (
    AMSE,
    AdaptiveWeighting,
    AtResolution,
    Bands,
    GridTransform,
    SpectralLoss,
    precompute,
)
from sdkd_plugin.adapters.neuralop import (
    Renormalized,
    ResumableState,
    TrainerLoss,
    distillation_dataset,
)
from sdkd_plugin.taps import TapReader

from neuralop import H1Loss, LpLoss, Trainer  # isort: skip
from neuralop.data.transforms.data_processors import DefaultDataProcessor  # isort: skip
from neuralop.data.transforms.normalizers import UnitGaussianNormalizer  # isort: skip
from neuralop.layers.spectral_convolution import SpectralConv  # isort: skip


def observed(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda out, y, mask: loss(torch.where(mask, out, 0), torch.where(mask, y, 0))


SPECTRAL = SpectralLoss(GridTransform((8, 8)), Bands.split(0.4), (1.0, 2.0), amse=AMSE())
TASK_LOSSES = {  # and what each is for one sample
    "relative_l2": ("relative_l2", observed(LpLoss(d=3))),
    "LpLoss": (LpLoss(d=2), observed(LpLoss(d=2))),
    "H1Loss": (H1Loss(d=2), lambda out, y, mask: H1Loss(d=2)(out, y)),
    "function": (l1, l1),
    "spectral": (SPECTRAL, observed(SPECTRAL)),
}
LABELLED = torch.tensor([True, False, True, False]).reshape(4, 1, 1, 1)
MASKS = {
    "all": None,
    "samples": LABELLED,
    "nothing": LABELLED & ~LABELLED,
    "channels": torch.arange(12).reshape(4, 3, 1, 1) % 5 < 2,
    "points": LABELLED & (torch.arange(4 * 3 * 64).reshape(4, 3, 8, 8) % 3 > 0),
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("name", TASK_LOSSES)
def test_the_task_term_is_the_mean_over_labelled_samples(name, masked):
    student, (x, y), mask = unet(), fields(4), MASKS[masked]
    task_loss, of_sample = TASK_LOSSES[name]
    loss = TrainerLoss(distillation(student, kd_weight=0.0), student, task_loss)
    seen = torch.ones_like(y, dtype=torch.bool) if mask is None else mask.expand_as(y)
    out = student(x).detach().requires_grad_()
    sample = {"x": x, "y": torch.where(seen, y, torch.nan), "mask": mask}
    if masked in ("channels", "points") and name == "H1Loss":
        # The derivative of zeroed fields would be that of their jump.
        with pytest.raises(ValueError, match=r"`task_loss` \(H1Loss\) has no parameter `mask`"):
            loss(out, **sample)
        return
    rows = [i for i in range(4) if seen[i].any()]
    each = [of_sample(out[i : i + 1], y[i : i + 1], seen[i : i + 1]).sum() for i in rows]
    total, expected = loss(out, **sample), torch.stack(each or [torch.zeros(())]).mean()
    torch.testing.assert_close((loss.last_terms.task, total), (expected.detach(), 4 * expected))
    (gradient,) = torch.autograd.grad(total, out)
    assert gradient.isfinite().all()
    assert gradient[~seen].count_nonzero() == 0
    with torch.no_grad():
        assert torch.equal(loss(out, **sample), total)


@pytest.mark.parametrize("name", ["LpLoss", "H1Loss", "function"])
def test_without_distillation_it_trains_as_the_host_does(name):
    mine, theirs, task_loss = unet(), unet(), TASK_LOSSES[name][0]
    train(mine, TrainerLoss(distillation(mine, kd_weight=0.0), mine, task_loss))
    train(theirs, lambda out, y, **_: task_loss(out, y))
    assert_same(mine, theirs)


OPTIONS = {
    **{name: {"weighting": name} for name in ("fixed", "relative", "adaptive", "confidence")},
    **{name: {"aggregation": name} for name in ("mean", "aekd", "camkd")},
    "numbers": {"weighting": (1.0, 3.0)},
    "teacher_bound": {"teacher_bound": 0.1},
    "resolutions": {"resolutions": "shared"},
    "latents": {"latents": [LATENT]},
    "amse": {"amse": AMSE(0.5, "labels")},
    "kd_weight": {"kd_weight": 0.3, "check_finite": False},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_the_loss_works_behind_the_trainer(option):
    student, teachers = unet(), [unet(9, 6)]
    if option in ("mean", "aekd", "camkd"):
        teachers.append(unet(8))
    if option == "resolutions":
        teachers = [AtResolution(teachers[0], (16, 16))]
    distilled = distillation(student, teachers, **OPTIONS[option])
    alone, terms, expected = copy.deepcopy(distilled), [], []
    loss = TrainerLoss(distilled, student, LpLoss(d=2), on_step=terms.append)
    (taps := TapReader(student, distilled.student_taps)).attach()

    def both(out: Tensor, **sample: Tensor) -> Tensor:
        expected.append(alone(out, **sample, latents=taps.read()))
        return loss(out, **sample)

    train(student, both, distillation_dataset(*fields(), torch.arange(12) % 3 > 0))
    assert len(terms) == 6
    for mine, other in zip(terms, expected, strict=True):
        torch.testing.assert_close(mine.total, mine.task + other.total.detach())
        torch.testing.assert_close(mine.teacher_weights, other.teacher_weights)
        torch.testing.assert_close(mine.features, other.features)


def test_hooks_leave_with_their_loss():
    student, (x, y) = unet(), fields(2)

    def hooks() -> tuple[int, int]:
        each = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in student.modules()]
        return tuple(map(sum, zip(*each, strict=True)))

    first, second = (TrainerLoss(measuring(student), student) for _ in range(2))
    out = student(x, y=y)  # while both are alive, each reads what it needs
    for loss in (first, second):
        loss(out, x=x, y=y)
    del first, loss
    assert hooks() == (1, 1)
    second(student(x, y=y), x=x, y=y)
    second = TrainerLoss(distillation(student), student)
    assert hooks() == (0, 1)
    del second
    assert hooks() == (0, 0)


def test_nothing_given_is_changed():
    student, teacher, weighting, task = unet(), unet(9, 6), AdaptiveWeighting(2), LpLoss(d=2)
    given = [*teacher.parameters(), *weighting.buffers(), *(data := fields())]
    kept, settings = [value.detach().clone() for value in given], dict(vars(task))
    distilled = distillation(student, teacher, weighting=weighting)
    train(student, TrainerLoss(distilled, student, task), distillation_dataset(*data))
    distilled.to(torch.float64)
    torch.testing.assert_close([value.detach() for value in given], kept, rtol=0, atol=0)
    assert vars(task) == settings
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((unet(),), "`loss` is of type SDKDUNet, expected DistillationLoss"),
        ((distillation(unet()),), "`student` is of type NoneType, expected Module"),
        ((distillation(unet()), torch.jit.script(nn.ReLU())), "takes no hooks, expected a plain"),
        ((distillation(unet()), unet(), LpLoss(reduction="mean")), "with reduction='mean'"),
    ],
)
def test_wrong_types_are_named(arguments, message, as_shipped):
    with pytest.raises(ValueError, match=message):
        TrainerLoss(*arguments)


@pytest.mark.parametrize("latents", [[], [LATENT]])
def test_precomputed_outputs_train_as_the_live_teacher_bit_for_bit(latents):
    (x, y), students = fields(), (unet(), unet())
    losses = [TrainerLoss(distillation(s, latents=latents), s) for s in students]
    (output,) = precompute(losses[0].loss, ({"x": part} for part in x.split(5)))
    train(students[0], losses[0], distillation_dataset(x, y))
    losses[1].loss.teacher_outputs = None  # no teacher runs
    train(students[1], losses[1], distillation_dataset(x, y, teacher=output))
    assert_same(*students)


@pytest.mark.parametrize("kind", ["unet", "plain", "fno"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, tmp_path):
    whole = run(5, kind)
    first = run(3, kind, save_every=1, save_dir=tmp_path)
    torch.manual_seed(100)  # what another process would not have drawn either
    if kind == "fno":
        # The host writes its options, a function and a class among them, into the weights' file.
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            run(5, kind, resume_from_dir=tmp_path)
    with torch.serialization.safe_globals([F.gelu, SpectralConv]):
        second = run(5, kind, resume_from_dir=tmp_path)
    assert first.totals + second.totals == whole.totals
    assert_same(whole.student, second.student)
    if kind == "unet":
        assert len(whole.totals) == 15
        expected = whole.loss.state_dict()
        assert {part for name in expected for part in name.split(".")} > {"error", "projector"}
        torch.testing.assert_close(second.loss.state_dict(), expected, rtol=0, atol=0)
        # Without the state the host trains the saved epoch again.
        run(3, with_state=False, save_every=1, save_dir=tmp_path / "bare")
        assert len(run(5, with_state=False, resume_from_dir=tmp_path / "bare").totals) == 9


def test_what_a_run_cannot_resume_is_refused(tmp_path):
    saved, files = run(1, save_every=1, save_dir=tmp_path), list(tmp_path.glob("*.pt"))
    assert {path.stem for path in files} > {"regularizer", "optimizer", "scheduler", "manifest"}
    for path in files:  # nothing is unpickled but tensors and plain values
        torch.load(path, weights_only=True)
    state = saved.state.state_dict()
    with pytest.raises(ValueError, match=r"`generators` has 0, expected 1"):
        ResumableState(saved.trainer, saved.loss).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with a distillation loss"):
        ResumableState(saved.trainer, None, [saved.shuffling]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"regularizer\.pt` .* was not written by"):
        saved.state.load_state_dict({"weight": torch.zeros(1)})
    other = TrainerLoss(distillation(unet(), weighting=(1.0, 1.0)), unet())
    with pytest.raises(ValueError, match=r"`state` has \['frequency.* expected \['trust\."):
        other.load_state_dict(saved.loss.state_dict())


def loader(size: int) -> DataLoader:
    return DataLoader(distillation_dataset(*fields(6, size, seed=1)), 4)


def processor(*numbers: float, out: bool = True) -> DefaultDataProcessor:
    numbers = [torch.full((1, 1, 1, 1), number) for number in numbers]
    return DefaultDataProcessor(*[UnitGaussianNormalizer(*numbers) for _ in range(1 + out)])


@pytest.mark.parametrize("make", [unet, fno])
def test_a_normal_run_warns_of_nothing(make, tmp_path, recwarn):
    student, steps = make(), []
    loss = TrainerLoss(distillation(student), student, LpLoss(d=2), on_step=steps.append)
    options = {"tests": {8: loader(8), 16: loader(16)}, "save_best": "16_l2", "save_dir": tmp_path}
    metrics = train(student, loss, data_processor=processor(0.0, 1.0), **options)
    assert 0 < metrics["8_l2"] < 1e3
    assert (tmp_path / "best_model_state_dict.pt").exists()
    assert [str(warning.message) for warning in recwarn] == []
    assert (len(steps), steps[-1]) == (6, loss.last_terms)


def test_evaluation_is_the_task_loss_in_physical_units_and_moves_nothing():
    student, units = unet(), processor(1.0, 3.0)
    loss = TrainerLoss(measuring(student), student)
    before = copy.deepcopy(loss.state_dict())
    trainer = Trainer(model=student, n_epochs=1, data_processor=units)
    metrics = trainer.evaluate({"mse": loss}, loader(16), "fine")
    x, y = fields(6, 16, seed=1)
    with torch.no_grad():
        out = units.out_normalizer.inverse_transform(student(units.in_normalizer.transform(x)))
        with pytest.raises(ValueError, match="`y` is None"):
            loss(out, x=x)
    assert metrics["fine_mse"].item() == pytest.approx(F.mse_loss(out, y).item(), rel=1e-5)
    assert loss.last_terms is None
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)


class Rollout(DefaultDataProcessor):
    """Each step reads the forecast before it; the labels are all steps, one after another."""

    def preprocess(self, sample, step):
        if step == 0:
            self.x, self.y = sample["x"], sample["y"]
        y = self.y[:, 3 * step : 3 * step + 3]
        return {"x": self.x, "y": y} if y.shape[1] else None

    def postprocess(self, out, sample, step):
        self.x = out[:, -2:]
        return out, sample


def test_autoregressive_evaluation():
    student, (x, y) = unet(), fields(6, 16)
    loss, y = TrainerLoss(measuring(student), student), torch.cat([y, y.roll(1, -1)], 1)
    trainer = Trainer(model=student, n_epochs=1, data_processor=Rollout())
    data = DataLoader(distillation_dataset(x, y), 6)
    metrics = trainer.evaluate({"mse": loss}, data, "rollout", mode="autoregression")
    with torch.no_grad():
        first = student(x)
        expected = F.mse_loss(torch.cat([first, student(first[:, -2:])], 1), y)
    assert metrics["rollout_mse"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("make", [unet, fno])
def test_mixed_precision(make, device):
    student, steps = make(), []
    distilled = (measuring if make is unet else distillation)(student).to(device)
    loss = TrainerLoss(distilled, student, LpLoss(d=2), on_step=steps.append)
    train(student.to(device), loss, device=str(device), mixed_precision=True)
    assert all(terms.total.isfinite() for terms in steps)
    assert {terms.frequency.dtype for terms in steps} == {torch.float32}
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_teacher_of_other_units_is_refused():
    student, theirs = unet(), processor(1.0, 2.0)
    made = partial(TrainerLoss, distillation(student), student, teacher_processor=theirs)
    message = r"in_normalizer .*mean 1, deviation 2.*mean 0, .*Renormalized\(teacher"
    with pytest.raises(ValueError, match=message):
        made(data_processor=processor(0.0, 2.0))
    with pytest.raises(ValueError, match=r"out_normalizer UnitGaussian.*, expected .* None"):
        made(data_processor=processor(1.0, 2.0, out=False))
    with pytest.raises(ValueError, match="`data_processor` is None"):
        made()
    shapes = ((1, 2, 1, 1), ())
    same = [UnitGaussianNormalizer(torch.ones(s), torch.full(s, 2.0)) for s in shapes]
    made(data_processor=DefaultDataProcessor(*same))


def test_a_renormalized_teacher_forecasts_in_the_students_units():
    teacher, own, given = unet(seed=4), processor(1.0, 2.0), processor(-3.0, 0.5)
    wrapped, student, (x, y) = Renormalized(teacher, own, given), unet(), fields(2)
    forecast = wrapped(given.in_normalizer.transform(x))
    expected = own.out_normalizer.inverse_transform(teacher(own.in_normalizer.transform(x)))
    torch.testing.assert_close(given.out_normalizer.inverse_transform(forecast), expected)
    loss = TrainerLoss(distillation(student, wrapped, latents=[LATENT]), student)
    assert loss(student(x), x=x, y=y) > 0
