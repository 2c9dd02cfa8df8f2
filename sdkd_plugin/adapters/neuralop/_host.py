"""Imports neuraloperator without its change of warning filters."""

import warnings

with warnings.catch_warnings():
    import neuralop

__all__ = ["neuralop"]
