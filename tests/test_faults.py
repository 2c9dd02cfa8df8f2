"""What is left of everything that is written after kills, changed bytes, full disks, two writers.

Small numbers of faults run in the normal gate, the full ones with ``make test-all``; each test
prints its counts.
"""

import os
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_parts import ALL, X, batches, content, loss_of
from cache_parts import same as same_outputs
from click.testing import CliRunner
from fault_parts import WRITTEN, ended, fill_up, forked, killed, make_read_only, same
from safetensors.torch import load_file
from test_neuralop_training import run as train_grid

from sdkd_plugin import DistillationLoss, TeacherCache, precompute
from sdkd_plugin._files import check_files
from sdkd_plugin.cli import main
from sdkd_plugin.report import append_rows

SLOW = pytest.mark.slow
SEALED = [name for name, kept in WRITTEN.items() if kept.sealed]


def counted(few: int, many: int) -> pytest.MarkDecorator:
    """A few faults in the gate, many in the whole suite."""
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=SLOW)])


def states_of(name: str, folder: Path) -> list:
    """What reading gives of each version."""
    kept, states = WRITTEN[name], []
    for version in range(2 if kept.versions else 1):
        kept.write(folder / f"{version}", version)
        states.append(kept.read(folder / f"{version}"))
    return states


# Kills


@counted(3, 50)
def test_a_killed_build_ends_as_an_uninterrupted_one(tmp_path: Path, n: int):
    folder, log = tmp_path / "cache", tmp_path / "log"

    def slow():
        for batch in batches(size=1):
            time.sleep(0.002)
            yield batch

    def build() -> None:
        outputs = DistillationLoss.teacher_outputs

        def logged(self, x, **inputs):
            with log.open("ab") as file:
                file.write(b".")
            return outputs(self, x, **inputs)

        DistillationLoss.teacher_outputs = logged
        precompute(loss_of(), slow(), folder)

    start = time.monotonic()
    whole = content(precompute(loss_of(), slow(), tmp_path / "whole").folder)
    longest = 1.2 * (time.monotonic() - start)
    kills = finished = again = 0

    def finish() -> None:
        nonlocal finished, again
        TeacherCache(folder).verify()
        precompute(loss_of(), batches(size=1), folder)
        assert content(folder) == whole
        finished, again = finished + 1, again + log.stat().st_size - len(X)
        shutil.rmtree(folder)
        log.unlink()

    for was_killed in killed(build, n, longest):
        kills += was_killed
        if (folder / "manifest.json").exists():
            finish()
    assert ended(forked(build)) == 0
    finish()
    print(f"{kills} kills, {finished} finished builds, {again} chunks computed again")
    # A kill loses the chunk that is being computed, no finished one.
    assert kills == n
    assert again <= kills


QUICK = ["training.seeds=3", "training.steps=8", "training.validations=2", "training.batch_size=4"]


@counted(3, 20)
def test_a_killed_training_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch, n: int):
    monkeypatch.chdir(tmp_path)
    options = ["n_sensors=6", "days=2", "freeways=[1,1]"]
    found = CliRunner().invoke(main, ["simulate", "traffic", "data", *options])
    data = found.output.splitlines()[-1].removeprefix("Use it by ").split()

    def distill(out: str, resume: bool = True) -> None:
        words = ["distill", "traffic", *data, *QUICK, "teacher=null", f"out={out}"]
        done = CliRunner().invoke(main, [*words, *["--resume"] * resume])
        assert done.exit_code == 0, done.output + done.stderr

    start = time.monotonic()
    distill("whole", resume=False)
    longest = time.monotonic() - start

    def weights(out: str) -> list:
        files = sorted(tmp_path.glob(f"{out}/models/*")) + sorted(
            tmp_path.glob(f"{out}/student/*.safetensors")
        )
        return [(file.name, load_file(file)) for file in files]

    kills = finished = 0
    for was_killed in killed(partial(distill, "run"), n, longest):
        kills += was_killed
        if not was_killed or kills == n:
            distill("run")
            for (name, mine), (expected, theirs) in zip(
                weights("run"), weights("whole"), strict=True
            ):
                assert name == expected
                assert same(mine, theirs)
            finished += 1
            shutil.rmtree("run")
    print(f"{kills} kills, {finished} finished runs")
    assert kills == n
    assert finished


@counted(3, 20)
def test_a_killed_training_of_neuraloperator_ends_as_an_uninterrupted_one(tmp_path: Path, n: int):
    folder, whole = tmp_path / "run", train_grid(6)

    def on(count: list | None = None) -> None:
        there = (folder / "training.sha256").exists() or (folder / ".training.new").exists()
        resume = {"resume_from_dir": folder} if there else {}
        made = train_grid(6, save_every=1, save_dir=folder, **resume)
        if count is not None:
            count.append(made)

    start = time.monotonic()
    on()
    longest = time.monotonic() - start
    shutil.rmtree(folder)
    kills = finished = 0
    last = list[object]()
    for was_killed in killed(on, n, longest):
        kills += was_killed
        with suppress(FileNotFoundError):
            check_files(folder, "training")
        try:
            on(last)
        except ValueError as error:  # killed after its last checkpoint
            if "has finished 6 epochs" not in str(error):
                raise
            shutil.rmtree(folder)
            continue
        for name, value in whole.student.named_parameters():
            assert torch.equal(value, last[-1].student.get_parameter(name))
        finished += 1
        shutil.rmtree(folder)
    print(f"{kills} kills, {finished} finished runs")
    assert kills == n
    assert finished


@counted(2, 15)
@pytest.mark.parametrize("name", ["model folder", "array", "cache", "training of neuraloperator"])
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path, name: str, n: int):
    kept, folder = WRITTEN[name], tmp_path / "it"
    states = states_of(name, tmp_path)
    kept.write(folder, 0)

    def for_ever() -> None:
        for version in range(1, 10**9):
            kept.write(folder, version % len(states))

    for _ in killed(for_ever, n, 0.3):
        read = kept.read(folder)
        assert any(same(read, state) for state in states)
        kept.write(folder, 0)
        assert not list(folder.glob(".*.tmp"))
    print(f"{n} kills of writers of the {name}")


# Changed and missing bytes


def damaged(path: Path, change) -> bytes:
    """Change a file; what it held."""
    whole = path.read_bytes()
    path.unlink()  # models may have it mapped
    path.write_bytes(change(bytearray(whole)))
    return whole


def restore(path: Path, whole: bytes) -> None:
    path.unlink()
    path.write_bytes(whole)


@pytest.fixture(scope="module", params=list(WRITTEN))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """What was written, its files and what reading it gives."""
    kept, folder = WRITTEN[request.param], tmp_path_factory.mktemp("written") / "it"
    kept.write(folder, 0)
    files = [path for path in sorted(folder.glob(kept.files)) if path.stat().st_size]
    return request.param, kept, folder, files, kept.read(folder)


@counted(8, 40)  # 200 over what is sealed
def test_every_changed_byte_is_found(written, n: int):
    name, kept, folder, files, state = written
    chance, found = np.random.default_rng(0), 0
    for change in range(n):
        path = files[change % len(files)]
        place, bits = chance.integers(path.stat().st_size), int(chance.integers(1, 256))

        def flip(content: bytearray, place: int = place, bits: int = bits) -> bytes:
            content[place] ^= bits
            return bytes(content)

        whole = damaged(path, flip)
        try:
            read = kept.read(folder)
        except ValueError as error:
            found += any(part in str(error) for part in (path.name, str(folder)))
        else:
            # A zip has bytes that mean nothing, such as times.
            assert not kept.sealed, f"byte {place} of {path.name} changed by {bits} unnoticed"
            assert same(read, state)
        restore(path, whole)
    assert same(kept.read(folder), state)
    print(f"{name}: {found} of {n} changed bytes found, {n - found} without effect")
    assert found == n or not kept.sealed


@counted(4, 20)
def test_every_missing_part_is_found(written, n: int):
    name, kept, folder, files, _ = written
    chance = np.random.default_rng(0)
    for cut in range(n):
        path = files[cut % len(files)]
        length = int(chance.integers(path.stat().st_size))
        whole = damaged(path, lambda content, length=length: bytes(content[:length]))
        with pytest.raises(ValueError, match=rf"{folder}|{path.name}"):
            kept.read(folder)
        restore(path, whole)
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        if name != "run folder":  # it trains again what is not there
            with pytest.raises((ValueError, FileNotFoundError), match=rf"{folder}|{path.name}"):
                kept.read(folder)
        path.write_bytes(whole)
    print(f"{name}: {n} cut files and {len(files)} missing ones found")


# Disks


def kept_or_told(write: Callable[[], Any], folder: Path) -> bool:
    """Whether all was written; else an error or a warning says so and names the folder."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            write()
        except OSError as error:
            said = [str(error)]
        else:
            said = [str(each.message) for each in caught if "not kept" in str(each.message)]
    for text in said:
        assert "cannot be written" in text
        assert str(folder) in text
    return not said


@pytest.mark.parametrize("kilobytes", [0, 4, 16])
@pytest.mark.parametrize("name", SEALED)
def test_a_full_disk_is_told_and_holds_no_half(tmp_path: Path, name: str, kilobytes: int):
    kept, folder = WRITTEN[name], tmp_path / "disk"

    def work() -> None:
        fill_up(folder, max(4, kilobytes))
        if kilobytes == 0:
            with suppress(OSError):
                (folder / "filler").write_bytes(bytes(8192))
        whole = kept_or_told(lambda: kept.write(folder / "it", 0), folder)
        assert kilobytes > 0 or not whole
        try:
            kept.read(folder / "it")
        except OSError:  # not there, or a study that trains what is not
            assert not whole

    assert ended(forked(work)) == 0


@pytest.mark.parametrize("name", SEALED)
def test_a_read_only_disk_is_told_and_can_be_read(tmp_path: Path, name: str):
    kept, folder = WRITTEN[name], tmp_path / "disk"
    kept.write(folder, 0)
    state = kept.read(folder)

    def work() -> None:
        if not make_read_only(folder):
            os._exit(77)
        assert same(kept.read(folder), state)
        assert not kept_or_told(lambda: kept.write(folder / "new", 1), folder)

    status = ended(forked(work))
    if status == 77:
        pytest.skip("this user may write everywhere")
    assert status == 0


def test_a_full_disk_keeps_finished_chunks(tmp_path: Path):
    folder = tmp_path / "cache"

    def work() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(OSError, match=f"cannot be written.*finished chunks are kept.*{folder}"):
            precompute(loss_of(), batches(), folder)

    assert ended(forked(work)) == 0
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        TeacherCache(folder)
    assert (folder / "part0000.table").read_bytes().count(b"\n") == 3
    cache = precompute(loss_of(), batches(), folder)
    assert same_outputs(cache.outputs(ALL, X), precompute(loss_of(), batches()))


def test_a_power_cut_costs_the_chunks_that_it_lost(tmp_path: Path):
    whole = content(precompute(loss_of(), batches(), tmp_path).folder)
    (tmp_path / "manifest.json").unlink()
    raw = tmp_path / "part0000.raw"
    raw.write_bytes(whole[raw.name][:3000] + b"\0" * 1000)
    precompute(loss_of(), batches(), tmp_path)
    assert content(tmp_path) == whole


# Several writers


@counted(4, 25)
@pytest.mark.parametrize("name", SEALED)
def test_two_writers_and_a_reader_at_once(tmp_path: Path, name: str, n: int):
    kept, folder = WRITTEN[name], tmp_path / "it"
    states = states_of(name, tmp_path)
    kept.write(folder, 0)

    def work(number: int) -> None:
        for turn in range(n):
            kept.write(folder, (turn + number) % len(states))

    writers = [forked(partial(work, number)) for number in range(2)]
    reads = 0
    while not all(
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in writers
    ):
        read = kept.read(folder)
        assert any(same(read, state) for state in states)
        reads += 1
    assert [ended(pid) for pid in writers] == [0, 0]
    assert any(same(kept.read(folder), state) for state in states)
    print(f"{name}: 2 writers of {n} versions, {reads} reads between")


def test_rows_of_two_writers_are_all_kept(tmp_path: Path):
    def work(writer: int) -> None:
        for i in range(20):
            append_rows(tmp_path / "rows.csv", [{"writer": writer, "i": i}])

    assert [ended(pid) for pid in [forked(partial(work, w)) for w in range(2)]] == [0, 0]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 41


def test_readers_see_the_old_cache_while_samples_are_appended(tmp_path: Path):
    precompute(loss_of(), batches(X[:12]), tmp_path)
    seen = []

    def more():
        for batch in batches():
            seen.append(len(TeacherCache(tmp_path)))
            yield batch
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute(loss_of(), more(), tmp_path)
    assert seen == [12] * 6
    assert len(TeacherCache(tmp_path)) == 12
    assert len(precompute(loss_of(), batches(), tmp_path)) == len(X)
