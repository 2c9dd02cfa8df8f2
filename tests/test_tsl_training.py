"""Distillation by tsl's predictor under all that Lightning does: resuming, precision, processes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tsl_parts import (
    FIT,
    NODES,
    STEPS,
    first_batch,
    loss_of,
    predictor,
    same,
    student,
    trainer,
    windows,
)

from sdkd_plugin import AdaptiveWeighting, LatentPair
from sdkd_plugin.adapters.tsl import SeededEpochs

from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # isort: skip
from tsl.engines import Predictor  # isort: skip
from tsl.metrics.torch import MaskedMAE, MaskedMetric, MaskedMSE  # isort: skip

# Resuming ---------------------------------------------------------------------------------------


def _resumable(epochs: int, folder: Path, resume: Path | None = None, workers: int = 0) -> Any:
    module = windows(seed=3, workers=workers)
    learner = student(dropout=0.3)
    loss = loss_of(weighting=AdaptiveWeighting(2, decay=0.9), latents=[LatentPair()])
    made = predictor(
        learner,
        loss.fit_latents(learner, **first_batch(module).input),
        scheduler_class=torch.optim.lr_scheduler.StepLR,
        scheduler_kwargs={"step_size": 1, "gamma": 0.5},
    )
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    stop = EarlyStopping("val_mae", patience=50)
    torch.manual_seed(99 if resume else 5)  # whatever the process has drawn before
    run = trainer(
        epochs,
        (keep, stop, SeededEpochs(7)),
        gradient_clip_val=0.5,
        num_sanity_val_steps=1 if resume else 0,
    )
    run.fit(made, datamodule=module, ckpt_path=resume, weights_only=True)
    return made, run


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
# Resuming into the folder of the checkpoint is what is meant.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, workers):
    whole, run = _resumable(3, tmp_path / "whole", workers=workers)
    _resumable(2, tmp_path / "half", workers=workers)
    resumed, again = _resumable(3, tmp_path / "half", tmp_path / "half" / "epoch=1.ckpt", workers)
    kept = {name.split(".")[0] for name in whole.distillation.state_dict()}
    assert kept == {"frequency", "latent_losses", "trust"}
    assert same(whole, resumed)
    assert again.global_step == run.global_step
    torch.testing.assert_close(
        again.optimizers[0].state_dict(), run.optimizers[0].state_dict(), rtol=0, atol=0
    )
    assert torch.equal(again.callback_metrics["val_mae"], run.callback_metrics["val_mae"])


def test_the_order_of_windows_follows_from_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        module = windows(seed=seed)
        module.setup()
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [i for batch in loader.batch_sampler for i in batch]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert len(set(order(0, 0))) == len(order(0, 0))
    module = windows()
    module.setup()
    plain = module.train_dataloader(shuffle=False)
    assert next(iter(plain.batch_sampler)) == list(range(16))
    with pytest.raises(ValueError, match="`seed` is -1, expected an integer of at least 0"):
        windows(seed=-1)
    with pytest.raises(ValueError, match="`seed` is -1"):
        SeededEpochs(-1)


@pytest.mark.usefixtures("as_shipped")
def test_dropout_follows_from_seed_and_epoch():
    def drawn(seed: int, epoch: int) -> float:
        run = SimpleNamespace(current_epoch=epoch, world_size=1, global_rank=0)
        SeededEpochs(seed).on_train_batch_start(run, None, None, 0)
        return float(torch.rand(()))

    draws = [drawn(seed, epoch) for seed in (0, 1, 2**40) for epoch in (0, 1)]
    assert drawn(1, 1) == draws[3]
    assert len(set(draws)) == 6


# What Lightning adds ----------------------------------------------------------------------------


def test_gradient_clipping_bounds_a_step():
    options = {"optim_class": torch.optim.SGD, "optim_kwargs": {"lr": 1.0}}

    def moved(clip: float | None) -> float:
        made = predictor(**options)
        run = trainer(1, gradient_clip_val=clip, limit_train_batches=1, limit_val_batches=0)
        run.fit(made, datamodule=windows())
        start = student().state_dict()
        steps = [value - start[name] for name, value in made.model.state_dict().items()]
        return float(torch.cat([step.flatten() for step in steps]).norm())

    assert moved(None) > 0.1
    assert moved(1e-3) == pytest.approx(1e-3, rel=1e-3)


def test_schedulers_may_monitor_and_their_arguments_are_kept():
    given = {"monitor": "val_mae", "factor": 0.1, "patience": 0, "threshold": 1e9}
    made = predictor(
        scheduler_class=torch.optim.lr_scheduler.ReduceLROnPlateau, scheduler_kwargs=given
    )
    run = trainer(3)
    run.fit(made, datamodule=windows())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)
    assert given["monitor"] == "val_mae"
    trainer(1).fit(made, datamodule=windows())  # tsl's own would not find its monitor again


def test_early_stopping_stops():
    run = trainer(9, (EarlyStopping("val_mae", patience=1, min_delta=1e9),))
    run.fit(predictor(), datamodule=windows())
    assert run.current_epoch == 2


def test_half_precision_on_a_cpu():
    made = predictor(loss=loss_of(weighting=AdaptiveWeighting(2)))
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        run = trainer(precision="16-mixed")
    assert run.precision == "bf16-mixed"
    run.fit(made, datamodule=windows())
    assert not same(made.model, student())
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in made.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_on_a_gpu(precision):
    module = windows()
    learner = student()
    loss = loss_of(weighting=AdaptiveWeighting(2), latents=[LatentPair()])
    made = predictor(learner, loss.fit_latents(learner, **first_batch(module).input))
    trainer(accelerator="gpu", devices=1, precision=precision).fit(made, datamodule=module)
    assert not same(made.model.cpu(), student())
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in made.parameters())


@pytest.mark.parametrize("scale_target", [False, True])
def test_validation_test_and_prediction_are_tsls(scale_target):
    options = {**FIT, "scale_target": scale_target}
    results = []
    for made in (Predictor(model=student(), **options), predictor(**options)):
        run = trainer()
        module = windows()
        measured = [
            *run.validate(made, module, verbose=False),
            *run.test(made, module, verbose=False),
        ]
        forecast = run.predict(made, module.test_dataloader())[0]["y_hat"]
        results.append((measured, forecast))
    assert results[0][0] == results[1][0]
    assert {"val_loss", "val_mae"} == results[0][0][0].keys()
    assert torch.equal(results[0][1], results[1][1])


# Bad input --------------------------------------------------------------------------------------


def test_a_batch_without_observed_targets_takes_a_finite_step_without_the_task():
    nothing = torch.zeros(STEPS, NODES, dtype=torch.bool)
    nothing[110:] = True  # in the test windows alone
    made, alone = predictor(), predictor(loss_fn=MaskedMetric(lambda y_hat, y: 0 * (y_hat - y)))
    logged = []
    for each in (made, alone):
        run = trainer(1)
        run.fit(each, datamodule=windows(observed=nothing, mask_scaling=False))
        logged.append(run.callback_metrics)
    assert logged[0]["train_task"] == 0
    assert logged[0]["train_loss"] > 0
    # The step that a task of exactly 0 gives, whatever the labels.
    assert same(made.model, alone.model)
    assert not same(made.model, student())


@pytest.mark.parametrize("loss_fn", [MaskedMAE(), MaskedMSE()])
def test_missing_targets_may_be_nan(loss_fn):
    made = predictor(loss_fn=loss_fn, metrics={})
    module = windows(gaps=True)
    assert first_batch(module).y.isnan().any()
    trainer(1, limit_val_batches=0).fit(made, datamodule=module)
    assert all(p.isfinite().all() for p in made.parameters())
    assert not same(made.model, student())


def test_a_mask_of_bytes_is_one_of_booleans():
    made = [predictor(), predictor()]
    modules = [windows(), windows()]
    dataset = modules[1].torch_dataset
    dataset.set_mask(dataset.mask.to(torch.uint8))
    for each, module in zip(made, modules, strict=True):
        trainer(1, limit_val_batches=0).fit(each, datamodule=module)
    assert same(made[0].model, made[1].model)
    assert not same(made[0].model, student())


@pytest.mark.parametrize("shape", [(slice(None), slice(0, 1)), (..., slice(0, 0))])
def test_a_mask_of_another_shape_is_refused(shape):
    made = predictor()
    batch = first_batch(windows())
    batch.mask = batch.mask[shape]
    with pytest.raises(ValueError, match=r"`batch.mask` has shape .*, expected \(16, 3, 5, 1\)"):
        made.training_step(batch, 0)


# Two processes ----------------------------------------------------------------------------------

_TWO = """
import sys
sys.path.insert(0, {here!r})
import torch
from sdkd_plugin import AdaptiveWeighting, Bands, LatentPair
from tsl_parts import *

loss = loss_of(
    teacher(1), teacher(2), bands=Bands.split(0.5), aggregation="aekd",
    weighting=AdaptiveWeighting(2), latents=[LatentPair()],
)
learner = student()
made = predictor(learner, loss.fit_latents(learner, **first_batch(windows()).input))
seen = []
step = made.training_step
def training_step(batch, batch_idx):
    seen.append(batch.y.sum())
    wrapped = made.trainer.strategy.model
    taught = [p for t in made.distillation.teachers for p in t.parameters()]
    assert type(wrapped).__name__ == "DistributedDataParallel"
    assert not {{id(p) for p in wrapped.parameters()}} & {{id(p) for p in taught}}
    return step(batch, batch_idx)
made.training_step = training_step
weights = []
aggregate = made.distillation.aggregation.forward
def forward(evidence):
    weights.append(aggregate(evidence))
    return weights[-1]
made.distillation.aggregation.forward = forward
run = trainer(2, devices=2, strategy="ddp", accelerator="cpu")
run.fit(made, datamodule=windows())
torch.save(
    dict(model=made.model.state_dict(), beside=made.distillation.state_dict(),
         seen=torch.stack(seen), weights=torch.stack(weights)),
    {folder!r} + f"/rank{{run.global_rank}}.pt",
)
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO.format(here=str(Path(__file__).parent), folder=str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    for part in ("model", "beside"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    assert any(not torch.equal(v, student().state_dict()[k]) for k, v in one["model"].items())
    # Each has read other windows, and still both weighed the teachers alike.
    assert len(one["seen"]) == len(two["seen"])
    assert not torch.equal(one["seen"], two["seen"])
    assert torch.equal(one["weights"], two["weights"])
    assert not torch.equal(one["weights"][0], torch.full((2,), 0.5))
