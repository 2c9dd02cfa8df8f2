"""Arrays on disk as safetensors, each under a key of all the parameters it was computed from."""

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path with the suffix of ``path``, moved over ``path`` once the block succeeds.

    Readers see the old file or the whole new one. On any exception, Ctrl-C included, the temporary
    file is removed and ``path`` is left as it was. Folders are created.

    Raises:
        FileNotFoundError: if the block ends without having written the file.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "table.csv"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("a,b")
        >>> target.read_text()
        'a,b'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder, because a rename is atomic within one file system only.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(8)}{target.suffix}")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(
                f"nothing was written to the temporary file for {target}; write to the path that "
                "`atomic_path` yields."
            )
        temporary.chmod(permissions)  # safetensors makes files that only their owner may read
        # Before the name points at it, or a power cut could leave an empty file of that name.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _save(path: Path, array: Tensor, parameters: Mapping[str, object]) -> None:
    stored = array.contiguous()
    metadata = {
        "key": parameters_key(parameters),
        "parameters": _canonical_json(dict(parameters)),
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
    if metadata.get("key") != parameters_key(parameters):
        found, expected = metadata.get("parameters"), _canonical_json(dict(parameters))
        raise _unusable(path, f"was computed from the parameters {found}", expected)
    if (checksum := _checksum(array)) != metadata.get("sha256"):
        raise _unusable(path, f"has SHA-256 {checksum}", f"the recorded {metadata.get('sha256')}")
    return array


def load_or_compute(
    stem: str,
    compute: Callable[[], Tensor],
    *,
    parameters: Mapping[str, object],
    folder: str | os.PathLike[str] | None = None,
) -> Tensor:
    """The cached array of these parameters; computed and stored first where there is none.

    The file is ``<stem>-<first 16 digits of the key>.safetensors``. Where it cannot be written,
    there is a warning, and the array is returned all the same. ``folder`` None is
    :func:`default_folder`.

    Raises:
        ValueError: if the file there is damaged or was computed from other parameters.
    """
    where = default_folder() if folder is None else Path(folder).expanduser()
    path = where / f"{stem}-{parameters_key(parameters)[:16]}.safetensors"
    if path.exists():
        return _load(path, parameters)
    array = compute().detach().cpu()
    try:
        _save(path, array, parameters)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"{path} cannot be kept and will be computed again next time: {error}. Free space, or "
            "name a folder that can be written, by the argument or by $SDKD_CACHE.",
            stacklevel=3,
        )
    return array


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
