"""The files of a cache: raw numbers, tables of their chunks, and the manifest that shows them.

A part is what one process wrote: ``part0000.raw`` has a row of numbers for each view of a sample,
``part0000.table`` a line of JSON for each chunk of samples. ``manifest.json`` is written last and
as a whole; without it there is no cache. Nothing in these files is executed.
"""

import hashlib
import json
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdkd_plugin._files import atomic_path

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


class Part:
    """The table of a part, up to its last line that is complete.

    Attributes:
        key: what it was made from; None if not even the first line is complete.
        columns: of a row: names, shapes, and dtypes that a reader gets.
        records: of the chunks: number, rows, checksum, hash of the inputs, and small numbers.
        ends: bytes of the table up to the first line, and to each record.
        starts: rows up to each chunk.
        sha256: of the whole table.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.table, self.raw = (folder / f"part{number:04d}.{kind}" for kind in ("table", "raw"))
        content = self.table.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        values: list[Any] = []
        self.ends: list[int] = []
        for text in content.splitlines(keepends=True):
            if (value := parsed(text)) is None:
                break  # a killed process was writing it, or it is damaged: the manifest knows
            values.append(value)
            self.ends.append((self.ends or [0])[-1] + len(text))
        self.key, self.columns = values[0] if values else (None, [])
        self.records: list[dict[str, Any]] = values[1:]
        self.starts = np.cumsum([0, *(record["rows"] for record in self.records)])
        if any(size < 0 for _, shape, _ in self.columns for size in shape):
            raise damaged(self.table, "has negative sizes")
        sizes = [math.prod(shape) for _, shape, _ in self.columns]
        self.places = np.cumsum([0, *sizes])
        self.dtype = DTYPES[self.key["storage"] if values else "float32"]
        self.row_bytes = int(self.places[-1]) * self.dtype.itemsize

    def checksum(self, chunk: int) -> int:
        """CRC-32 of a chunk's numbers, as far as the file has them."""
        start, end = (int(row) * self.row_bytes for row in self.starts[chunk : chunk + 2])
        with self.raw.open("rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(end - start))

    def map(self) -> dict[str, Tensor]:
        """The rows of each column, in mapped memory that must not be written to.

        Raises:
            FileNotFoundError, ValueError: if the file is missing or has another size.
        """
        expected = int(self.starts[-1]) * self.row_bytes
        if not self.raw.is_file():
            raise FileNotFoundError(f"{self.raw} is missing. {remedy(self.raw.parent)}")
        if self.raw.stat().st_size != expected or not expected:
            raise damaged(self.raw, f"has {self.raw.stat().st_size} bytes, expected {expected}")
        kind = {2: np.int16, 4: np.float32}[self.dtype.itemsize]
        mapped = np.memmap(self.raw, kind, "r").view(np.ndarray)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            rows = torch.from_numpy(mapped).view(self.dtype).reshape(int(self.starts[-1]), -1)
        parts = rows.split(np.diff(self.places).tolist(), 1)
        pairs = zip(self.columns, parts, strict=True)
        return {name: part.view(len(part), *shape) for (name, shape, _), part in pairs}


def line(value: Any) -> bytes:
    """A value and its checksum as a line of JSON."""
    text = json.dumps(value, sort_keys=True)
    return b'{"crc": %d, "value": %s}\n' % (zlib.crc32(text.encode()), text.encode())


def parsed(text: bytes) -> Any:
    """The value of a line, or None if it is not as it was written."""
    try:
        value = json.loads(text)["value"]
        return value if line(value) == text else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def part_numbers(folder: Path) -> list[int]:
    """Numbers of the parts that exist, finished or not."""
    return sorted(int(path.stem[4:]) for path in folder.glob("part[0-9][0-9][0-9][0-9].table"))


def read_manifest(folder: Path) -> list[Any] | None:
    """The finished parts, or None where there is no manifest; ValueError if it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        parts = parsed(file.read(1 << 24))  # more is no manifest
    if not isinstance(parts, list):
        raise damaged(path, "is not as it was written")
    return parts


def write_manifest(folder: Path, parts: list[dict[str, Any]]) -> None:
    """Make the cache visible, or replace its manifest; readers see the old one or the new one."""
    with atomic_path(folder / "manifest.json") as temporary:
        temporary.write_bytes(line(parts))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Give errors of the file system the path and the remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the cache cannot be written ({error.strerror}): free space or give a folder that you "
            "may write to, then start again; finished chunks are kept",
            str(error.filename or folder),
        ) from error


def damaged(path: Path, what: str) -> ValueError:
    """An error that names a damaged file of a cache, or its folder."""
    return ValueError(f"{path} {what}. {remedy(path if path.is_dir() else path.parent)}")


def remedy(folder: Path) -> str:
    """What to do with a cache that cannot be used."""
    return f"Delete {folder} and build the cache again."
