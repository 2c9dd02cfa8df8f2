"""Files that are read without running what is in them, and refused if they are damaged."""

import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdkd_plugin._checks import shown

PathLike = str | os.PathLike[str]

UNREADABLE = (
    *(EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError, AttributeError),
    *(OverflowError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)
"""What libraries raise for a file that is cut off, changed or of another format."""


def check_archive(path: PathLike) -> None:
    """Refuse a file of ``torch.save`` that is damaged, or declares more than it holds.

    Raises:
        ValueError: naming the file.
    """
    with _reading(path), open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # torch's older format, without checksums
        with zipfile.ZipFile(file) as content:
            entries = content.infolist()
            size = os.path.getsize(path)
            if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > size:
                raise ValueError("it is compressed, which torch.save never does")
            if damaged := content.testzip():
                raise ValueError(f"{damaged} in it has another checksum")


def load_plain(path: PathLike, map_location: Any = None) -> Any:
    """Tensors and plain values of a file of ``torch.save``; nothing in it is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is damaged, or holds other objects or tensors that
            declare more elements than they have.
    """
    check_archive(path)
    with _reading(path):
        loaded = torch.load(path, map_location=map_location, weights_only=True)
        rest, seen = [loaded], set()
        while rest:
            value = rest.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor) and value.layout == torch.strided:
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise ValueError(f"it has {shown(value)} that is expanded, expected all of it")
            elif isinstance(value, Mapping):
                rest += value.values()
            elif isinstance(value, list | tuple):
                rest += value
    return loaded


@contextmanager
def _reading(path: PathLike) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")
        raise ValueError(
            f"{path} cannot be read as weights and plain values ({reason}): it is damaged, or has "
            "other objects, which are not unpickled. Give another file, or save it again."
        ) from error
