"""Where a field becomes frequencies: grids, graphs, spheres and time, and bands."""

from sdkd_plugin.spectral.bands import Bands, Spectrum
from sdkd_plugin.spectral.basis import AbstractBasisTransform
from sdkd_plugin.spectral.graph import GraphTransform
from sdkd_plugin.spectral.grid import GridTransform
from sdkd_plugin.spectral.product import ProductTransform
from sdkd_plugin.spectral.sphere import SphereTransform
from sdkd_plugin.spectral.transform import AbstractTransform

__all__ = [
    "AbstractBasisTransform",
    "AbstractTransform",
    "Bands",
    "GraphTransform",
    "GridTransform",
    "ProductTransform",
    "Spectrum",
    "SphereTransform",
]
