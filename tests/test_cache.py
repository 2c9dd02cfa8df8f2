"""Stored outputs of teachers: what is kept, what is refused, and training from it."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sdkd_plugin import (
    DistillationLoss,
    GaussianNoise,
    GridTransform,
    LatentPair,
    SDKDDistiller,
    TeacherCache,
    precompute,
)
from sdkd_plugin._files import locked
from sdkd_plugin.cache import building, cache_key
from sdkd_plugin.cache.files import line, parsed

GRID = GridTransform((8, 8))
X = torch.randn(22, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = X.roll(1, -1)
ALL = torch.arange(len(X))
TAPS = [LatentPair("0", "0")]


class Teacher(nn.Sequential):
    """Counts its calls, over all copies."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Teacher.calls += 1
        return super().forward(x)


def net(seed: int = 0, kind: type = nn.Sequential) -> nn.Module:
    torch.manual_seed(seed)
    conv = [nn.Conv2d(a, b, 3, padding=1, padding_mode="circular") for a, b in ((1, 4), (4, 1))]
    return kind(conv[0], nn.GELU(), conv[1])


def loss_of(*teachers: Any, **options: Any) -> DistillationLoss:
    return DistillationLoss(teachers or net(1, Teacher), GRID, **options)


def batches(x: Tensor = X, size: int = 4, **more: Any) -> list[dict[str, Any]]:
    return [{"x": part, **more} for part in x.split(size)]


def same(one: Any, other: Any) -> bool:
    return all(
        torch.equal(a.forecast, b.forecast)
        and a.latents.keys() == b.latents.keys()
        and all(torch.equal(a.latents[tap], b.latents[tap]) for tap in a.latents)
        for a, b in zip(one, other, strict=True)
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is kept


def test_a_cache_gives_what_the_teachers_gave(tmp_path: Path):
    loss = loss_of(net(1), net(2), latents=TAPS)
    cache = precompute(loss, batches(), tmp_path / "new" / "cache")
    outputs, rows = precompute(loss, batches()), torch.randperm(len(X))
    assert same(cache.outputs(rows, X[rows]), [output.select(rows) for output in outputs])
    assert len(cache) == len(X)
    assert set(cache.round_trip.values()) == {0.0}
    assert cache.taps == (("0",), ("0",))


@pytest.mark.parametrize(("storage", "bound"), [("float16", 3e-4), ("bfloat16", 3e-3)])
def test_half_precision_has_the_error_that_it_states(tmp_path: Path, storage: str, bound: float):
    magnitudes = 10.0 ** torch.linspace(-12, 12, len(X)).reshape(-1, 1, 1, 1)
    loss = loss_of(lambda x: x)
    x = X * magnitudes
    cache = precompute(loss, batches(x), tmp_path, storage=storage)
    stored = cache.outputs(ALL, x)[0].forecast
    relative = (stored - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert 0 < float(relative.max()) < bound
    assert cache.round_trip["0.forecast"] == pytest.approx(
        float((stored - x).norm() / x.norm()), rel=1e-3
    )
    assert (tmp_path / "part0000.raw").stat().st_size == 2 * x.numel()


def test_the_error_is_printed_behind_the_bar(tmp_path: Path, capfd: pytest.CaptureFixture):
    precompute(loss_of(), batches(), tmp_path, storage="float16", progress=True)
    out, err = capfd.readouterr()
    assert "error of storing: 0.forecast 2.1e-04" in out
    assert "6/6" in err


def test_zeros_and_other_dtypes_come_back(tmp_path: Path):
    zeros = precompute(loss_of(lambda x: 0 * x), batches(), tmp_path / "0", storage="float16")
    assert not zeros.outputs(ALL)[0].forecast.any()
    half = precompute(loss_of(lambda x: x.bfloat16()), batches(), tmp_path / "1")
    assert torch.equal(half.outputs(ALL)[0].forecast, X.bfloat16())


def test_samples_have_the_numbers_that_they_are_given(tmp_path: Path):
    numbers = torch.randperm(100)[: len(X)]
    given = [{"x": x, "index": n} for x, n in zip(X.split(5), numbers.split(5), strict=True)]
    cache = precompute(loss_of(), given, tmp_path)
    rows = torch.tensor([7, 0, 21])
    assert same(
        cache.outputs(numbers[rows], X[rows]),
        [output.select(rows) for output in precompute(loss_of(), batches(size=5))],
    )
    missing = min(set(range(100)) - set(numbers.tolist()))
    with pytest.raises(ValueError, match=rf"`index` has {missing}, but the cache"):
        cache.outputs(torch.tensor([missing]))


def test_numbers_come_once(tmp_path: Path):
    one = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="repeated"):
        precompute(loss_of(), batches(X[:4], index=one), tmp_path)


def test_views_are_kept_with_their_inputs(tmp_path: Path):
    options: dict[str, Any] = {"augmentation": "noise", "views": 3}
    cache = precompute(loss_of(), batches(), tmp_path / "0", **options)
    index, seen = cache.draw_views(ALL, X)
    assert set(index[:, 1].tolist()) == {0, 1, 2, 3}
    plain = index[:, 1] == 0
    assert torch.equal(seen[plain], X[plain])
    assert not torch.equal(seen[~plain], X[~plain])
    expected = loss_of().teacher_outputs(seen)[0].forecast
    assert torch.allclose(cache.outputs(index, seen)[0].forecast, expected, atol=1e-6)
    with pytest.raises(ValueError, match="3 augmented views"):
        cache.outputs(torch.tensor([[0, 4]]))
    again = precompute(loss_of(), batches(), tmp_path / "1", **options)
    other = precompute(loss_of(), batches(), tmp_path / "2", **options, seed=1)
    first = torch.stack([ALL, torch.ones_like(ALL)], 1)
    assert same(cache.outputs(first), again.outputs(first))
    assert not same(cache.outputs(first), other.outputs(first))


# What does not match


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"loss": loss_of(net(5, Teacher))}, "key.teachers.0.weights"),
        ({"loss": loss_of(net(1))}, "key.teachers.0.class"),
        ({"loss": loss_of(latents=TAPS)}, "key.teachers.0.taps"),
        ({"loss": loss_of(net(1, Teacher), net(2))}, "key.teachers.1"),
        ({"preprocessing": {"mean": torch.ones(3)}}, "key.preprocessing.mean"),
        ({"storage": "float16"}, "`key.storage` is 'float32' in the cache and 'float16' here"),
        ({"augmentation": "mixup", "views": 1}, "key.views"),
        ({"batches": batches(X + 1e-6)}, "other inputs in batch 0"),
        ({"batches": batches(X.flip(0))}, "other inputs in batch 0"),
        ({"batches": batches(X[:20])}, "has 5 batches and the cache"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, change: dict[str, Any], named: str):
    precompute(loss_of(), batches(), tmp_path, preprocessing={"mean": 0.5})
    before = content(tmp_path)
    given = {"loss": loss_of(), "batches": batches(), "preprocessing": {"mean": 0.5}, **change}
    with pytest.raises(ValueError, match=named):
        precompute(given.pop("loss"), given.pop("batches"), tmp_path, **given)
    assert content(tmp_path) == before


def test_a_key_is_compared_when_a_cache_is_opened(tmp_path: Path):
    precompute(loss_of(), batches(), tmp_path, preprocessing={"mean": 0.5})
    key = cache_key(loss_of(), preprocessing={"mean": 0.5})
    assert TeacherCache(tmp_path, key).key == key
    with pytest.raises(ValueError, match=r"key\.preprocessing\.mean` is '0.5' .* '0.6' here"):
        TeacherCache(tmp_path, {"preprocessing": {"mean": 0.6}})


def test_functions_are_known_by_what_they_capture():
    def teacher(model: nn.Module, factor: float) -> Any:
        return lambda x: factor * model(x)

    def key(function: Any) -> Any:
        return cache_key(loss_of(function))["teachers"][0]["weights"]

    assert key(teacher(net(1), 2.0)) == key(teacher(net(1), 2.0))
    keys = {
        key(each)
        for each in (
            teacher(net(1), 2.0),
            teacher(net(1), 3.0),
            teacher(net(2), 2.0),
            lambda x: x,
            lambda x: -x,
        )
    }
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"storage": "int8"}, "storage"),
        ({"views": 2}, "`views` is 2 and `augmentation` is None"),
        ({"augmentation": "noise"}, "both or neither"),
        ({"seed": -1}, "seed"),
        ({"augmentation": GaussianNoise(0.1, torch.Generator()), "views": 1}, "`generator`"),
        ({"preprocessing": {"mean": float("nan")}}, "`preprocessing` cannot be written"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, as_shipped: None, options: dict[str, Any], named: str
):
    with pytest.raises(ValueError, match=named):
        precompute(loss_of(), batches(), tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_outputs_that_cannot_be_kept_are_refused(tmp_path: Path):
    for function, named in (
        (lambda x: x / 0, "0.forecast` has"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x[:1], "one row for each sample"),
    ):
        with pytest.raises(ValueError, match=named):
            precompute(loss_of(function), batches(), tmp_path)
    with pytest.raises(ValueError, match="`batches` is empty"):
        precompute(loss_of(), [], tmp_path)
    changing = [*batches(X[:4]), *batches(torch.zeros(4, 1, 4, 4))]
    with pytest.raises(ValueError, match="batch 1 gives"):
        precompute(loss_of(), changing, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


# Building


def test_finished_chunks_are_not_computed_again(tmp_path: Path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    precompute(loss_of(), batches(), whole)

    def ended() -> Any:
        yield from batches()[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(loss_of(), ended(), part)
    with pytest.raises(FileNotFoundError, match="no finished cache: call `precompute`"):
        TeacherCache(part)
    with (part / "part0000.raw").open("ab") as raw, (part / "part0000.table").open("ab") as table:
        raw.write(b"torn")
        table.write(b'{"crc": 12')
    (part / ".manifest.json.0123.tmp").mkdir()
    Teacher.calls = 0
    precompute(loss_of(), batches(), part)
    assert Teacher.calls == 3
    assert content(part) == content(whole)
    precompute(loss_of(), batches(), part)
    assert Teacher.calls == 3


def test_samples_are_appended(tmp_path: Path):
    old = precompute(loss_of(), batches(X[:12]), tmp_path)
    Teacher.calls = 0
    new = precompute(loss_of(), batches(), tmp_path)
    assert Teacher.calls == 3
    assert (len(old), len(new)) == (12, 22)
    rows = torch.randperm(len(X))
    assert same(
        new.outputs(rows, X[rows]), [o.select(rows) for o in precompute(loss_of(), batches())]
    )
    assert same(old.outputs(ALL[:12]), new.outputs(ALL[:12]))


_BUILD = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_cache import *
torch.set_num_threads(1)
if {group}: torch.distributed.init_process_group("gloo")
print(len(precompute(loss_of(), batches(), {folder!r})), Teacher.calls)
"""


@pytest.mark.parametrize("group", [False, True])
def test_each_process_builds_a_part(tmp_path: Path, group: bool):
    code = _BUILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path), group=group)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(29600 + os.getpid() % 300)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [each.communicate(timeout=120)[0].split() for each in running] == [["22", "3"]] * 2
    cache, rows = TeacherCache(tmp_path), torch.randperm(len(X))
    expected = [output.select(rows) for output in precompute(loss_of(), batches())]
    assert same(cache.outputs(rows, X[rows]), expected)
    assert {"part0000.raw", "part0001.raw"} < content(tmp_path).keys()


def test_a_missing_process_is_named_and_its_part_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(building, "PATIENCE", 0.3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"the processes \[1\] of 2 did not finish"):
        precompute(loss_of(), batches(), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    Teacher.calls = 0
    assert len(precompute(loss_of(), batches(), tmp_path)) == len(X)
    assert Teacher.calls == 3


def test_a_second_builder_waits_for_the_first(tmp_path: Path):
    code = _BUILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path), group=False)
    with locked(tmp_path / ".process0.lock"):
        second = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(10)
        assert not (tmp_path / "part0000.table").exists()
    assert second.communicate(timeout=60)[0].split() == ["22", "6"]


# Files


def test_lines_hold_their_checksum():
    text = line({"a": [1.5, "b"]})
    assert json.loads(text)["value"] == {"a": [1.5, "b"]}
    assert parsed(text) == {"a": [1.5, "b"]}
    for other in (text[:-1], text.replace(b"1.5", b"1.6"), b"[" * 100_000, b"{}", b"\xff", b""):
        assert parsed(other) is None


@pytest.mark.parametrize("name", ["part0000.raw", "part0000.table", "manifest.json"])
def test_missing_and_short_files_are_named(tmp_path: Path, name: str):
    precompute(loss_of(), batches(), tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    for cut in (whole[:-1], b"", whole + b"0"):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=rf"{name}.*Delete .* and build the cache again"):
            TeacherCache(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        TeacherCache(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written \(Not a directory\).*file/cache"):
        precompute(loss_of(), batches(), tmp_path / "file" / "cache")


def test_the_umask_is_respected(tmp_path: Path):
    before = os.umask(0o027)
    try:
        precompute(loss_of(), batches(), tmp_path / "cache")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert modes == {0o640}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o750


class Samples(Dataset):
    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        return i, self.cache.outputs(torch.tensor([i]))[0].forecast[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_shuffled_samples(tmp_path: Path, context: str):
    cache = precompute(loss_of(), batches(), tmp_path)
    loader = DataLoader(
        Samples(cache), 5, shuffle=True, num_workers=2, multiprocessing_context=context
    )
    numbers, forecasts = (torch.cat(each) for each in zip(*loader, strict=True))
    assert numbers.sort().values.tolist() == ALL.tolist()
    assert torch.equal(forecasts, cache.outputs(numbers)[0].forecast)


def test_a_copy_opens_the_folder_again(tmp_path: Path):
    cache = precompute(loss_of(), batches(), tmp_path)
    for copied in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):  # noqa: S301
        assert same(copied.outputs(ALL), cache.outputs(ALL))
    assert len(pickle.dumps(cache)) < 1000


# Training


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
