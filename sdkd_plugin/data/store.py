"""Arrays on disk as safetensors, each under a key of all the parameters it was computed from."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdkd_plugin._checks import check_type, shown
from sdkd_plugin._explained import explained
from sdkd_plugin._files import PathLike, atomic_path, check_writable

FORMAT_VERSION = 1
"""Part of every key: raise it when the files' layout changes, and old files are left alone."""

_ARRAY = "array"


def default_folder() -> Path:
    """``$SDKD_CACHE``, else ``sdkd_plugin`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("SDKD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdkd_plugin"


def parameters_key(parameters: Mapping[str, object]) -> str:
    """SHA-256 of a set of parameters as JSON, and of the format version; 1 and 1.0 differ.

    Raises:
        ValueError: for values that JSON does not hold exactly.
    """
    versioned = {"format": FORMAT_VERSION, "parameters": dict(parameters)}
    return hashlib.sha256(_canonical_json(versioned).encode()).hexdigest()


def _save(path: Path, array: Tensor, parameters: Mapping[str, object]) -> None:
    stored = array.contiguous()
    metadata = {
        "parameters": _canonical_json(dict(parameters)),
        "dtype": str(stored.dtype),
        "sha256": _checksum(stored),
    }
    with atomic_path(path) as temporary:
        save_file({_ARRAY: stored}, temporary, metadata=metadata)


def _load(path: Path, parameters: Mapping[str, object]) -> Tensor:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            array: Tensor = opened.get_tensor(_ARRAY)
    except SafetensorError as error:
        raise _unusable(path, f"is truncated or damaged ({error})", "safetensors") from error
    found, expected = metadata.get("parameters"), _canonical_json(dict(parameters))
    if found != expected:
        raise _unusable(path, f"was computed from the parameters {str(found)[:500]}", expected)
    # The checksum is of the bytes alone. Files of earlier versions do not have their type.
    if str(array.dtype) != (kind := metadata.get("dtype", "torch.float32")):
        raise _unusable(path, f"holds {array.dtype}", shown(kind))
    if (checksum := _checksum(array)) != (recorded := metadata.get("sha256")):
        raise _unusable(path, f"has SHA-256 {checksum}", f"the recorded {shown(recorded)}")
    return array


@explained
def load_or_compute(
    stem: str,
    compute: Callable[[], Tensor],
    *,
    parameters: Mapping[str, object],
    folder: PathLike | None = None,
) -> Tensor:
    """The cached array of these parameters; computed and stored first where there is none.

    The file is ``<stem>-<first 16 digits of the key>.safetensors``. Where it cannot be written,
    there is a warning, and the array is returned all the same. ``folder`` None is
    :func:`default_folder`.

    Raises:
        ValueError: if the file there is damaged or was computed from other parameters.
    """
    check_type("stem", stem, str, "the beginning of the file's name")
    where = default_folder() if folder is None else Path(folder).expanduser()
    path = where / f"{stem}-{parameters_key(parameters)[:16]}.safetensors"
    if path.exists():
        return _load(path, parameters)
    try:
        check_writable(path)  # before hours of computing
    except OSError as error:
        _warn_unkept(error)
        return compute().detach().cpu()
    array = compute().detach().cpu()
    try:
        _save(path, array, parameters)
    except OSError as error:
        _warn_unkept(error)
    return array


def _warn_unkept(error: OSError) -> None:
    warnings.warn(
        f"an array is not kept and will be computed again next time: {error}. The folder is an "
        "argument, or $SDKD_CACHE.",
        stacklevel=4,
    )


def _canonical_json(value: Mapping[str, object]) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`parameters` cannot be written as JSON ({error}); expected strings, finite numbers, "
            "booleans, None, and lists or mappings of these. Give a tensor as its checksum."
        ) from error


def _checksum(array: Tensor) -> str:
    # As bytes, because numpy has no bfloat16.
    return hashlib.sha256(array.flatten().view(torch.uint8).numpy().data).hexdigest()


def _unusable(file: Path, got: str, expected: str) -> ValueError:
    return ValueError(
        f"cached file {file} {got}, expected {expected}. Delete it, and it will be computed anew."
    )
