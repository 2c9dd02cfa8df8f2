"""Distillation by tsl's predictor under all that Lightning does: resuming, precision, processes."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from sdkd_plugin import AdaptiveWeighting, GraphTransform, LatentPair
from sdkd_plugin.adapters.tsl import (
    DistillationPredictor,
    PlainPredictor,
    SDKDStudent,
    SDKDTeacher,
    SeededDataModule,
    SeededEpochs,
    load_weights,
)

import pytorch_lightning as pl  # isort: skip
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # isort: skip
from pytorch_lightning.loggers.logger import DummyLogger  # isort: skip
from tsl.data import SpatioTemporalDataset  # isort: skip
from tsl.data.datamodule.splitters import TemporalSplitter  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.engines import Predictor  # isort: skip
from tsl.metrics.torch import MaskedMAE, MaskedMetric, MaskedMSE  # isort: skip

NODES, STEPS = 5, 120
SIZES = {"input_size": 1, "window": 6, "horizon": 3, "n_nodes": NODES, "exog_size": 2}
RING = torch.stack([torch.arange(NODES), torch.arange(NODES).roll(-1)])
WEIGHT = torch.linspace(0.2, 1, NODES)
FIT = {
    "loss_fn": MaskedMAE(),
    "metrics": {"mae": MaskedMAE()},
    "optim_class": torch.optim.Adam,
    "optim_kwargs": {"lr": 1e-2},
}


def windows(
    *, observed: Tensor | None = None, gaps: bool = False, covariates: bool = True, **options: Any
) -> SeededDataModule:
    generator = torch.Generator().manual_seed(0)
    speed = 50 + 10 * torch.sin(torch.arange(STEPS) / 20)[:, None]
    speed = speed + torch.randn(STEPS, NODES, generator=generator)
    if observed is None:
        observed = torch.rand(STEPS, NODES, generator=generator) > 0.1
    index = pd.date_range("2012-03-01", periods=STEPS, freq="5min")
    dataset = SpatioTemporalDataset(
        target=pd.DataFrame(speed.numpy(), index=index),
        mask=observed.numpy()[..., None],
        connectivity=(RING, WEIGHT),
        covariates={"u": torch.randn(STEPS, 2, generator=generator)} if covariates else None,
        window=6,
        horizon=3,
    )
    if gaps:  # unobserved targets are NaN, while the readings of the windows are filled
        dataset.add_covariate("filled", speed[..., None].float(), "t n f", add_to_input_map=False)
        dataset.set_input_map(x=["filled"], u=["u"])
        dataset.target[~observed[..., None]] = torch.nan
    return SeededDataModule(
        dataset,
        scalers={} if gaps else {"target": StandardScaler(axis=(0, 1))},
        splitter=TemporalSplitter(val_len=0.1, test_len=0.2),
        batch_size=16,
        **options,
    )


def student(dropout: float = 0.0, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden_size": 8, "emb_size": 4, "n_layers": 1, "dropout": dropout}
    return SDKDStudent(**options, **{**SIZES, **sizes})


def teacher(seed: int = 9) -> nn.Module:
    torch.manual_seed(seed)
    return SDKDTeacher(hidden_size=8, emb_size=4, n_layers=1, n_heads=2, patch_size=3, **SIZES)


def transform() -> GraphTransform:
    return GraphTransform.from_edges(RING, WEIGHT, NODES)


def predictor(learner: nn.Module | None = None, **options: Any) -> DistillationPredictor:
    learner = student() if learner is None else learner
    return DistillationPredictor(teacher(), transform(), model=learner, **{**FIT, **options})


def trainer(epochs: int = 2, callbacks: tuple = (), **options: Any) -> pl.Trainer:
    checkpointing = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    return pl.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "logger": DummyLogger(),
            "enable_checkpointing": checkpointing,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            **options,
        }
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def first_batch(module: SeededDataModule) -> Any:
    module.setup()
    return next(iter(module.train_dataloader()))


# Checkpoints ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DistillationPredictor]:
    """A checkpoint by Lightning's callback, and what it was made of."""
    folder = tmp_path_factory.mktemp("saved")
    made = predictor(
        student(),
        weighting=AdaptiveWeighting(2),
        scheduler_class=torch.optim.lr_scheduler.ReduceLROnPlateau,
        scheduler_kwargs={"monitor": "val_mae"},
    )
    keep = ModelCheckpoint(folder, filename="best", monitor="val_mae", save_top_k=1)
    stop = EarlyStopping("val_mae")
    trainer(1, (keep, stop)).fit(made, datamodule=windows())
    return folder / "best.ckpt", made


def test_a_checkpoint_holds_weights_and_plain_values(saved):
    path, made = saved
    stored = torch.load(path, weights_only=True)
    roots = {name.split(".")[0] for name in stored["state_dict"]}
    assert roots == {"model", "weighting"}
    assert stored["hyper_parameters"]["optim_kwargs"] == {"lr": 1e-2}
    assert stored["hyper_parameters"]["scheduler_kwargs"] == {"monitor": "val_mae"}
    assert not {"optim_class", "scheduler_class", "teacher"} & stored["hyper_parameters"].keys()
    assert stored["hyper_parameters"]["metrics"] == {}
    assert stored["sdkd_model"]["arguments"]["n_nodes"] == NODES
    fresh = predictor(student(), weighting=AdaptiveWeighting(2))
    assert not same(fresh.model, made.model)
    fresh.load_model(path)
    assert same(fresh.model, made.model)


def test_a_student_serves_without_the_predictor_that_trained_it(saved):
    path, made = saved
    bare = student()
    load_weights(bare, path)
    assert same(bare, made.model)
    plain = PlainPredictor(model=student(), **FIT)
    plain.load_model(path)
    assert same(plain.model, made.model)


def test_lightning_loads_it_with_weights_only(saved):
    path, made = saved
    again = DistillationPredictor.load_from_checkpoint(
        path,
        weights_only=True,
        teacher=teacher(),
        transform=transform(),
        weighting=AdaptiveWeighting(2),
        model=student(),
    )
    assert same(again.model, made.model)
    assert same(again.weighting, made.weighting)


def test_model_class_and_arguments_are_compared(tmp_path):
    kwargs = {**SIZES, "hidden_size": 8, "dropout": 0.0}
    made = PlainPredictor(model_class=SDKDStudent, model_kwargs=kwargs, **FIT)
    keep = ModelCheckpoint(tmp_path, filename="m")
    trainer(1, (keep,)).fit(made, datamodule=windows())
    again = PlainPredictor(model_class=SDKDStudent, model_kwargs=kwargs, **FIT)
    again.load_model(tmp_path / "m.ckpt")
    assert same(again.model, made.model)
    other = PlainPredictor(model_class=SDKDStudent, model_kwargs={**kwargs, "dropout": 0.5}, **FIT)
    with pytest.raises(ValueError, match=r"has dropout=0.0, expected dropout=0.5"):
        other.load_model(tmp_path / "m.ckpt")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: student(n_nodes=7), r"SDKDStudent has n_nodes=5, expected n_nodes=7"),
        (lambda: student(window=12), r"has window=6, expected window=12: build the model"),
        (teacher, r"holds a SDKDStudent, expected a SDKDTeacher"),
    ],
)
def test_a_checkpoint_for_other_data_is_refused(saved, other, message):
    model = other()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PlainPredictor(model=model).load_model(saved[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_dict_for_other_data_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(student(n_nodes=7).state_dict(), path)
    with pytest.raises(ValueError, match=r"size mismatch for network.embedding.weight: .*\[7, 4\]"):
        load_weights(student(), path)
    torch.save(teacher().state_dict(), path)
    with pytest.raises(ValueError, match=r"not those of this SDKDStudent .*Missing key"):
        load_weights(student(), path)
    torch.save({**student().state_dict(), "network.head.bias": "none"}, path)
    with pytest.raises(
        ValueError, match=r"\"network.head.bias\", expected torch.Tensor .* received <class 'str'>"
    ):
        load_weights(student(), path)


class _Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.folder,))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    evil = _Evil()
    evil.folder = str(tmp_path / "run")
    for path, save in ((tmp_path / "a.pt", torch.save), (tmp_path / "b.pt", None)):
        if save is None:
            path.write_bytes(pickle.dumps(evil, protocol=2))
        else:
            save({"state_dict": student().state_dict(), "hyper_parameters": evil}, path)
        with pytest.raises(ValueError, match=f"{path.name}, which cannot be read as weights"):
            load_weights(student(), path)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_tsls_own_predictor_is_refused_with_the_way_out(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="own")
    made = Predictor(model=student(), **FIT)
    trainer(1, (keep,)).fit(made, datamodule=windows())
    with pytest.raises(ValueError, match=r"weights_only=False\)\['state_dict'\]"):
        load_weights(student(), tmp_path / "own.ckpt")
    trusted = torch.load(tmp_path / "own.ckpt", weights_only=False)["state_dict"]
    torch.save(trusted, tmp_path / "plain.pt")
    again = student()
    load_weights(again, tmp_path / "plain.pt")
    assert same(again, made.model)


def test_damaged_and_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="where there is no file"):
        load_weights(student(), tmp_path / "none.ckpt")
    for content in (b"", b"weights", saved[0].read_bytes()[:2000]):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.ckpt, which cannot be read"):
            load_weights(student(), tmp_path / "bad.ckpt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"holds a list, expected a checkpoint"):
        load_weights(student(), tmp_path / "list.pt")


# Resuming ---------------------------------------------------------------------------------------


def _resumable(epochs: int, folder: Path, resume: Path | None = None, workers: int = 0) -> Any:
    module = windows(seed=3, workers=workers)
    example = dict(first_batch(module).input.items())
    made = predictor(
        student(dropout=0.3),
        weighting=AdaptiveWeighting(2, decay=0.9),
        latents=[LatentPair()],
        example=example,
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
    assert {"weighting", "latent_losses"} <= {name.split(".")[0] for name in whole.state_dict()}
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
    made = predictor(weighting=AdaptiveWeighting(2))
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
    example = dict(first_batch(module).input.items())
    made = predictor(weighting=AdaptiveWeighting(2), latents=[LatentPair()], example=example)
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


@pytest.mark.parametrize("kind", [PlainPredictor, DistillationPredictor])
def test_covariates_missing_at_test_time_are_missed(kind, tmp_path):
    # A model to which covariates are optional: nothing else would complain.
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
            return x[:, -3:] * self.scale if u is None else x[:, -3:] * self.scale + u.mean()

    def make() -> Predictor:
        if kind is PlainPredictor:
            return PlainPredictor(model=Optional(), **FIT)
        return DistillationPredictor(teacher(), transform(), model=Optional(), **FIT)

    made = make()
    keep = ModelCheckpoint(tmp_path, filename="m")
    trainer(1, (keep,)).fit(made, datamodule=windows())
    loaded = make()
    loaded.load_model(tmp_path / "m.ckpt")
    for each in (made, loaded):
        with pytest.raises(ValueError, match=r"`batch.input` lacks \['u'\], which the model was"):
            trainer().test(each, datamodule=windows(covariates=False), verbose=False)


# Two processes ----------------------------------------------------------------------------------

_TWO = """
import sys
sys.path.insert(0, {here!r})
import torch
from sdkd_plugin import Bands
from test_tsl_training import *

made = DistillationPredictor(
    [teacher(1), teacher(2)], transform(), Bands.split(0.5), aggregation="aekd",
    weighting=AdaptiveWeighting(2), latents=[LatentPair()],
    example=dict(first_batch(windows()).input.items()), model=student(), **FIT,
)
seen = []
step = made.training_step
def training_step(batch, batch_idx):
    seen.append(batch.y.sum())
    wrapped = made.trainer.strategy.model
    taught = [p for t in made.distiller.teachers for p in t.parameters()]
    assert type(wrapped).__name__ == "DistributedDataParallel"
    assert not {{id(p) for p in wrapped.parameters()}} & {{id(p) for p in taught}}
    return step(batch, batch_idx)
made.training_step = training_step
weights = []
aggregate = made.distiller.aggregation.forward
def forward(evidence):
    weights.append(aggregate(evidence))
    return weights[-1]
made.distiller.aggregation.forward = forward
run = trainer(2, devices=2, strategy="ddp", accelerator="cpu")
run.fit(made, datamodule=windows())
torch.save(
    dict(model=made.model.state_dict(), projectors=made.latent_losses.state_dict(),
         measured=made.weighting.state_dict(), seen=torch.stack(seen),
         weights=torch.stack(weights)),
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
    for part in ("model", "projectors", "measured"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    assert any(not torch.equal(v, student().state_dict()[k]) for k, v in one["model"].items())
    # Each has read other windows, and still both weighed the teachers alike.
    assert len(one["seen"]) == len(two["seen"])
    assert not torch.equal(one["seen"], two["seen"])
    assert torch.equal(one["weights"], two["weights"])
    assert not torch.equal(one["weights"][0], torch.full((2,), 0.5))
