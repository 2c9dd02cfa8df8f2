"""Two-dimensional Boussinesq convection between two plates, by a spectral Galerkin method.

The modes are in `plate_modes`, initial fields and data sets in `rayleigh_benard`.

Lengths are in plate distances, temperatures in plate differences, speeds in free-fall speeds
sqrt(g alpha Delta d), and times in the ratio of length and speed. Then

    du/dt + u . grad u = -grad p + sqrt(Pr / Ra) Laplacian(u) + T e_z,    div u = 0
    dT/dt + u . grad T = 1 / sqrt(Ra Pr) Laplacian(T)

with u = 0 at both plates, T = 1 at the lower (z = 0) and 0 at the upper one (z = 1), all periodic
along x, and no mean pressure gradient along x. One diffusion time is sqrt(Ra Pr) of these times.

Axis -2 of every field is x, point i of n at i / n of the period; axis -1 is z, at the Gauss points.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fft import irfft, rfft
from tqdm import tqdm

from sdkd_plugin._checks import check_finite, check_positive, check_positive_int
from sdkd_plugin.data.plate_modes import gauss_points, heat_modes, stokes_modes
from sdkd_plugin.data.time_stepping import Times, check_dtype, check_times, etdrk4, integrate


def solve(
    fields: Float[Tensor, "batch 3 nx nz"],
    *,
    rayleigh: float,
    prandtl: float = 1.0,
    aspect_ratio: float = 2.0,
    duration: float = 20.0,
    record_interval: float = 1.0,
    dt: float | None = None,
    bar: tqdm | None = None,
) -> Float[Tensor, "batch time 3 nx nz"]:
    """Integrate the Boussinesq equations; the fields set precision (float32, float64) and device.

    Along x, Fourier modes below a third of the grid's. Across, polynomials of degree up to two
    thirds of ``nz`` in the diffusion's own modes (see `plate_modes`), so boundary conditions and
    incompressibility hold to rounding. Quadratures are exact, so advection conserves energy and
    temperature variance. Time stepping is ETDRK4, advection and buoyancy explicit: of fourth order;
    between two and three, at errors below 1e-6, where diffusion is fast (Ra 1e4, Pr 10).

    Fields are temperature and the velocities along x and z, at `gauss_points` of z, recorded
    at record_interval, 2 record_interval, ..., duration. ``dt`` None takes a CFL number of 1 at the
    free-fall speed. ``bar`` advances by one a step.
    """
    if fields.ndim != 4 or fields.shape[1] != 3 or not len(fields):
        raise ValueError(f"`fields` has shape {tuple(fields.shape)}, expected (batch, 3, nx, nz).")
    check_dtype("fields.dtype", fields.dtype)
    check_finite("fields", fields)
    resolution = (fields.shape[2], fields.shape[3])
    times = convection_times(
        rayleigh, prandtl, aspect_ratio, resolution, duration, record_interval, dt
    )
    flow = _Flow(rayleigh, prandtl, aspect_ratio, fields)
    step = etdrk4(flow.diffusion, flow.tendency, flow.cast, times.dt)
    return integrate(flow.to_state(fields), step, flow.observe, times, bar)


def convection_times(
    rayleigh: float,
    prandtl: float,
    aspect_ratio: float,
    resolution: tuple[int, int],
    duration: float,
    record_interval: float,
    dt: float | None,
) -> Times:
    """Check a flow's numbers and count its records and steps, as `solve` takes them."""
    check_positive("rayleigh", rayleigh)
    check_positive("prandtl", prandtl)
    check_positive("aspect_ratio", aspect_ratio)
    nx, nz = resolution
    check_positive_int("nx", nx, 4)
    check_positive_int("nz", nz, 8)
    # Points a unit of length where the flow is fastest: midway, Gauss points are pi / (2 nz) apart.
    finest = math.ceil(max(nx / aspect_ratio, 2 * nz / math.pi))
    return check_times(duration, record_interval, dt, finest)


class _Flow:
    """One grid, Ra and Pr. A state is (wave number, sample, amplitudes of Stokes, heat modes)."""

    def __init__(self, rayleigh: float, prandtl: float, aspect_ratio: float, like: Tensor) -> None:
        self.nx, nz = like.shape[2:]
        self.kept = math.ceil(self.nx / 3)
        k = 2 * math.pi / aspect_ratio * torch.arange(self.kept, dtype=torch.float64)
        stokes, heat = stokes_modes(k, nz), heat_modes(nz)
        self.n_modes = len(heat.rate)
        z, weights = gauss_points(nz)
        cast = self.cast = lambda x: x.to(like.device, like.dtype)
        viscosity, diffusivity = math.sqrt(prandtl / rayleigh), 1 / math.sqrt(rayleigh * prandtl)
        self.diffusion = -torch.cat(
            [viscosity * stokes.rate, diffusivity * (heat.rate + k[:, None] ** 2)], dim=-1
        )[:, None]
        self.ik = cast(k)[:, None, None] * 1j
        self.from_stokes = cast(torch.cat([stokes.slope, stokes.value, stokes.vorticity], dim=-1))
        self.from_heat = cast(heat.value)
        self.on_slope, self.on_value, self.on_heat, self.on_heat_slope = (
            cast((values * weights).mT.contiguous())
            for values in (stokes.slope, stokes.value, heat.value, heat.slope)
        )
        # Conduction: states hold the temperature above it.
        self.at_rest = cast(torch.stack([1 - z, 0 * z, 0 * z]))[:, None, None]
        self.spacing = cast(weights)
        self.dx = aspect_ratio / self.nx

    def to_state(self, fields: Tensor) -> Tensor:
        temperature, u, w = self._spectrum(fields.permute(1, 2, 0, 3) - self.at_rest)
        return torch.cat([self._on_stokes(u, w), _times(temperature, self.on_heat)], dim=-1)

    def to_fields(self, state: Tensor) -> Tensor:
        u, w, _, temperature = self._at_points(state)
        spectra = torch.stack([temperature, u, w])
        fields = irfft(spectra, n=self.nx, dim=1, norm="forward")
        return (fields + self.at_rest).permute(2, 0, 1, 3)

    def tendency(self, state: Tensor) -> Tensor:
        """Advection, of momentum as vorticity times velocity, and buoyancy."""
        spectra = torch.stack(self._at_points(state))
        u, w, vorticity, temperature = irfft(spectra, n=self.nx, dim=1, norm="forward")
        push_x, push_z, flux_x, flux_z = self._spectrum(
            torch.stack([w * vorticity, -u * vorticity, u * temperature, w * temperature])
        )
        _, w_hat, _, temperature_hat = spectra
        heat = _times(w_hat - self.ik * flux_x, self.on_heat) + _times(flux_z, self.on_heat_slope)
        return torch.cat([self._on_stokes(push_x, push_z + temperature_hat), heat], dim=-1)

    def observe(self, state: Tensor) -> tuple[Tensor, float]:
        """The fields, and the grid points crossed in a unit of time, max(|u| / dx + |w| / dz)."""
        fields = self.to_fields(state)
        _, u, w = fields.unbind(1)
        return fields, float((u.abs() / self.dx + w.abs() / self.spacing).max())

    def _at_points(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fourier coefficients of u, w, vorticity and temperature above conduction, at points z."""
        flow, heat = state.split(self.n_modes, dim=-1)
        u, stream, vorticity = _times(flow, self.from_stokes).chunk(3, dim=-1)
        return u, -self.ik * stream, vorticity, _times(heat, self.from_heat)

    def _on_stokes(self, u: Tensor, w: Tensor) -> Tensor:
        """Amplitudes of Stokes modes; gradients, such as the pressure's, have none."""
        return _times(u, self.on_slope) + _times(self.ik * w, self.on_value)

    def _spectrum(self, fields: Tensor) -> Tensor:
        return rfft(fields, dim=1, norm="forward")[:, : self.kept]


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """Complex times real, at half the cost of complex times complex."""
    return torch.complex(x.real @ matrix, x.imag @ matrix)
