"""Makes tsl importable, and imports it without letting it change the warning filters."""

import warnings

from sdkd_plugin.adapters.tsl._sparse_standins import install_standins

STANDINS = install_standins()
"""Packages that tsl imports and that pure-PyTorch stand-ins replace in this process."""

with warnings.catch_warnings():
    import tsl

__all__ = ["STANDINS", "tsl"]
