"""The folder of one run, and how a command-line program ends when its input is bad."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from sdkd_plugin.data.store import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class UserError(ValueError):
    """Bad input to a command-line program: shown in one line, exit code 2."""


@contextmanager
def command_line_errors(program: str) -> Iterator[None]:
    """Turn bad input into one line on standard error and exit code 2; Ctrl-C into code 130.

    Args:
        program: the name that the line begins with.
    """
    try:
        yield
    except (UserError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{program}: error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; no half-written file is left.", file=sys.stderr)
        raise SystemExit(130) from None


def choose_device(name: str) -> torch.device:
    """The device of a command line; ``auto`` is the GPU where there is one.

    Raises:
        UserError: if a GPU was asked for and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    """A folder for the results of one run. Each file is written whole or not at all.

    A run into the folder of another replaces its files, name by name. The folder is made when the
    first file is written, so that a program that ends before has touched nothing.

    Args:
        folder: where the files go.

    Raises:
        UserError: if the folder's name is a file's, or it cannot be written to.

    Example:
        >>> import tempfile
        >>> run = Run(Path(tempfile.mkdtemp()) / "run")
        >>> run.text("note.txt", "seed 0").read_text()
        'seed 0'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder} is a file, expected a folder.")
        parent = next(p for p in [self.folder, *self.folder.absolute().parents] if p.exists())
        if not parent.is_dir():
            raise UserError(f"--out {self.folder} is below {parent}, which is a file.")
        if not os.access(parent, os.W_OK):
            raise UserError(f"--out {self.folder} cannot be written to: no right to {parent}.")

    def text(self, name: str, text: str) -> Path:
        """Write a text file."""
        with atomic_path(self.folder / name) as path:
            path.write_text(text, encoding="utf-8")
        return self.folder / name

    def rows(self, name: str, rows: pd.DataFrame) -> Path:
        """Write rows as CSV."""
        return self.text(name, rows.to_csv(index=False))

    def figure(self, name: str, figure: "Figure") -> Path:
        """Write a picture."""
        with atomic_path(self.folder / name) as path:
            figure.savefig(path, dpi=120)
        return self.folder / name
