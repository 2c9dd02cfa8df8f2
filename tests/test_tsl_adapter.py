"""Distillation by tsl's predictor: what is compared, what is trained, saved and logged."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tsl_parts import (
    FIT,
    first_batch,
    loss_of,
    predictor,
    same,
    student,
    teacher,
    trainer,
    windows,
)

from sdkd_plugin import Bands, LatentPair
from sdkd_plugin.adapters.tsl import DistillationPredictor, number_windows

import pytorch_lightning as pl  # isort: skip
from tsl.data import SpatioTemporalDataModule  # isort: skip
from tsl.engines import Predictor  # isort: skip
from tsl.nn.models import GRUGCNModel  # isort: skip


def fit(made: Predictor, module: SpatioTemporalDataModule, **options: object) -> pl.Trainer:
    torch.manual_seed(5)
    run = trainer(**options)
    run.fit(made, datamodule=module)
    return run


@pytest.mark.parametrize("scale_target", [False, True])
def test_kd_weight_zero_trains_as_tsls_predictor_does(scale_target):
    plain, distilled = student(), student()
    options = {**FIT, "scale_target": scale_target}
    fit(Predictor(model=plain, **options), windows())
    fit(predictor(distilled, loss_of(kd_weight=0.0), scale_target=scale_target), windows())
    assert same(plain, distilled)
    assert not same(student(), plain)


def test_the_teacher_is_not_trained_saved_or_counted():
    wise, learner = teacher(), student()
    before = copy.deepcopy(wise)
    made = predictor(learner, loss_of(wise))
    logged = set(fit(made, windows()).callback_metrics)
    assert same(before, wise)
    assert same(before, made.distillation.teachers[0])
    kept = {name for name in made.state_dict() if not name.startswith("model.")}
    assert kept == {f"distillation.trust.{name}" for name in ("errors", "weights")}
    assert {id(p) for p in made.parameters()} == {id(p) for p in learner.parameters()}
    assert "loss" not in made.hparams
    assert {"train_task", "train_kd_band_0", "train_kd_band_1", "val_mae"} <= logged
    assert {"val_teacher_mse", "val_student_mse_1", "val_teacher_trust_0"} <= logged


def test_the_student_comes_closer_to_its_teacher():
    module = windows()
    batch = first_batch(module)
    wise, learner = teacher(), student()

    def distance() -> float:
        with torch.no_grad():
            return float((wise(**batch.input) - learner(**batch.input)).square().mean())

    before = distance()
    fit(predictor(learner, loss_of(wise, kd_weight=50.0)), module)
    assert distance() < 0.5 * before


def test_the_distillation_term_is_unmasked_and_in_scaled_units(monkeypatch):
    wise, learner = teacher().eval(), student()
    loss = loss_of(wise, bands=Bands.split(0.5), weighting=(1.0, 1.0))
    made = predictor(learner, loss)
    logged = {}
    for name in ("log_metrics", "log_loss"):
        monkeypatch.setattr(made, name, lambda *_, **__: None)
    monkeypatch.setattr(made, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(made.train_metrics, "update", lambda *_: None)
    batch = first_batch(windows())
    with torch.no_grad():
        total = made.training_step(batch, 0)
        expected = (learner(**batch.input) - wise(**batch.input)).square().mean()
        task = made.loss_fn(made.predict_batch(batch), batch.y, batch.mask)
    assert not bool(batch.mask.all())
    torch.testing.assert_close(logged["train_kd_band_0"] + logged["train_kd_band_1"], expected)
    torch.testing.assert_close(total, task + expected)


def test_tsls_own_model_learns_and_latents_have_any_layout():
    module = windows()
    torch.manual_seed(0)
    learner = GRUGCNModel(1, 8, 1, 3, exog_size=2, enc_layers=1, gcn_layers=1)
    loss = loss_of(latents=[LatentPair("gcn_layers.0", "latent")])
    made = predictor(learner, loss.fit_latents(learner, **first_batch(module).input))
    before = copy.deepcopy(loss.latent_losses)
    run = fit(made, module)
    assert "train_kd_gcn_layers.0<-latent" in run.callback_metrics
    assert not same(before, loss.latent_losses)


OPTIONS = {
    "relative": {"weighting": "relative"},
    "adaptive": {"weighting": "adaptive"},
    "confidence": {"weighting": "confidence"},
    "aekd": {"aggregation": "aekd"},
    "camkd": {"aggregation": "camkd"},
    "teacher_bound": {"teacher_bound": 0.1},
    "unchecked": {"check_finite": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_the_loss_works_behind_tsl(options):
    """Each changes the student, but for the checks, which change nothing."""
    learners = student(), student()
    for learner, each in zip(learners, ({}, options), strict=True):
        loss = loss_of(teacher(1), teacher(2), **each)
        fit(predictor(learner, loss), windows(), limit_train_batches=3, max_epochs=1)
    assert same(*learners) == ("check_finite" in options)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`model` and `model_class` are None, expected one"):
        DistillationPredictor(loss_of(), **FIT)
    # Elsewhere: the type checks that pytest adds come before ours.
    code = "from tsl_parts import *\nDistillationPredictor(teacher(), model=student())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: `loss` is of type SDKDTeacher, expected DistillationLoss" in done.stderr
    wise = teacher()
    with pytest.raises(ValueError, match="`teacher` and `student` share weights"):
        predictor(wise, loss_of(wise))


# Outputs of the teachers, computed ahead


def two_teachers(module: SpatioTemporalDataModule) -> DistillationPredictor:
    learner = student()
    loss = loss_of(
        teacher(1),
        teacher(2),
        aggregation="camkd",
        latents=[LatentPair("latent", "latent_low", 0.1)],
    )
    return predictor(learner, loss.fit_latents(learner, **first_batch(module).input))


def test_precomputed_outputs_train_as_live_teachers_do():
    module = windows(numbered=True)
    live, ahead = two_teachers(module), two_teachers(module)
    ahead.precompute(module)
    calls = []
    for each in ahead.distillation.teachers:
        each.register_forward_hook(lambda *_: calls.append(1))
    for made in (live, ahead):
        fit(made, module, limit_val_batches=0)
    assert not calls
    expected = live.state_dict()
    for name, value in ahead.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_the_number_of_a_window_is_its_first_step_and_no_input():
    module = windows(numbered=True)
    module.setup()
    batch = module.torch_dataset[torch.tensor([0, 7, 11])]
    assert batch.first_step[:, 0, 0].tolist() == [0, 7, 11]
    assert "first_step" not in batch.input


def test_windows_without_outputs_or_with_other_readings_are_refused():
    unnumbered = windows()
    unnumbered.setup()
    with pytest.raises(ValueError, match="the batch has no 'first_step': call `number_windows`"):
        two_teachers(unnumbered).precompute(unnumbered)
    module = windows(numbered=True)
    made = two_teachers(module)
    made.precompute(module)
    batch = module.torch_dataset[torch.tensor([int(module.valset.indices[-1])])]
    with pytest.raises(ValueError, match="no teacher output for the window that begins at step"):
        made.training_step(batch, 0)
    with pytest.raises(ValueError, match="the readings of a window are not those"):
        made.training_step(first_batch(windows(numbered=True, shift=5.0)), 0)
    with pytest.raises(ValueError, match="has 'first_step' already"):
        number_windows(module.torch_dataset)
