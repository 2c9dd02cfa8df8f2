"""Arrays on disk, each under a key of all the parameters it was computed from.

Here live the key, the atomic write and the verified read. What is computed, and from which
parameters, is the caller's: nothing here knows of Navier-Stokes, traffic or teachers. Files are
safetensors, so reading one executes nothing.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The folder for cached arrays: ``$SDKD_CACHE``, else ``sdkd_plugin`` in the user's cache.

    The user's cache is ``$XDG_CACHE_HOME`` where that is set, else ``~/.cache``. The folder need
    not exist: the first write creates it.

    Returns:
        The folder, with ``~`` expanded.

    Example:
        >>> default_folder().is_absolute() or "SDKD_CACHE" in os.environ
        True
    """
    if own := os.environ.get("SDKD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdkd_plugin"


def parameters_key(parameters: Mapping[str, object]) -> str:
    """The key of a set of parameters: SHA-256 of their canonical JSON and the format version.

    Args:
        parameters: Names and values; values are whatever JSON can hold exactly (strings, finite
            numbers, booleans, None, lists and mappings of these). The order does not count; 1 and
            1.0 differ.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: for a value that JSON cannot hold (a tensor, NaN, an object).

    Example:
        >>> parameters_key({"a": 1, "b": 2.5}) == parameters_key({"b": 2.5, "a": 1})
        True
    """
    versioned = {"format": FORMAT_VERSION, "parameters": dict(parameters)}
    return hashlib.sha256(_canonical_json(versioned).encode()).hexdigest()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    r"""A temporary path with the suffix of ``path``, moved over ``path`` once the block succeeds.

    Readers see the old file or the new one, never a part of one. On any exception, Ctrl-C
    included, the temporary file is removed and ``path`` is left as it was. Folders on the way to
    ``path`` are created.

    Args:
        path: Where the file shall be.

    Yields:
        The path to write to; it does not exist yet.

    Raises:
        FileNotFoundError: if the block ends without having written the file.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "table.csv"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("a,b\n")
        >>> target.read_text()
        'a,b\n'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder, because a rename is atomic within one file system only.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(8)}{target.suffix}")
    try:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(
                f"nothing was written to the temporary file for {target}; write to the path that "
                "`atomic_path` yields."
            )
        # The data must be on the disk before the name points at them, or a power cut could leave
        # an empty file under the right name.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(
    path: str | os.PathLike[str], array: Tensor, *, parameters: Mapping[str, object]
) -> None:
    """Write ``array`` and its parameters into one safetensors file, atomically.

    Args:
        path: The file, conventionally with the suffix ``.safetensors``.
        array: Any shape, any device; stored as it is, contiguous.
        parameters: What the array was computed from, as for :func:`parameters_key`.

    Raises:
        ValueError: for parameters that JSON cannot hold; nothing is written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "ones.safetensors"
        >>> save_array(path, torch.ones(2, 3), parameters={"value": 1})
        >>> load_array(path, parameters={"value": 1}, shape=(2, 3), dtype=torch.float32).sum()
        tensor(6.)
    """
    stored = array.detach().cpu().contiguous()
    metadata = {
        "key": parameters_key(parameters),
        "parameters": _canonical_json(dict(parameters)),
        "sha256": _checksum(stored),
    }
    with atomic_path(path) as temporary:
        save_file({_ARRAY: stored}, temporary, metadata=metadata)


def load_array(
    path: str | os.PathLike[str],
    *,
    parameters: Mapping[str, object],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Read an array that :func:`save_array` wrote, and refuse it unless it is the one expected.

    Args:
        path: The file.
        parameters: What the array must have been computed from.
        shape: What its shape must be.
        dtype: What its type must be.

    Returns:
        The array, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or no safetensors, comes from other parameters, or
            has another shape, type or checksum; the message names the file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"`path` is {file}, expected an existing file.")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            names = list(opened.keys())
            if names != [_ARRAY]:
                raise _unusable(file, f"holds the arrays {names}", f"the one array {_ARRAY!r}")
            array: Tensor = opened.get_tensor(_ARRAY)
    except SafetensorError as error:
        raise _unusable(file, f"is truncated or damaged ({error})", "safetensors") from error
    if metadata.get("key") != parameters_key(parameters):
        found = metadata.get("parameters", "none")
        raise _unusable(
            file, f"was computed from the parameters {found}", _canonical_json(dict(parameters))
        )
    if tuple(array.shape) != tuple(shape) or array.dtype != dtype:
        raise _unusable(
            file,
            f"has shape {tuple(array.shape)} and type {array.dtype}",
            f"shape {tuple(shape)} and type {dtype}",
        )
    if (checksum := _checksum(array)) != metadata.get("sha256"):
        raise _unusable(
            file, f"has SHA-256 {checksum}", f"the recorded {metadata.get('sha256', 'none')}"
        )
    return array


def load_or_compute(
    stem: str,
    compute: Callable[[], Tensor],
    *,
    parameters: Mapping[str, object],
    shape: Sequence[int],
    dtype: torch.dtype,
    folder: str | os.PathLike[str] | None = None,
) -> Tensor:
    """The cached array of these parameters; computed and stored first where there is none.

    The file is ``<stem>-<first 16 digits of the key>.safetensors``. Two processes that compute
    the same array at once both succeed: the later one replaces the earlier one's equal file.

    Args:
        stem: How the file's name begins.
        compute: Makes the array; called at most once.
        parameters: All that determines the array, as for :func:`parameters_key`.
        shape: The shape it has.
        dtype: The type it has.
        folder: Where the file lies; None is :func:`default_folder`.

    Returns:
        The array, on the CPU.

    Raises:
        ValueError: if a file is there but is not the one expected (see :func:`load_array`), or if
            ``compute`` returns another shape or type than promised; nothing is stored then.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> settings = dict(parameters={"n": 3}, shape=(3,), dtype=torch.int64, folder=folder)
        >>> load_or_compute("range", lambda: torch.arange(3), **settings)
        tensor([0, 1, 2])
        >>> load_or_compute("range", lambda: 1 / 0, **settings)
        tensor([0, 1, 2])
    """
    where = default_folder() if folder is None else Path(folder).expanduser()
    path = where / f"{stem}-{parameters_key(parameters)[:16]}.safetensors"
    if path.exists():
        return load_array(path, parameters=parameters, shape=shape, dtype=dtype)
    array = compute().detach().cpu()
    if tuple(array.shape) != tuple(shape) or array.dtype != dtype:
        raise ValueError(
            f"`compute` returned shape {tuple(array.shape)} and type {array.dtype}, expected the "
            f"promised {tuple(shape)} and {dtype}."
        )
    save_array(path, array, parameters=parameters)
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
