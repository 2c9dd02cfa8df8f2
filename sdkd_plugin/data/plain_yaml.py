"""YAML of plain values: no tags, no aliases, no dates, bounded in size and depth."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sdkd_plugin._checks import shown

_DEPTH = 32


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _each in (_Loader, _Dumper):
    # Without it 1e-3 is a string: YAML 1.1 wants 1.0e-3.
    _exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+0123456789"))


def plain_text(values: Mapping[str, Any]) -> str:
    """The YAML of plain values, which `read_yaml` reads as they are."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def read_yaml(path: str | os.PathLike[str], *, most_bytes: int = 4 << 20) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: of the file.
        most_bytes: a larger file is refused unread.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too large or damaged, has a tag, an anchor or an alias, is nested too
            deeply, or holds anything but a mapping of finite numbers, strings, booleans, nulls,
            lists and mappings by string.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a YAML file.")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} has more than {most_bytes} bytes, expected a small YAML file.")
    try:
        _check_events(content)
        values = yaml.load(content, _Loader)  # noqa: S506 - a SafeLoader
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        return {str(key): check_plain(value, str(key)) for key, value in values.items()}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is no mapping of plain values in YAML: {text}.") from error


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
