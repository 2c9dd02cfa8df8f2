"""Fields on latitude x longitude: spherical harmonics, by the optional package torch-harmonics."""

import importlib
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral.basis import AbstractBasisTransform

SphereGrid = Literal["equiangular", "legendre-gauss", "lobatto"]


@explained
class SphereTransform(AbstractBasisTransform):
    """Spherical harmonics of fields ``(..., latitude, longitude)``; frequency is the total degree.

    The frequency of ``Y_l^m`` is ``l / (degrees - 1)``. Energies are weighted by area,

        sum_i energy_i = sum(w x^2),  w the area of a cell, with mean 1,

    so with equal weights the frequency-aligned loss is the MSE weighted by area, as weather
    forecasts are scored. Rotations of the sphere leave band energies alone. What a grid carries
    beyond the highest degree belongs to the highest band.

    Args:
        latitudes: from pole to pole.
        longitudes: around the globe, equally spaced.
        grid: where the latitudes are: ``equiangular`` (both poles included; degrees are half the
            latitudes), ``legendre-gauss`` or ``lobatto``.

    Raises:
        ImportError: if torch-harmonics is not installed.
        ValueError: if a size is below 4 or the grid is unknown.

    Example::

        transform = SphereTransform(121, 240)
        energy = transform.sample_band_energy(forecast - teacher, Bands.split(0.25))

    Source: Schaeffer 2013, "Efficient spherical harmonic transforms"; torch-harmonics.
    """

    domain_shape: tuple[int, ...] = ()
    domain_axes = (-2, -1)
    channel_axis = -3
    needs_field = True
    _paired = True
    _legendre: Tensor

    def __init__(self, latitudes: int, longitudes: int, grid: SphereGrid = "equiangular") -> None:
        check_sizes(4, latitudes=latitudes, longitudes=longitudes)
        check_choice("grid", grid, get_args(SphereGrid))
        try:
            harmonics = importlib.import_module("torch_harmonics")
        except ImportError as error:
            raise ImportError(
                "SphereTransform needs torch-harmonics: pip install 'sdkd_plugin[sphere]'"
            ) from error
        # So many that quadrature is exact for products, and that no zonal wave is ambiguous.
        exact = {"equiangular": (latitudes + 1) // 2, "legendre-gauss": latitudes}
        degrees = min(exact.get(grid, latitudes - 1), (longitudes + 1) // 2)
        sht = harmonics.RealSHT(latitudes, longitudes, lmax=degrees, mmax=degrees, grid=grid)
        degree = torch.arange(degrees, dtype=torch.float64) / (degrees - 1)
        multiplicity = torch.full((degrees, degrees), 2.0, dtype=torch.float64)
        multiplicity[:, 0] = 1
        # Legendre functions times quadrature, (order, degree, latitude).
        weights = sht.weights.double()
        areas = weights[0, 0] / weights[0, 0].mean()
        super().__init__(degree[:, None].repeat(1, degrees), multiplicity, areas[:, None])
        # Over those of the constant: the functions alone, with mean square 1.
        self.register_buffer("_legendre", weights / weights[0, 0], persistent=False)
        self.domain_shape = (latitudes, longitudes)
        self.grid: SphereGrid = grid
        self._scale = math.sqrt(latitudes * longitudes)

    def resized(self, domain_shape: tuple[int, ...]) -> "SphereTransform":
        """A grid of another resolution, of the same kind."""
        return SphereTransform(domain_shape[0], domain_shape[1], self.grid)

    def _to_packed(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(self._weighted(x), norm="forward")[..., : len(self.frequencies)]
        c = torch.einsum("...kmr,mlk->...lmr", torch.view_as_real(waves), self._legendre.to(x))
        return torch.view_as_complex((c / self.domain_shape[0]).contiguous())

    def _from_packed(self, c: Tensor) -> Tensor:
        reals = torch.view_as_real(c)
        waves = torch.einsum("...lmr,mlk->...kmr", reals, self._legendre.to(reals))
        waves = torch.view_as_complex(waves.contiguous())
        return torch.fft.irfft(waves, n=self.domain_shape[1], norm="forward")

    def extra_repr(self) -> str:
        """Shape and grid, for ``print``."""
        return f"shape={self.domain_shape}, grid={self.grid!r}, degrees={len(self.frequencies)}"
