"""How a command-line program chooses a device and a folder, and ends when its input is bad."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def command_line_errors(program: str) -> Iterator[None]:
    """A `ValueError` or `OSError` becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{program}: error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; no half-written file is left.", file=sys.stderr)
        raise SystemExit(130) from None


def choose_device(name: str) -> torch.device:
    """The device of a command line; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: if a GPU was asked for and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_folder(folder: Path) -> None:
    """Refuse a folder for results that cannot be written to; nothing is made.

    Raises:
        ValueError: if it is a file or below one, or there is no right to write.
    """
    parent = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    if not parent.is_dir():
        raise ValueError(f"--out {folder} cannot be a folder: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--out {folder} cannot be written to: no right to {parent}.")
