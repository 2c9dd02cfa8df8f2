"""What is left of a cache when builders are killed, disks are full and files are changed."""

import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cache import ALL, X, batches, content, loss_of, same

from sdkd_plugin import TeacherCache, precompute
from sdkd_plugin.cache.files import line

# Forks, because importing torch takes longer than a build.
_KILLS = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from test_cache import *
torch.set_num_threads(1)
folder, log, kills = Path({folder!r}), Path({folder!r} + ".log"), {kills}
random.seed(0)

def slow():
    for batch in batches(size=1):
        time.sleep(0.002)
        yield batch

start = time.monotonic()
whole = content(precompute(loss_of(), slow(), folder.with_name("whole")).folder)
longest = 1.2 * (time.monotonic() - start)
done = finished = again = 0
while done < kills or folder.exists():
    child = os.fork()
    if child == 0:
        Teacher.calls = 0
        kind = DistillationLoss.teacher_outputs
        def logged(self, x, **inputs):
            with log.open("ab") as file:
                file.write(b".")
            return kind(self, x, **inputs)
        DistillationLoss.teacher_outputs = logged
        precompute(loss_of(), slow(), folder)
        os._exit(0)
    time.sleep(random.uniform(0, longest))
    alive = os.waitpid(child, os.WNOHANG)[0] == 0
    if alive:
        os.kill(child, signal.SIGKILL)
        done += 1
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) or (folder / "manifest.json").exists()
    try:
        cache = TeacherCache(folder)
    except FileNotFoundError:
        continue
    cache.verify()
    assert len(cache) == len(X)
    precompute(loss_of(), batches(size=1), folder)
    assert content(folder) == whole
    finished, again = finished + 1, again + log.stat().st_size - len(X)
    shutil.rmtree(folder)
    log.unlink()
print(done, finished, again)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_build_ends_as_an_uninterrupted_one(tmp_path: Path, kills: int):
    folder, tests = str(tmp_path / "cache"), str(Path(__file__).parent)
    code = "import shutil" + _KILLS.format(folder=folder, tests=tests, kills=kills)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    killed, finished, again = map(int, run.stdout.split())
    print(f"{killed} kills, {finished} finished builds, {again} chunks computed again")
    assert killed >= kills
    assert finished > 0
    # A kill loses the chunk that is being computed, no finished one.
    assert again <= killed


@pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_found(tmp_path: Path, flips: int):
    loss = loss_of(loss_of().teachers[0], lambda x: x)
    precompute(loss, batches(X[:8]), tmp_path, storage="float16")
    precompute(loss, batches(), tmp_path, storage="float16")
    paths = [path for path in tmp_path.iterdir() if path.stat().st_size]
    assert len(paths) == 5
    generator = np.random.default_rng(0)
    for flip in range(flips):
        path = paths[flip % len(paths)]
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"Delete .* and build the cache again"):
            TeacherCache(tmp_path).outputs(ALL)
        path.write_bytes(whole)
    TeacherCache(tmp_path).verify()
    print(f"{flips} of {flips} flipped bytes found")


def test_a_full_disk_keeps_finished_chunks(tmp_path: Path):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            precompute(loss_of(), batches(), tmp_path)
        except OSError as error:
            named = "cannot be written" in str(error) and str(tmp_path) in str(error)
            status = 0 if named and "finished chunks are kept" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        TeacherCache(tmp_path)
    assert (tmp_path / "part0000.table").read_bytes().count(b"\n") == 3
    cache = precompute(loss_of(), batches(), tmp_path)
    assert same(cache.outputs(ALL, X), precompute(loss_of(), batches()))


def test_a_power_cut_costs_the_chunks_that_it_lost(tmp_path: Path):
    whole = content(precompute(loss_of(), batches(), tmp_path).folder)
    (tmp_path / "manifest.json").unlink()
    raw = tmp_path / "part0000.raw"
    raw.write_bytes(whole[raw.name][:3000] + b"\0" * 1000)
    precompute(loss_of(), batches(), tmp_path)
    assert content(tmp_path) == whole


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


def _forged(folder: Path, **changes: object) -> None:
    """A cache whose checksums fit what was changed."""
    table = folder / "part0000.table"
    (key, columns), *records = (
        json.loads(each)["value"] for each in table.read_bytes().splitlines()
    )
    key = {**key, **changes.pop("key", {})}
    columns = changes.pop("columns", columns)
    records = [{**record, **changes} for record in records]
    content = b"".join(line(each) for each in ([key, columns], *records))
    table.write_bytes(content)
    import hashlib

    listed = [{"number": 0, "sha256": hashlib.sha256(content).hexdigest()}]
    (folder / "manifest.json").write_bytes(line(listed))


@pytest.mark.parametrize(
    "changes",
    [
        {"columns": [["0.forecast", [10**9, 10**9], "float32"]]},
        {"columns": [["0.forecast", [1 << 70], "float32"]]},
        {"columns": [["0.forecast", [-8, -8], "float32"]]},
        {"columns": [["0.forecast", [1, 8, 8], "load"]]},
        {"columns": [["1.forecast", [1, 8, 8], "float32"]]},
        {"columns": []},
        {"columns": 3},
        {"key": {"storage": "load"}},
        {"key": {"teachers": None}},
        {"key": {"views": 10**9}},
        {"key": {"views": "many"}},
        {"key": {"format": "0 little"}},
        {"rows": 1 << 62},
        {"rows": -4},
        {"rows": "four"},
        {"index": ""},
        {"index": "AAAA"},
        {"sums": None},
        {"errors": {}},
    ],
)
def test_hostile_sizes_and_types_are_refused(tmp_path: Path, changes: dict):
    precompute(loss_of(), batches(), tmp_path)
    _forged(tmp_path, **changes)
    with pytest.raises(ValueError, match=str(tmp_path)):
        TeacherCache(tmp_path).outputs(ALL)


@pytest.mark.parametrize(
    "value", [[], {}, 3, [{}], [{"number": "../x", "sha256": ""}], [[]], ["x"]]
)
def test_hostile_manifests_are_refused(tmp_path: Path, value: object):
    precompute(loss_of(), batches(), tmp_path)
    (tmp_path / "manifest.json").write_bytes(line(value))
    with pytest.raises(ValueError, match=r"Delete .* and build the cache again"):
        TeacherCache(tmp_path)


def test_ten_thousand_nested_lists_are_no_manifest(tmp_path: Path):
    precompute(loss_of(), batches(), tmp_path)
    text = b"[" * 10_000 + b"]" * 10_000
    forged = b'{"crc": %d, "value": %s}\n' % (zlib.crc32(text), text)
    (tmp_path / "manifest.json").write_bytes(forged)
    with pytest.raises(ValueError, match=r"manifest\.json is not as it was written"):
        TeacherCache(tmp_path)
    shutil.rmtree(tmp_path)
    assert torch.equal(precompute(loss_of(), batches(), tmp_path).numbers, ALL)
