"""Training from a cache is training with the teachers, behind both hosts too."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_parts import ALL, GRID, TAPS, Teacher, X, Y, batches, loss_of, net
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import (
    DistillationLoss,
    SDKDDistiller,
    TeacherCache,
    precompute,
)


def trained(teacher: Any, latents: Any = (), *, steps: int = 12, **options: Any) -> nn.Module:
    student = net(7)
    example = {"x": X[:2], "index": ALL[:2]} if isinstance(teacher, TeacherCache) else {"x": X[:2]}
    distiller = SDKDDistiller(
        teacher, student, GRID, latents=latents, example=example, weighting="adaptive", **options
    )
    optimizer = torch.optim.Adam(distiller.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        rows = torch.randint(len(X), (5,), generator=generator)
        terms = distiller.step(X[rows], Y[rows], index=rows)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    return student


@pytest.mark.parametrize("options", [{}, {"aggregation": "camkd"}, {"aggregation": "aekd"}])
def test_training_from_a_cache_is_training_with_the_teachers(
    tmp_path: Path, options: dict[str, Any]
):
    teachers = [net(1, Teacher), net(2)] if options else [net(1, Teacher)]
    loss = loss_of(*teachers, latents=TAPS)
    cache = precompute(loss, batches(), tmp_path)
    live = trained(teachers, TAPS, **options)
    Teacher.calls = 0
    stored = trained(cache, TAPS, **options)
    assert Teacher.calls == 0
    for mine, theirs in zip(live.parameters(), stored.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_views_train_as_an_augmentation_does(tmp_path: Path):
    cache = precompute(loss_of(), batches(), tmp_path, augmentation="mixup", views=2)
    assert all(p.isfinite().all() for p in trained(cache, steps=3).parameters())
    distiller = SDKDDistiller(cache, net(7), GRID)
    terms = distiller.step(X, Y, index=ALL)
    assert torch.equal(terms.task, (distiller.student(X) - Y).square().mean().detach())
    with pytest.raises(ValueError, match="augmented views, without labels"):
        SDKDDistiller(cache, net(7), GRID, teacher_bound=0.0)


def test_what_would_make_stored_outputs_wrong_is_refused(tmp_path: Path):
    cache = precompute(loss_of(), batches(), tmp_path)
    distiller = SDKDDistiller(cache, net(7), GRID)
    rows = torch.tensor([3, 4])
    for x in (X[rows] + 1e-3 * torch.randn(2, 1, 8, 8), X[rows].flip(-1), X[rows].flip(0)):
        with pytest.raises(ValueError, match=r"the inputs of sample [34] are not those"):
            distiller.step(x, index=rows)
    with pytest.raises(ValueError, match="`index` is None and the teachers' outputs are stored"):
        distiller.step(X[rows])
    with pytest.raises(ValueError, match="`augmentation` is given with stored outputs"):
        SDKDDistiller(cache, net(7), GRID, augmentation="noise")
    with pytest.raises(ValueError, match=r"taps \['0'\] of teacher 0"):
        DistillationLoss(cache, GRID, latents=TAPS)
    with pytest.raises(ValueError, match="no live teacher"):
        precompute(distiller.loss, batches(), tmp_path)


def test_inputs_that_only_the_teacher_takes_are_still_accepted(tmp_path: Path):
    def teacher(x: Tensor, level: Tensor) -> Tensor:
        return x + level

    level = torch.ones(4, 1, 1, 1)
    cache = precompute(loss_of(teacher), batches(X[:4], level=level), tmp_path)
    distiller = SDKDDistiller(cache, net(7), GRID)
    distiller.step(X[:4], index=ALL[:4], level=level)
    with pytest.raises(ValueError, match=r"the inputs \['lvel'\] are accepted by neither"):
        distiller.step(X[:4], index=ALL[:4], lvel=level)


def test_a_cache_larger_than_one_chunk_is_verified_where_it_is_read(tmp_path: Path):
    precompute(loss_of(), batches(), tmp_path)
    raw = tmp_path / "part0000.raw"
    damaged = np.frombuffer(raw.read_bytes(), np.uint8).copy()
    damaged[-1] ^= 1
    raw.write_bytes(damaged.tobytes())
    cache = TeacherCache(tmp_path)
    cache.outputs(ALL[:20])
    with pytest.raises(ValueError, match=r"part0000.raw is damaged in chunk 5\. Delete"):
        cache.outputs(ALL[20:])
    with pytest.raises(ValueError, match="chunk 5"):
        cache.verify()


# The hosts


def test_neuraloperators_trainer_reads_by_the_samples_index(tmp_path: Path):
    from neuralop import Trainer

    from sdkd_plugin.adapters.neuralop import TrainerLoss, distillation_dataset

    cache = precompute(loss_of(), batches(), tmp_path)

    def student_of(teacher: Any) -> nn.Module:
        student = copy.deepcopy(SmallStudent())
        loss = TrainerLoss(DistillationLoss(teacher, GRID), student)
        samples = distillation_dataset(X, Y, teacher=teacher if teacher is cache else None)
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(samples, 5, shuffle=True, generator=generator)
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        Trainer(model=student, n_epochs=2).train(
            loader,
            {},
            optimizer,
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            training_loss=loss,
            eval_losses={},
        )
        return student

    live = student_of(net(1, Teacher))
    Teacher.calls = 0
    stored = student_of(cache)
    assert Teacher.calls == 0
    for mine, theirs in zip(live.parameters(), stored.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class SmallStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_tsls_predictor_reads_by_the_number_of_the_window(tmp_path: Path):
    import tsl_parts
    from tsl.data.loader import StaticGraphLoader

    from sdkd_plugin.adapters.tsl import OnSensors, window_inputs

    module = tsl_parts.windows(numbered=True)
    module.setup()
    windows = window_inputs(StaticGraphLoader(module.trainset, batch_size=16))
    cache = precompute(tsl_parts.loss_of(), windows, tmp_path)
    stored = DistillationLoss(cache, tsl_parts.transform())
    trained = []
    for loss in (tsl_parts.loss_of(), stored):
        trained.append(tsl_parts.predictor(loss=loss))
        tsl_parts.trainer(limit_val_batches=0).fit(trained[-1], module)
    for mine, theirs in zip(*(each.model.parameters() for each in trained), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    other = tsl_parts.first_batch(tsl_parts.windows(numbered=True, shift=5.0))
    with pytest.raises(ValueError, match="the inputs of sample"):
        trained[1].training_step(other, 0)
    cache.names = (OnSensors.__name__,)
    with pytest.raises(ValueError, match="of a teacher of some sensors"):
        tsl_parts.predictor(loss=stored)
