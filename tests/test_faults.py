"""What is left of everything that is written after changed bytes, full disks, two writers.

Small numbers of faults run in the normal gate, the full ones with ``make test-all``; each test
prints its counts.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_parts import ALL, X, batches, content, loss_of
from cache_parts import same as same_outputs
from fault_parts import (
    WRITTEN,
    counted,
    ended,
    fill_up,
    forked,
    make_read_only,
    same,
    states_of,
)

from sdkd_plugin import TeacherCache, precompute
from sdkd_plugin.report import append_rows

SEALED = [name for name, kept in WRITTEN.items() if kept.sealed]


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
