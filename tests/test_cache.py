"""Stored outputs of teachers: what is kept, what does not match, files and workers."""

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_parts import ALL, TAPS, Teacher, X, batches, content, loss_of, net, same
from small import medium_precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sdkd_plugin import (
    DistillationLoss,
    GaussianNoise,
    GridTransform,
    TeacherCache,
    precompute,
)
from sdkd_plugin.cache import cache_key
from sdkd_plugin.cache.files import line, parsed

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


@pytest.mark.parametrize("number", [-1, len(X)])
@pytest.mark.parametrize("parts", [1, 2])
def test_numbers_that_are_not_there_are_refused(tmp_path: Path, number: int, parts: int):
    given = list(batches())
    for part in range(parts):
        precompute(loss_of(), given[: len(given) // (parts - part)], tmp_path)
    cache, index = TeacherCache(tmp_path), torch.tensor([0, number])
    for verified in (False, True):
        for x in (None, X[:2]):
            with pytest.raises(ValueError, match=rf"`index` has {number}, but the cache"):
                cache.outputs(index, x)
        if not verified:
            cache.verify()


def test_inputs_are_recognised_in_any_layout_and_precision(tmp_path: Path):
    x = torch.rand(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    last = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    loss = DistillationLoss(lambda x: x.detach().mean((1, 2, 3)), GridTransform((64, 64)))
    given = [{"x": last, "index": torch.arange(64)}]
    cache = precompute(loss, given, tmp_path)
    with medium_precision():
        (found,) = cache.outputs(torch.arange(8), x[:8].requires_grad_())
    assert found.forecast.shape == (8,)
    with pytest.raises(ValueError, match="inputs of sample 0 are not those"):
        cache.outputs(torch.arange(8), x[:8] * (1 + 1e-5))


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
