"""Fields on latitude x longitude: spherical harmonics, by the optional package torch-harmonics."""

import importlib
import math
from typing import Literal, get_args

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_positive_int
from sdkd_plugin.spectral.basis import AbstractBasisTransform
from sdkd_plugin.spectral.transform import check_field, working_dtype

SphereGrid = Literal["equiangular", "legendre-gauss", "lobatto"]


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

    domain_axes = (-2, -1)
    channel_axis = -3
    needs_field = True
    _areas: Tensor
    _legendre: Tensor

    def __init__(self, latitudes: int, longitudes: int, grid: SphereGrid = "equiangular") -> None:
        check_positive_int("latitudes", latitudes, minimum=4)
        check_positive_int("longitudes", longitudes, minimum=4)
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
        super().__init__(degree[:, None].expand(-1, degrees).clone(), multiplicity)
        self.shape = (latitudes, longitudes)
        self.grid: SphereGrid = grid
        # Legendre functions times quadrature, (order, degree, latitude); over the constant's: the
        # functions alone, with mean square 1.
        weights = sht.weights.double()
        self.register_buffer("_legendre", weights / weights[0, 0], persistent=False)
        areas = weights[0, 0] / weights[0, 0].mean()
        self.register_buffer("_areas", areas[:, None], persistent=False)

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Latitudes and longitudes."""
        return self.shape

    def resized(self, domain_shape: tuple[int, ...]) -> "SphereTransform":
        """A grid of another resolution, of the same kind."""
        return SphereTransform(domain_shape[0], domain_shape[1], self.grid)

    def forward(self, x: Float[Tensor, "..."]) -> Complex[Tensor, "..."]:
        """Coefficients ``(..., degree, order)`` of fields; orders below 0 are conjugates."""
        check_field(self, x)
        with torch.autocast(x.device.type, enabled=False):
            return self._unscaled(x.to(working_dtype(x))) * math.sqrt(math.prod(self.shape))

    def inverse(self, coefficients: Complex[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Fields from their coefficients."""
        return self._from_unscaled(coefficients / math.sqrt(math.prod(self.shape)))

    def _unscaled(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(self._weighted(x), norm="forward")[..., : len(self.frequencies)]
        c = torch.einsum("...kmr,mlk->...lmr", torch.view_as_real(waves), self._legendre.to(x))
        return torch.view_as_complex((c / self.shape[0]).contiguous())

    def _from_unscaled(self, coefficients: Tensor) -> Tensor:
        reals = torch.view_as_real(coefficients)
        waves = torch.einsum("...lmr,mlk->...kmr", reals, self._legendre.to(reals))
        waves = torch.view_as_complex(waves.contiguous())
        return torch.fft.irfft(waves, n=self.shape[1], norm="forward")

    def _weighted(self, x: Tensor) -> Tensor:
        return x * self._areas.to(x)

    def _slots(self, values: Tensor) -> Tensor:
        return torch.stack((values, values), -1)

    def _slot_energy(self) -> Tensor:
        return self._slots(self.multiplicity * math.prod(self.shape))

    def extra_repr(self) -> str:
        """Shape and grid, for ``print``."""
        return f"shape={self.shape}, grid={self.grid!r}, degrees={len(self.frequencies)}"
