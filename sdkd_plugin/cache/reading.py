"""Reading a cache: mapped memory, rows by sample number, chunks verified when first read."""

import base64
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_shape
from sdkd_plugin._explained import explained
from sdkd_plugin.cache import files
from sdkd_plugin.cache.chunks import decoded, same_inputs
from sdkd_plugin.cache.files import Part
from sdkd_plugin.cache.key import FORMAT, differences
from sdkd_plugin.teachers import InputNames, StoredOutputs, TeacherOutput


@explained
class TeacherCache(StoredOutputs):
    """Outputs of teachers on disk by sample number, in place of a teacher; see `precompute`.

    The files are mapped: a cache may be larger than memory, and processes share what is read. A
    chunk's checksum is compared when one of its samples is first read, once for a process and the
    workers that it forks; spawned workers open the cache anew.

    Attributes:
        key: what the cache was made from, as `cache_key` returns it.
        numbers: of the samples, in the order of the files.
        round_trip: relative L2 error of storing, by ``TEACHER.forecast`` or ``TEACHER.latent.TAP``.

    Args:
        folder: that `precompute` filled.
        key: entries of `cache_key` that must be equal, such as ``{"preprocessing": {...}}``.

    Raises:
        FileNotFoundError: if there is no finished cache, or a file of it is missing.
        ValueError: if a file is damaged, or the key differs; the message names in what.
    """

    def __init__(
        self, folder: str | os.PathLike[str], key: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder).expanduser()
        manifest = files.read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(
                f"{self.folder} holds no finished cache: call `precompute` with this folder, which "
                "continues a build that was ended."
            )
        try:
            self._open(manifest, key or {})
        except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise files.damaged(self.folder, f"is no cache ({str(error)[:200]})") from None

    def _open(self, manifest: list[Any], key: Mapping[str, Any]) -> None:
        self._parts = [_OpenPart(self.folder, part) for part in manifest]
        self.key: dict[str, Any] = self._parts[0].key
        wanted = {"format": FORMAT, **key}
        if found := differences({name: self.key.get(name) for name in wanted}, wanted):
            raise ValueError(f"the cache in {self.folder} differs: {'; '.join(found)}.")
        teachers = self.key["teachers"]
        super().__init__(
            [each["class"].rpartition(".")[2] for each in teachers],
            [each["taps"] for each in teachers],
            InputNames(
                frozenset(name for each in teachers for name in each["inputs"]),
                any(each["any_input"] for each in teachers),
            ),
            self.key["views"],
        )
        self._dtypes = {name: files.DTYPES[dtype] for name, _, dtype in self._parts[0].columns}
        self._names = [name for name in self._dtypes if name != "x"]
        self._starts = np.cumsum([0, *(int(part.starts[-1]) for part in self._parts)])
        numbers = self._small("index", np.int64)
        self.numbers = torch.from_numpy(numbers)
        self._sums = self._small("sums", np.float64).reshape(-1, 2)
        scales = self._small("scales", np.float32).reshape(-1, len(self._dtypes))
        self._scales = dict(zip(self._dtypes, scales.T, strict=True)) if len(scales) else {}
        stored = {self._parts[0].dtype, *self._dtypes.values()}
        self._exact = not self._scales and len(stored) == 1
        if not len(self) * (self.views + 1) == self._starts[-1] == len(self._sums):
            raise files.damaged(self.folder, "has tables of other lengths than its files")
        self._order = None
        if not np.array_equal(numbers, np.arange(len(self))):
            order = np.argsort(numbers)
            self._order = numbers[order], order
        errors = [record["errors"] for part in self._parts for record in part.records]
        self.round_trip = {
            name: (sum(e[name][0] for e in errors) / (sum(e[name][1] for e in errors) or 1)) ** 0.5
            for name in self._dtypes
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache, (self.folder,)

    def __len__(self) -> int:
        return len(self.numbers)

    def __str__(self) -> str:
        size = sum(part.raw.stat().st_size for part in self._parts) / 1e6
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.round_trip.items())
        return (
            f"{self.folder}: {len(self)} samples with {self.views} augmented views, {size:.1f} MB "
            f"as {self.key['storage']}; relative error of storing: {errors}"
        )

    @explained
    def outputs(
        self, index: Int[Tensor, " batch *view"], x: Float[Tensor, "batch ..."] | None = None
    ) -> tuple[TeacherOutput, ...]:
        """See `StoredOutputs`.

        Raises:
            ValueError: if a sample is not in the cache, a chunk is damaged, or ``x`` differs.
        """
        # Where numbers are rows, reading refuses those that are not there: a check would cost more.
        direct = index.ndim == 1 and self._order is None and not self.views
        rows = index.cpu() if direct else self._rows(index)
        try:
            read = self._read(self._names, rows)
            if x is not None:
                self._check_inputs(index, rows, x)
        except IndexError:
            self._rows(index)
            raise
        if x is not None:
            read = {name: values.to(x.device) for name, values in read.items()}
        return tuple(
            TeacherOutput(read[f"{i}.forecast"], {tap: read[f"{i}.latent.{tap}"] for tap in taps})
            for i, taps in enumerate(self.taps)
        )

    def _check_inputs(self, index: Tensor, rows: Tensor, x: Tensor) -> None:
        check_shape("index", rows.shape, x.shape[:1], "one number for each sample of x")
        same = same_inputs(x, self._sums[rows.numpy()])
        if not same.all():
            raise ValueError(
                f"the inputs of sample {index.cpu().numpy()[~same][0].tolist()} are not those of "
                f"the cache in {self.folder}: the data, their scaling or numbers changed, or the "
                "inputs are augmented or forecasts. Build the cache with `views`, or give live "
                "teachers."
            )

    def draw_views(
        self, index: Int[Tensor, " batch"], x: Float[Tensor, "batch ..."]
    ) -> tuple[Int[Tensor, "batch 2"], Float[Tensor, "batch ..."]]:
        """See `StoredOutputs`."""
        views = torch.randint(self.views + 1, index.shape)
        index = torch.stack([index.cpu(), views], 1)
        augmented = self._read(["x"], self._rows(index))["x"].to(x)
        plain = (views == 0).reshape(-1, *[1] * (x.ndim - 1))
        return index, torch.where(plain.to(x.device), x, augmented)

    def verify(self) -> None:
        """Compare all checksums now.

        Raises:
            ValueError: naming the file that is damaged.
        """
        for part in self._parts:
            part.verify(np.arange(len(part.records)))

    def _small(self, name: str, dtype: type) -> np.ndarray:
        """Numbers that the tables hold themselves, of all chunks."""
        records = [record for part in self._parts for record in part.records]
        content = b"".join(base64.b64decode(record[name]) for record in records)
        size = np.dtype(dtype).itemsize
        return np.frombuffer(bytearray(content[: len(content) // size * size]), dtype)

    def _rows(self, index: Tensor) -> Tensor:
        """Places of samples and views in the files."""
        given = index.cpu().numpy()
        if given.ndim not in (1, 2) or given.shape[1:] not in ((), (2,)):
            raise ValueError(f"`index` has shape {given.shape}, expected (batch,) or (batch, 2).")
        numbers, views = given.T if given.ndim == 2 else (given, 0)
        places = numbers
        if self._order is not None:
            found = np.searchsorted(self._order[0], numbers).clip(max=len(self) - 1)
            places = np.where(self._order[0][found] == numbers, self._order[1][found], -1)
        known = (places >= 0) & (places < len(self))
        if given.ndim == 2:
            known &= (views >= 0) & (views <= self.views)
        if not known.all():
            raise ValueError(
                f"`index` has {given[~known][0].tolist()}, but the cache in {self.folder} has "
                f"{len(self)} samples with {self.views} augmented views: give the numbers that it "
                "was built with, or append the samples."
            )
        return torch.from_numpy(places * (self.views + 1) + views)

    def _read(self, names: list[str], rows: Tensor) -> dict[str, Tensor]:
        if len(self._parts) == 1:
            read = self._parts[0].read(names, rows)
        else:
            part_of = np.searchsorted(self._starts, rows.numpy(), "right") - 1
            first = self._parts[0].columns_of
            read = {n: first[n].new_empty(len(rows), *first[n].shape[1:]) for n in names}
            for number in np.unique(part_of).tolist():
                mine = torch.from_numpy(part_of == number)
                local = rows[mine] - int(self._starts[number])
                for name, values in self._parts[number].read(names, local).items():
                    read[name][mine] = values
        return read if self._exact else {n: self._decoded(n, read[n], rows) for n in names}

    def _decoded(self, name: str, stored: Tensor, rows: Tensor) -> Tensor:
        scale = torch.from_numpy(self._scales[name][rows.numpy()]) if self._scales else None
        return decoded(stored, scale).to(self._dtypes[name])


class _OpenPart(Part):
    """A part whose numbers are mapped, and which of its chunks are verified."""

    def __init__(self, folder: Path, declared: Mapping[str, Any]) -> None:
        super().__init__(folder, declared["number"])
        if self.sha256 != declared["sha256"]:
            raise files.damaged(self.table, "is not as it was written")
        self.columns_of = self.map()
        # In memory that forked workers share.
        self.verified = np.frombuffer(mmap.mmap(-1, len(self.records)), np.bool_)
        self.whole = False

    def read(self, names: list[str], rows: Tensor) -> dict[str, Tensor]:
        if not self.whole:
            if (rows < 0).any():
                raise IndexError
            self.verify(np.searchsorted(self.starts, rows.numpy(), "right") - 1)
        return {name: self.columns_of[name].index_select(0, rows) for name in names}

    def verify(self, chunks: np.ndarray) -> None:
        for chunk in np.unique(chunks[~self.verified[chunks]]).tolist():
            if self.checksum(chunk) != self.records[chunk]["crc"]:
                raise files.damaged(self.raw, f"is damaged in chunk {chunk}")
            self.verified[chunk] = True
        self.whole = bool(self.verified.all())
