"""Imports neuraloperator without letting it change the process's warning filters."""

import warnings

with warnings.catch_warnings():
    import neuralop

__all__ = ["neuralop"]
