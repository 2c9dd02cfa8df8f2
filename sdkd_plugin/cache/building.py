"""Running teachers ahead: into memory, or chunk by chunk into a cache, continued after any end."""

import os
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from sdkd_plugin._checks import MOST_SEED, check_choice, check_positive_int, check_shape
from sdkd_plugin._explained import explained
from sdkd_plugin._files import locked
from sdkd_plugin.augmentation import Augmentation, AugmentationName, make_augmentation
from sdkd_plugin.cache import files
from sdkd_plugin.cache.chunks import chunk_of, run
from sdkd_plugin.cache.files import Part
from sdkd_plugin.cache.key import cache_key, differences, fingerprint
from sdkd_plugin.cache.reading import TeacherCache
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.teachers import TeacherOutput

Storage = Literal["float32", "bfloat16", "float16"]
Batches = Iterable[Mapping[str, Any]]
Folder = str | os.PathLike[str]

PATIENCE = 300.0
"""Seconds to wait for parts of the cache on which no process works."""

PATIENCE_AT_WORK = 1800.0
"""Seconds to wait for a process that works on its part and finishes no batch: it may be stopped."""


@overload
def precompute(loss: DistillationLoss, batches: Batches) -> tuple[TeacherOutput, ...]: ...
@overload
def precompute(
    loss: DistillationLoss, batches: Batches, cache: Folder, **options: Any
) -> TeacherCache: ...
@explained
def precompute(
    loss: DistillationLoss, batches: Batches, cache: Folder | None = None, **options: Any
) -> tuple[TeacherOutput, ...] | TeacherCache:
    """The teachers' outputs for a whole data set, so that no training step runs a teacher.

    With a folder, each batch is a chunk on disk; some megabytes are best. Every call reads and
    hashes all batches and runs the teachers where a chunk is missing. So one call builds, continues
    after a kill, compares a finished cache with the data, and appends: give the old batches and
    then the new ones. Another builder of the folder waits. Under ``torchrun`` each of N processes
    is given the same batches, computes every N-th and returns the whole cache.

    Args:
        loss: with the teachers, on their device.
        batches: inputs ``{"x": ..., **inputs}`` of the teachers, in a fixed order. In a cache,
            ``index`` among them numbers the samples, by default 0, 1, 2, ...
        cache: its own folder, or None for memory.
        **options: of a cache. ``storage``: ``float32`` (default), ``bfloat16``, or ``float16`` with
            a scale a sample; the error is in `TeacherCache.round_trip`. ``preprocessing``: a dict
            of what made the inputs, to be compared. ``augmentation``, as of `SDKDDistiller`, which
            must draw from torch's generator; ``views``: augmented ones of each sample beside the
            inputs as they are; ``seed`` of these. ``progress``: show a bar, and print the error.

    Returns:
        the cache; or one output a teacher on the CPU, its rows in the order of the batches. Pass
        ``[output.select(rows) for output in outputs]`` to a step as ``outputs``.

    Raises:
        ValueError: if there is no batch, an option is wrong, the folder holds a cache of other
            teachers, options or data, a number comes twice, or an output is NaN or Inf.
        OSError: if the folder cannot be written; finished chunks are kept.
        RuntimeError: if another process ended before its part was finished.

    Example:
        >>> import tempfile
        >>> from sdkd_plugin import GridTransform
        >>> loss = DistillationLoss(torch.nn.Conv2d(1, 1, 1), GridTransform((8, 8)))
        >>> batches = [{"x": part} for part in torch.randn(6, 1, 8, 8).split(4)]
        >>> (output,) = precompute(loss, batches)
        >>> cache = precompute(loss, batches, tempfile.mkdtemp())
        >>> rows = torch.tensor([5, 0])
        >>> bool((cache.outputs(rows)[0].forecast == output.select(rows).forecast).all())
        True
    """
    if not loss.teachers:
        raise ValueError("`loss` has no live teacher, expected one whose outputs are not known.")
    if cache is None:
        return _in_memory(loss, batches, **options)
    return _on_disk(loss, batches, cache, **options)


@explained
def _on_disk(
    loss: DistillationLoss,
    batches: Batches,
    cache: Folder,
    *,
    storage: Storage = "float32",
    preprocessing: Mapping[str, Any] | None = None,
    augmentation: AugmentationName | Augmentation | None = None,
    views: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> TeacherCache:
    check_choice("storage", storage, get_args(Storage))
    check_positive_int("views", views, minimum=0)
    check_positive_int("seed", seed, 0, MOST_SEED)
    if (augmentation is None) != (views == 0):
        raise ValueError(
            f"`views` is {views} and `augmentation` is {augmentation!r}, expected both or neither."
        )
    augmented = None if augmentation is None else make_augmentation(augmentation)
    if getattr(augmented, "generator", None) is not None:
        raise ValueError("`augmentation` has a `generator`, expected none: give `seed` instead.")
    options: dict[str, Any] = {"storage": storage, "views": views, "seed": seed}
    key = cache_key(loss, preprocessing=preprocessing, augmentation=augmentation, **options)
    folder, (rank, ranks) = Path(cache).expanduser(), _rank()
    lock = folder / f".process{rank}.lock"
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with locked(lock):
        writer = _Writer(folder, key, rank, ranks)
        seen: set[int] = set()
        start = n_chunks = 0
        for batch in tqdm(batches, "teachers", disable=not progress or rank > 0, unit="batch"):
            inputs = dict(batch)
            end = start + len(inputs["x"])
            numbers = inputs.pop("index", None)
            if numbers is None:
                numbers = torch.arange(start, end)
            else:
                numbers = _checked(numbers.cpu(), end - start, seen)
            if n_chunks % ranks == rank:
                hashed = fingerprint({**inputs, "index": numbers})
                if not writer.has(n_chunks, hashed):
                    chunk = chunk_of(loss, inputs, numbers, augmented, **options)
                    writer.append(n_chunks, {"inputs": hashed, **chunk[0]}, *chunk[1:])
            os.utime(lock)  # a sign of life for processes that wait
            start, n_chunks = end, n_chunks + 1
        if not n_chunks:
            raise ValueError("`batches` is empty, expected at least one batch.")
        missing = _publish(folder, n_chunks)
    since = time.time()
    while missing:
        late = sorted({chunk % ranks for chunk in missing})
        locks = [folder / f".process{other}.lock" for other in late]
        sign = max(since, *(each.stat().st_mtime for each in locks if each.exists()), 0)
        patience = PATIENCE_AT_WORK if any(map(_taken, locks)) else PATIENCE
        if time.time() - sign > patience:
            raise RuntimeError(
                f"the processes {late} of {ranks} did not finish their parts of the cache in "
                f"{folder}, nor a batch for {patience:g} s: call this function on all of them, and "
                "end those that are stopped; finished chunks are kept."
            )
        time.sleep(0.1)
        missing = _publish(folder, n_chunks)
    made = TeacherCache(folder)
    if progress and rank == 0:
        tqdm.write(str(made))
    return made


def _in_memory(loss: DistillationLoss, batches: Batches) -> tuple[TeacherOutput, ...]:
    parts = [run(loss, {n: v for n, v in batch.items() if n != "index"}) for batch in batches]
    if not parts:
        raise ValueError("`batches` is empty, expected at least one batch.")
    return tuple(
        TeacherOutput(
            torch.cat([part.forecast for part in of_teacher]),
            {tap: torch.cat([p.latents[tap] for p in of_teacher]) for tap in of_teacher[0].latents},
        )
        for of_teacher in zip(*parts, strict=True)
    )


def _rank() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _taken(lock: Path) -> bool:
    with locked(lock, wait=False) as free:
        return not free


def _checked(numbers: Tensor, length: int, seen: set[int]) -> Tensor:
    check_shape("index", numbers.shape, (length,), "one number a sample")
    new = set(numbers.tolist())
    if numbers.dtype != torch.int64 or min(new) < 0 or len(new) < length or new & seen:
        raise ValueError("`index` has negative, repeated or non-integer numbers: number each once.")
    seen |= new
    return numbers


class _Writer:
    """Appends chunks to this process's part, after a repair of what killed ones left."""

    def __init__(self, folder: Path, key: dict[str, Any], rank: int, ranks: int) -> None:
        first = 1 + max((part["number"] for part in files.read_manifest(folder) or ()), default=-1)
        self.folder, self.key = folder, key
        self.table = folder / f"part{first + rank:04d}.table"
        self.columns: list[Any] = []
        self.hashes: dict[int, str] = {}
        for number in files.part_numbers(folder):
            part = Part(folder, number)
            # Parts of a former build with more processes have an owner too.
            if number >= first and (number - first) % ranks == rank:
                with files.writing(folder):
                    part = _repaired(part, folder)
            if part.key is not None and (found := differences(part.key, key)):
                raise ValueError(
                    f"the cache in {folder} was made from something else: {'; '.join(found)}. Give "
                    "another folder, or delete this one."
                )
            self.columns = self.columns or part.columns
            self.hashes |= {record["chunk"]: record["inputs"] for record in part.records}

    def has(self, chunk: int, hashed: str) -> bool:
        """Whether a chunk is finished; ValueError if it was made from other inputs."""
        if self.hashes.get(chunk, hashed) != hashed:
            raise ValueError(
                f"`batches` has other inputs in batch {chunk} than the cache in {self.folder}: the "
                "data, their preprocessing, numbers, order or batch size differ. Give another "
                "folder, or delete this one."
            )
        return chunk in self.hashes

    def append(self, chunk: int, record: dict[str, Any], columns: list[Any], rows: Tensor) -> None:
        """Write the numbers, then the line that makes them count."""
        if columns != (self.columns or columns):
            raise ValueError(f"batch {chunk} gives {columns}, expected {self.columns} as before.")
        content = rows.view(torch.uint8).numpy().data.cast("B")
        with (
            files.writing(self.folder),
            self.table.with_suffix(".raw").open("ab", buffering=0) as raw,
            self.table.open("ab", buffering=0) as table,
        ):
            if not table.tell():
                _write(table, files.line([self.key, columns]))
            _write(raw, content)
            known = {"chunk": chunk, "rows": len(rows), "crc": zlib.crc32(content)}
            _write(table, files.line({**known, **record}))
        self.columns, self.hashes[chunk] = columns, record["inputs"]


def _write(file: Any, content: bytes | memoryview) -> None:
    """All of it: an unbuffered file may take less at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _repaired(part: Part, folder: Path) -> Part:
    """The part up to its last right chunk: a power cut may lose numbers, a kill their end."""
    part.raw.touch()
    right = (part.checksum(i) == record["crc"] for i, record in enumerate(part.records))
    kept = next((i for i, each in enumerate(right) if not each), len(part.records))
    os.truncate(part.raw, int(part.starts[kept]) * part.row_bytes)
    os.truncate(part.table, part.ends[kept] if part.ends else 0)
    return Part(folder, part.number)


def _publish(folder: Path, n_chunks: int) -> set[int]:
    """Write the manifest if all chunks are there; returns those that are missing."""
    with locked(folder / ".manifest.lock"):
        parts = [part for n in files.part_numbers(folder) if (part := Part(folder, n)).records]
        chunks = {record["chunk"] for part in parts for record in part.records}
        if beyond := chunks - set(range(n_chunks)):
            raise ValueError(
                f"`batches` has {n_chunks} batches and the cache in {folder} {max(beyond) + 1}: "
                "give all of them, or another folder."
            )
        if missing := set(range(n_chunks)) - chunks:
            return missing
        listed = [{"number": part.number, "sha256": part.sha256} for part in parts]
        if files.read_manifest(folder) != listed:
            with files.writing(folder):
                for path in (each for part in parts for each in (part.raw, part.table)):
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
                files.write_manifest(folder, listed)
    return set()
