"""Refuses HDF5 files that could run code: pandas and pytables unpickle whatever they find."""

import pickletools
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

_LOOK_UP = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
# What pandas itself pickles: the step between the times of an index.
_HARMLESS = re.compile(
    r"pandas\.(_libs\.tslibs|tseries)\.offsets [A-Z]\w*"
    r"|copy_?reg _reconstructor|(builtins|__builtin__) object"
)


def refuse_pickles(path: Path) -> None:
    """Refuse, by a ValueError, a damaged file or one with Python objects, naming where they are."""
    try:
        with h5py.File(path) as file:
            found: str | None = _unsafe("/", file) or file.visititems(_unsafe)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5 ({error}).") from error
    if found:
        raise ValueError(
            f"{path} has Python objects in {found}, expected numbers and strings: reading it could "
            "run code. If you trust the file, convert them and write it again."
        )


def _unsafe(name: str, item: Any) -> str | None:
    # Arrays of objects have entries of any length in the file.
    if isinstance(item, h5py.Dataset) and item.dtype.hasobject:
        return name
    for key, value in item.attrs.items():
        if any(map(_looks_up_names, np.ravel(value))):
            return f"{name}, attribute {key}"
    return None


def _looks_up_names(value: object) -> bool:
    """Whether pytables unpickles an attribute, and that looks up functions or classes."""
    text = value.encode(errors="surrogateescape") if isinstance(value, str) else value
    if not isinstance(text, bytes) or not text.endswith(b"."):
        return False
    try:
        used = [(each.name, str(arg)) for each, arg, _ in pickletools.genops(text)]
    except Exception:
        return True
    return any(name in _LOOK_UP and not _HARMLESS.fullmatch(arg) for name, arg in used)
