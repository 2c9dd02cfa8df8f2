"""Imports neuraloperator without its change of warning filters; reads its files without pickle."""

import os
import pickle
import warnings
import zipfile
from typing import Any

import torch

with warnings.catch_warnings():
    import neuralop

__all__ = ["load_plain", "neuralop"]


def load_plain(path: str | os.PathLike[str], map_location: Any = None) -> Any:
    """Tensors and plain values of a file of ``torch.save``; other objects raise a ValueError."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    # A pickle that is not executed, a broken archive, an empty file.
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError),
        *(LookupError, RuntimeError, TypeError, ValueError),
    ) as error:
        raise ValueError(
            f"{path} is damaged, or holds objects other than tensors and plain values, which are "
            "not unpickled."
        ) from error
