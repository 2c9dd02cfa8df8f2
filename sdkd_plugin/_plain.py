"""Files that are read without running what is in them, and refused if they are damaged."""

import math
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from sdkd_plugin._checks import shown
from sdkd_plugin._files import PathLike

UNREADABLE = (
    *(EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError, AttributeError),
    *(OverflowError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    *(SafetensorError, yaml.YAMLError),
)
"""What libraries raise for a file that is cut off, changed or of another format."""

_WEIGHTS = "weights and plain values"
_FOREIGN = "Other objects are not unpickled: give another file, or save it again"
_MOST_BYTES, _DEPTH = 4 << 20, 32  # of a YAML file


# PyYAML may lack libyaml's loader, so its base is known when it runs only.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, of our own so that its resolvers can be changed."""


class _Dumper(yaml.SafeDumper):
    """Likewise."""


for _each in (_Loader, _Dumper):
    # Without it 1e-3 is a string: YAML 1.1 wants 1.0e-3.
    _exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+0123456789"))


@contextmanager
def reading(
    source: PathLike, what: str, remedy: str = "Fetch it again if it is damaged"
) -> Iterator[None]:
    """Turn what a library raises for a damaged file into a ValueError that names the file."""
    try:
        yield
    except UNREADABLE as error:
        is_missing = isinstance(error, FileNotFoundError) and str(error.filename) == str(source)
        if is_missing or str(error).startswith(str(source)):
            raise
        said = str(error)
        if isinstance(error, pickle.UnpicklingError):  # torch adds how to unpickle all the same
            said = said.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        reason = " ".join(said.split())[:200].rstrip(".") or type(error).__name__
        raise ValueError(f"{source} cannot be read as {what}: {reason}. {remedy}.") from error


def check_archive(path: PathLike) -> None:
    """Refuse a file of ``torch.save`` that is damaged, or declares more than it holds.

    Raises:
        ValueError: naming the file.
    """
    with reading(path, _WEIGHTS, _FOREIGN), open(path, "rb") as file:
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
    with reading(path, _WEIGHTS, _FOREIGN):
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


def plain_text(values: Mapping[str, Any]) -> str:
    """The YAML of plain values, which `read_yaml` reads as they are."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def read_yaml(path: PathLike) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is over 4 MiB or damaged, has a tag, an anchor or an alias, is nested too
            deeply, or holds anything but a mapping of finite numbers, strings, booleans, nulls,
            lists and mappings by string.
    """
    with reading(path, "YAML", "Correct or replace it"), Path(path).open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has over {_MOST_BYTES} bytes")
        _check_events(content)
        values = yaml.load(content, _Loader)  # noqa: S506 - a SafeLoader
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, expected names and values")
        return {str(key): check_plain(value, str(key)) for key, value in values.items()}


def check_plain(value: Any, place: str) -> Any:
    """A copy of numbers, strings, lists and mappings, tuples as lists; others are a ValueError."""
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{place} has the key {shown(wrong[0])}, expected strings")
        return {key: check_plain(each, f"{place}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [check_plain(each, f"{place}[{i}]") for i, each in enumerate(value)]
    kinds = (bool, int, float, str, type(None))
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{place} is {shown(value)}, expected finite numbers, strings or null")
    return value


def _check_events(content: bytes) -> None:
    depth = 0
    for event in yaml.parse(content, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError("it has an anchor or alias")
        if tag := getattr(event, "tag", None):
            raise ValueError(f"it has the tag {tag}")
        if depth > _DEPTH:
            raise ValueError(f"it is nested more than {_DEPTH} deep")
