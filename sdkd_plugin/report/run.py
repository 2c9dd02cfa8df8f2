"""The folder of one run, and how a command-line program ends when its input is bad."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

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
    """The device that was asked for; ``auto`` is the GPU where there is one.

    Raises:
        UserError: if a GPU was asked for and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    r"""A folder for the results of one run. Each file is written whole or not at all.

    A run into the folder of another replaces its files, name by name. The folder is made when the
    first file is written, so that a program that ends before has touched nothing.

    Args:
        folder: where the files go.

    Raises:
        UserError: if the folder's name is a file's, or it cannot be written to.

    Example:
        >>> import tempfile
        >>> run = Run(Path(tempfile.mkdtemp()) / "run")
        >>> run.settings({"seed": 0}).read_text()
        'seed: 0\n'
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

    def settings(self, settings: Mapping[str, Any]) -> Path:
        """Write the resolved settings as ``settings.yaml``."""
        return self.text("settings.yaml", yaml.safe_dump(dict(settings), sort_keys=False))

    def rows(self, name: str, rows: pd.DataFrame) -> Path:
        """Write rows as CSV."""
        return self.text(name, rows.to_csv(index=False))

    def figure(self, name: str, figure: "Figure") -> Path:
        """Write a picture."""
        with atomic_path(self.folder / name) as path:
            figure.savefig(path, dpi=120)
        return self.folder / name

    def weights(self, name: str, model: nn.Module) -> Path:
        """Write a model's weights as safetensors.

        Raises:
            ValueError: if the model shares tensors between names, which safetensors refuses.
        """
        # neuraloperator adds its metadata, no tensor, to the state.
        state = {k: v.contiguous() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        with atomic_path(self.folder / name) as path:
            save_file(state, path)
        return self.folder / name
