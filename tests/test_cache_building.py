"""Building a cache: continued, appended to, by several processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_parts import ALL, Teacher, X, batches, content, loss_of, same

from sdkd_plugin import (
    TeacherCache,
    precompute,
)
from sdkd_plugin._files import locked
from sdkd_plugin.cache import building


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
from cache_parts import *
from sdkd_plugin import precompute
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


def test_a_stopped_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(building, "PATIENCE_AT_WORK", 1.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        locked(tmp_path / ".process1.lock"),
        pytest.raises(RuntimeError, match=r"processes \[1\] of 2 did not .* that are stopped"),
    ):
        precompute(loss_of(), batches(), tmp_path)
