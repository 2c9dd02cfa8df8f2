"""Caches that somebody forged: sizes, types and nesting that a reader must not believe."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from cache_parts import ALL, batches, loss_of

from sdkd_plugin import TeacherCache, precompute
from sdkd_plugin.cache.files import line


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
