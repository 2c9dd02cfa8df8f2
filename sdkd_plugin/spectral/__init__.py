"""Where a field becomes frequencies: the transforms of grids and graphs, and bands."""

from sdkd_plugin.spectral.bands import Bands, Spectrum
from sdkd_plugin.spectral.basis import AbstractBasisTransform
from sdkd_plugin.spectral.graph import GraphTransform
from sdkd_plugin.spectral.grid import GridTransform
from sdkd_plugin.spectral.transform import AbstractTransform

__all__ = [
    "AbstractBasisTransform",
    "AbstractTransform",
    "Bands",
    "GraphTransform",
    "GridTransform",
    "Spectrum",
]
