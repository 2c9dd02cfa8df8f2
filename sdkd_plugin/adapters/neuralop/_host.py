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
_BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError)


def load_plain(path: str | os.PathLike[str], map_location: Any = None) -> Any:
    """Tensors and plain values of a file of ``torch.save``; other objects raise a ValueError."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (*_BROKEN, LookupError, RuntimeError, TypeError, ValueError) as error:
        wrong = "is damaged, or holds objects other than tensors and plain values"
        raise ValueError(f"{path} {wrong}, which are not unpickled.") from error
