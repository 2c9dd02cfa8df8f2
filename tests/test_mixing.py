"""Unlabelled samples beside labelled ones: the order, the samples, and training on both hosts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset
from tsl_parts import loss_of, predictor, same, student, trainer, transform, windows

from sdkd_plugin import DistillationLoss, GridTransform, precompute
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss, distillation_dataset
from sdkd_plugin.adapters.tsl import SeededDataModule, window_inputs
from sdkd_plugin.data import MixedSampler, MixedSamples, mix, windows_apart

from neuralop import LpLoss, Trainer  # isort: skip
from tsl.data.datamodule.splitters import Splitter  # isort: skip
from tsl.data import SpatioTemporalDataset  # isort: skip
from tsl.data.loader import StaticGraphLoader  # isort: skip

# The order --------------------------------------------------------------------------------------

LABELLED = torch.arange(23) % 3 == 0  # 8 of 23


def epochs(n: int, **options: Any) -> list[list[list[int]]]:
    settings = {"batch_size": 4, "ratio": 0.75, **options}
    sampler = MixedSampler(LABELLED, **settings)
    whole = [list(sampler) for _ in range(n)]
    assert all(len(each) == len(sampler) for each in whole)
    return [np.reshape(each, (-1, settings["batch_size"])).tolist() for each in whole]


@pytest.mark.parametrize(("batch_size", "ratio", "n"), [(4, 0.75, 3), (8, 0.25, 2), (5, 0.4, 2)])
def test_the_ratio_is_exact_in_each_batch(batch_size: int, ratio: float, n: int):
    for batches in epochs(3, batch_size=batch_size, ratio=ratio):
        assert [sum(not LABELLED[i] for i in batch) for batch in batches] == [n] * len(batches)
        assert len(batches) == 8 // (batch_size - n)


def test_an_epoch_is_a_pass_over_the_labelled_and_the_unlabelled_go_on():
    whole = epochs(5)
    for batches in whole:
        assert sorted(b[0] for b in batches) == LABELLED.nonzero()[:, 0].tolist()
    others = [i for batches in whole for batch in batches for i in batch[1:]]
    n = int((~LABELLED).sum())
    for start in range(0, len(others) - n + 1, n):  # 24 an epoch of 15: passes straddle epochs
        assert sorted(others[start : start + n]) == (~LABELLED).nonzero()[:, 0].tolist()
    assert others[:n] != others[n : 2 * n]


def test_the_order_follows_from_seed_and_epoch():
    whole = epochs(3, seed=4)
    assert epochs(3, seed=4) == whole != epochs(3, seed=5)
    assert epochs(1, seed=2**62) != epochs(1, seed=2**62 + 1)
    sampler = MixedSampler(LABELLED, batch_size=4, ratio=0.75, seed=4)
    sampler.set_epoch(2)
    assert list(sampler) == np.ravel(whole[2]).tolist()


def test_processes_share_an_epoch():
    shares = [epochs(1, world=2, rank=rank)[0] for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    mine, theirs = ({i for batch in share for i in batch} for share in shares)
    assert not {i for i in mine & theirs if LABELLED[i]}
    first = {i for batch in epochs(1)[0] for i in batch}
    assert {i for i in mine | theirs if LABELLED[i]} == {i for i in first if LABELLED[i]}


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.3}, r"`ratio` is 0.3, .* multiple of 1/4, since `batch_size` is 4"),
        ({"ratio": 1.0}, "`ratio` is 1.0, expected a number between 0 and 1"),
        ({"ratio": 0.0}, r"`ratio` is 0\.0"),
        ({"ratio": float("nan")}, "`ratio` is nan"),
        ({"batch_size": 1}, "`batch_size` is 1, expected an integer of at least 2"),
        ({"batch_size": 40, "ratio": 0.75}, "`labelled` has 8 samples that are True, .* 10"),
        ({"batch_size": 40, "ratio": 0.9}, "`labelled` has 15 samples that are False, .* 36"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_bad_mixtures(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MixedSampler(LABELLED, **{"batch_size": 4, "ratio": 0.5, **options})


def test_windows_apart_share_no_frame():
    generator = torch.Generator().manual_seed(0)
    starts, others = (torch.randint(200, (30,), generator=generator) for _ in range(2))
    frames = [set(range(int(start), int(start) + 7)) for start in starts]
    taken = {i for start in others for i in range(int(start), int(start) + 7)}
    expected = [not frame & taken for frame in frames]
    assert windows_apart(starts, others, span=7).tolist() == expected
    assert 0 < sum(expected) < 30
    assert windows_apart(starts, others[:0], span=7).all()


# Samples, and neuraloperator's trainer ----------------------------------------------------------


def fields(n: int, seed: int) -> StackDataset:
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return StackDataset(x=x, y=x.roll(1, -1))


def unet(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return REGISTERED["sdkd_unet"](in_channels=1, out_channels=1, width=width, depth=1)


def distillation(teacher: Any = None) -> DistillationLoss:
    return DistillationLoss(teacher or unet(6, 9), GridTransform((8, 8)))


def fit(learner: nn.Module, loss: Any, batches: Any) -> nn.Module:
    optimizer = torch.optim.AdamW(learner.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    host = Trainer(model=learner, n_epochs=2)
    host.train(batches, {}, optimizer, scheduler, training_loss=loss)
    return learner


def test_samples_hide_the_labels_of_unlabelled_ones():
    samples = MixedSamples(fields(3, 0), fields(2, 1))
    assert samples.labelled.tolist() == [True] * 3 + [False] * 2
    assert [int(samples[i]["mask"].sum()) for i in range(5)] == [1, 1, 1, 0, 0]
    assert samples[4]["y"].isnan().all()  # though its data set has labels
    assert torch.equal(samples[4]["x"], fields(2, 1)[1]["x"])
    assert torch.equal(samples[1]["y"], fields(3, 0)[1]["y"])
    assert [samples[i]["index"] for i in range(5)] == list(range(5))
    some = torch.rand(3, 1, 8, 8) > 0.5
    samples = MixedSamples(StackDataset(**fields(3, 0).datasets, mask=some), fields(2, 1))
    assert torch.equal(samples[1]["mask"], some[1])
    assert samples[3]["mask"].shape == some[1].shape
    assert not samples[3]["mask"].any()


@pytest.mark.usefixtures("as_shipped")
def test_bad_samples():
    x = torch.zeros(2, 1, 8, 8)
    for parts, message in [
        (
            (fields(0, 0), fields(1, 0)),
            r"`len\(labelled\)` is 0, expected an integer of at least 1",
        ),
        ((StackDataset(x=x), fields(1, 0)), r"`labelled` has samples of \['x'\], expected a 'y'"),
        ((StackDataset(x=x, y=x, c=x), fields(1, 0)), r"`unlabelled` has samples without \['c'\]"),
        (([x], fields(1, 0)), r"`labelled\[0\]` is of type Tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            MixedSamples(*parts)


@pytest.mark.parametrize("task_loss", ["mse", LpLoss(d=2)], ids=["ours", "the host's"])
def test_an_unlabelled_sample_adds_the_distillation_term_alone(task_loss: Any):
    learner = unet(4, 0)
    loss = TrainerLoss(distillation(), learner, task_loss)
    batch = next(iter(mix(fields(12, 0), fields(12, 1), batch_size=8, ratio=0.75)))
    out = learner(batch["x"])
    total = loss(out, **batch)
    n_labelled = 2
    alone = distillation()(out, batch["x"])
    torch.testing.assert_close(loss.last_terms.frequency, alone.frequency)
    labelled = {name: batch[name][:n_labelled] for name in ("x", "y")}
    task = TrainerLoss(distillation(), learner, task_loss)
    with torch.no_grad():
        expected = task(out[:n_labelled], **labelled) / n_labelled
    torch.testing.assert_close(loss.last_terms.task, expected)
    torch.testing.assert_close(total, 8 * (expected + alone.total))


def test_teachers_asked_ahead_train_as_live_ones(tmp_path: Path):
    given = {"batch_size": 4, "ratio": 0.5, "seed": 3}
    labelled, unlabelled = fields(9, 0), fields(7, 1)
    learner = unet(4, 0)
    live = fit(learner, TrainerLoss(distillation(), learner), mix(labelled, unlabelled, **given))
    samples = MixedSamples(labelled, unlabelled)
    batches = ({"x": batch["x"], "index": batch["index"]} for batch in DataLoader(samples, 5))
    cache = precompute(distillation(), batches, tmp_path)
    learner = unet(4, 0)
    ahead = fit(
        learner, TrainerLoss(distillation(cache), learner), mix(labelled, unlabelled, **given)
    )
    for mine, theirs in zip(live.parameters(), ahead.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    # In memory, with the tensors at hand.
    parts = ConcatDataset([labelled, unlabelled])
    x, y = (torch.stack([each[name] for each in parts]) for name in ("x", "y"))
    (output,) = precompute(distillation(), ({"x": part} for part in x.split(5)))
    sampler = MixedSampler(samples.labelled, **given)
    data = distillation_dataset(x, y, samples.labelled, output)
    learner = unet(4, 0)
    again = fit(learner, TrainerLoss(distillation(), learner), DataLoader(data, 4, sampler=sampler))
    for mine, theirs in zip(live.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


# Windows, and tsl's predictor -------------------------------------------------------------------


class Parts(Splitter):
    def fit(self, dataset: Any) -> None:
        self.set_indices(np.arange(40), np.arange(50, 60), np.arange(62, 63))


def module(numbered: bool = False, masked: bool = True, **options: Any) -> SeededDataModule:
    """The first windows labelled, then those for validation, and unlabelled ones at the end."""
    made = windows(numbered=numbered, **{"unlabelled": range(70, 112), "ratio": 0.75, **options})
    if not masked:
        target = made.torch_dataset.target
        made.torch_dataset = SpatioTemporalDataset(target, window=6, horizon=3)
    made.splitter = Parts()
    made.setup()
    return made


def test_batches_of_windows_have_hidden_targets():
    data = module()
    for _ in range(2):
        loader = data.train_dataloader()
        n = 0
        for batch in loader:
            assert batch.x.shape[0] == 16
            assert (batch.mask.flatten(1).any(1)).sum() <= 4
            assert not batch.mask[4:].any()
            assert batch.y[4:].isnan().all()
            assert batch.y[:4].isfinite().all()
            assert not batch.x.isnan().any()
            n += 1
        assert n == len(data.trainset) // 4
    plain = windows()
    plain.splitter = data.splitter
    plain.setup()
    for name, scaler in data.torch_dataset.scalers.items():  # unlabelled windows fit no scaler
        assert torch.equal(scaler.bias, plain.torch_dataset.scalers[name].bias)
    assert not torch.isnan(data.torch_dataset.target).any()


def test_a_data_set_without_a_mask_gets_one():
    data = module(masked=False)
    batch = next(iter(data.train_dataloader()))
    assert batch.mask.dtype == torch.bool
    assert batch.mask.flatten(1).all(1).tolist() == [True] * 4 + [False] * 12


def test_an_unlabelled_window_adds_the_distillation_term_alone():
    batch = next(iter(module().train_dataloader()))
    learner, loss = student(), loss_of()
    made = predictor(learner, loss)
    made.log_dict = made.log_metrics = made.log_loss = lambda *_, **__: None
    total = made.training_step(batch, 0)
    scaled = learner(**batch.input)
    alone = loss(scaled, **batch.input)
    assert alone.total > 0
    forecast = batch.transform["y"].inverse_transform(scaled)
    task = (forecast - batch.y)[batch.mask].abs().mean()  # all of the four labelled windows
    torch.testing.assert_close(total, task + alone.total)


def test_windows_asked_ahead_train_as_live_ones(tmp_path: Path):
    # A validation weighs live teachers alone.
    loss = loss_of(trust=False)

    def fitted(ahead: str) -> nn.Module:
        data, made = module(numbered=True), predictor(student(), loss)
        if ahead == "memory":
            made.precompute(data)
        elif ahead == "disk":
            batches = window_inputs(StaticGraphLoader(data.training_windows, batch_size=16))
            stored = DistillationLoss(precompute(loss, batches, tmp_path), transform())
            made = predictor(student(), stored)
        trainer().fit(made, datamodule=data)
        return made.model

    live, memory, disk = map(fitted, ("live", "memory", "disk"))
    for theirs in (memory, disk):
        for mine, each in zip(live.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, each)
    assert not same(live, student())


def test_without_unlabelled_windows_all_is_as_before():
    data = windows()
    data.setup()
    assert data.training_windows is data.trainset
    assert isinstance(data.training_windows, Subset)


@pytest.mark.usefixtures("as_shipped")
def test_bad_unlabelled_windows():
    for numbers, message in [
        (range(35, 45), r"`unlabelled` has windows of train too, such as \[35, 36, 37\]"),
        ([61, 62], r"`unlabelled` has windows of test too, such as \[62\]"),
        ([100, 500], "`unlabelled` has windows from 100 to 500, expected 0 to 111"),
        ([], r"`len\(unlabelled\)` is 0, expected an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(unlabelled=numbers)
    with pytest.raises(ValueError, match=r"`ratio` is 0\.3"):
        module(ratio=0.3).train_dataloader()
