"""Files that are written as a whole or not at all, also by processes that are killed."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

PathLike = str | os.PathLike[str]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without them says
_OF_TORCH = re.compile("PytorchStreamWriter|file write|unexpected pos|iostream error")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on a file or folder that ends with its process; False if it is taken.

    With ``wait`` it is waited for. Without POSIX locks, or on a file system without them, there is
    nothing to wait for, and without ``wait`` every lock counts as taken.
    """
    try:
        import fcntl
    except ImportError:
        yield wait
        return
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except BlockingIOError:
        held = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        held = wait
    try:
        yield held
    finally:
        os.close(handle)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, to write in; those that killed processes left are removed."""
    with _naming(target), ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent, escape(target.name))
        while True:
            made = tempfile.mkdtemp(".tmp", f".{target.name}.", target.parent)
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            stack.enter_context(locked(Path(made)))
            if os.path.isdir(made):  # else another writer took it for stale before it was locked
                break
        yield Path(made)


def remove_stale(folder: Path, names: str) -> None:
    """Remove what killed writers of files of these names, a pattern, left in a folder."""
    for stale in folder.glob(f".{names}.*.tmp"):
        with suppress(OSError), locked(stale, wait=False) as free:
            if free:
                shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Give errors of the file system the path and the remedy: torch and safetensors do not."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        elsewhere = str(getattr(error, "filename", None) or target.parent)
        ours = elsewhere.startswith(str(target.parent))
        if not ours or (isinstance(error, RuntimeError) and not _OF_TORCH.search(str(error))):
            raise
        reason = getattr(error, "strerror", None) or (str(error) or "it failed").splitlines()[0]
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"it cannot be written ({reason}): free space, or give a folder that you may write to; "
            "what was there is as before",
            str(target),
        ) from error


def check_writable(path: PathLike) -> None:
    """Try to write beside ``path`` now, rather than after what takes long to compute.

    Raises:
        OSError: if that fails.
    """
    with _scratch(Path(path)) as folder:
        (folder / "tried").write_bytes(bytes(4096))


def _settle(file: Path) -> None:
    """Bring a file to the disk, lest a power cut leave an empty one of its name."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path with the name of ``path``, moved over ``path`` once the block succeeds.

    Readers see the old file or the whole new one. On any exception, Ctrl-C included, the temporary
    file is removed and ``path`` is left as it was; what a killed process left is removed by the
    next writer of ``path``. Folders are created.

    Raises:
        OSError: naming ``path``, if it cannot be written.
        ValueError: if the block ends without having written the file.
    """
    target = Path(path)
    # In the target's own folder, because a rename is atomic within one file system only.
    with _scratch(target) as folder:
        temporary = folder / target.name
        temporary.touch()
        permissions = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        if not temporary.is_file():
            raise ValueError(
                f"nothing was written to the temporary file for {target}; write to the path that "
                "`atomic_path` yields."
            )
        temporary.chmod(permissions)  # safetensors makes files that only their owner may read
        _settle(temporary)
        os.replace(temporary, target)


@contextmanager
def atomic_files(folder: PathLike, name: str) -> Iterator[Path]:
    """An empty folder whose files move into ``folder`` as one, once the block succeeds.

    Whenever the process ends, `check_files` finds the old files or all the new ones. Their
    checksums are kept as ``<name>.sha256``, which ``sha256sum --check`` reads. Writers wait for
    each other. A block that writes nothing changes nothing.
    """
    target = Path(folder)
    with _naming(target / name):
        target.mkdir(parents=True, exist_ok=True)
    with locked(target), _scratch(target / name) as scratch:
        _move_in(target, name)
        new = scratch / "new"
        new.mkdir()
        yield new
        if files := sorted(new.iterdir()):
            (new / f"{name}.sha256").write_text(_sums(files))
            for file in new.iterdir():
                _settle(file)
            os.replace(new, target / f".{name}.new")  # from here on they count
            _move_in(target, name)


def _move_in(target: Path, name: str) -> None:
    """Move the files of a finished block into their folder, the rest of them after a kill."""
    new = target / f".{name}.new"
    if new.is_dir():
        for file in sorted(new.iterdir()):
            os.replace(file, target / file.name)
        new.rmdir()


def _sums(files: list[Path]) -> str:
    return "".join(f"{checksum(file)}  {file.name}\n" for file in files)


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_files(folder: PathLike, name: str) -> frozenset[str]:
    """The names of files that `atomic_files` wrote, after a comparison of their checksums.

    Raises:
        FileNotFoundError: if it has written none of that name there.
        ValueError: if a file is missing, damaged or of another block.
    """
    target = Path(folder)
    table = target / f"{name}.sha256"
    if target.is_dir():
        with locked(target):
            _move_in(target, name)
    if not table.is_file():
        raise FileNotFoundError(f"{table} does not exist: nothing was saved there as a whole.")
    listed = table.read_bytes().decode(errors="replace")
    files = [target / line[66:] for line in listed.splitlines()]
    whole = all(file.parent == target and file.is_file() for file in files)
    if not files or not whole or listed != _sums(files):
        raise ValueError(
            f"{table} does not fit the files beside it: one is damaged, missing or was written by "
            "something else. Give the folder of another save, or start again."
        )
    return frozenset(file.name for file in files)
