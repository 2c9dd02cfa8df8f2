"""Two-dimensional Boussinesq convection between two plates, by a spectral Galerkin method.

Here live the equations and the time stepping. The modes in which they are solved are
`plate_modes`'s; initial fields, data sets and Nusselt numbers `rayleigh_benard`'s.

Lengths are in plate distances, temperatures in plate differences, speeds in free-fall speeds
sqrt(g alpha Delta d), and times in the ratio of length and speed. Then

    du/dt + u . grad u = -grad p + sqrt(Pr / Ra) Laplacian(u) + T e_z,    div u = 0
    dT/dt + u . grad T = 1 / sqrt(Ra Pr) Laplacian(T)

with u = 0 at both plates, T = 1 at the lower (z = 0) and 0 at the upper one (z = 1), all periodic
along x, and no mean pressure gradient along x. One diffusion time is sqrt(Ra Pr) of these times.

Axis -2 of every field is x, point i of n at i / n of the period; axis -1 is z, at the Gauss points.
"""

import math
from contextlib import nullcontext
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fft import irfft, rfft
from tqdm import tqdm

from sdkd_plugin._checks import check_finite, check_positive, check_positive_int
from sdkd_plugin.data.etdrk4 import etdrk4
from sdkd_plugin.data.plate_modes import gauss_points, heat_modes, stokes_modes
from sdkd_plugin.data.vorticity import check_times

# As in `vorticity`: three times Runge-Kutta's limit, what such a step leaves is no flow.
_HOPELESS_CFL = 4.0


def solve(
    fields: Float[Tensor, "batch 3 nx nz"],
    *,
    rayleigh: float,
    prandtl: float = 1.0,
    aspect_ratio: float = 2.0,
    duration: float = 20.0,
    record_interval: float = 1.0,
    dt: float | None = None,
    progress: bool | tqdm = True,
) -> Float[Tensor, "batch time 3 nx nz"]:
    """Integrate the Boussinesq equations from given fields.

    Along x, Fourier modes below a third of the grid's. Across, polynomials of degree up to two
    thirds of ``nz`` in the basis of the diffusion's own modes: Stokes modes, each of them
    divergence-free and at rest on the plates, and heat modes that vanish there. So boundary
    conditions and incompressibility hold to rounding, no pressure is needed, and diffusion is
    exact in time. Products are taken at the points and projected by quadratures that are exact
    for them: in space, advection conserves energy and temperature variance. Time stepping is
    ETDRK4 with advection and buoyancy explicit: fourth order where advection sets the step, and
    between two and three, at errors below 1e-6, where diffusion would (Ra 1e4, Pr 10).

    Args:
        fields: Temperature and the velocities along x and z, at the points of x and at
            :func:`gauss_points` of z; float32 or float64, which sets the precision, on any device.
            They are projected on the modes, velocity on its divergence-free part.
        rayleigh: Ra = g alpha Delta d^3 / (viscosity * diffusivity), above 0. Convection sets in
            at 1707.762 for wave length 2.016.
        prandtl: Pr = viscosity / diffusivity.
        aspect_ratio: Period along x, in plate distances.
        duration: Time of the last recorded fields, in free-fall times.
        record_interval: Time between recorded fields; divides ``duration``.
        dt: Time step; divides ``record_interval``. None takes the largest with a CFL number of 1
            in a flow of speed 1, the free-fall speed.
        progress: Show a bar on stderr once it takes longer than a second; or a bar of the
            caller's, which advances by one a step.

    Returns:
        Fields at record_interval, 2 record_interval, ..., duration: (batch, time, 3, nx, nz), as
        ``fields``, from which another call goes on.

    Raises:
        ValueError: for an argument out of range, steps that do not divide, fields that are not
            finite, and a step too large for the flow; then it names the CFL number and another.

    Example:
        >>> z, _ = gauss_points(16)
        >>> rest = torch.zeros(1, 3, 8, 16, dtype=torch.float64)
        >>> rest[:, 0] = 1 - z  # pure conduction, which stays as it is
        >>> conduction = solve(rest, rayleigh=1e4, duration=1.0)[:, 0]
        >>> torch.allclose(conduction, rest)
        True

    Source: Kassam and Trefethen (2005), Fourth-order time-stepping for stiff PDEs, section 2; for
    the units, Ahlers, Grossmann and Lohse (2009), Rev. Mod. Phys. 81, 503.
    """
    if fields.ndim != 4 or fields.shape[1] != 3 or not len(fields):
        raise ValueError(
            f"`fields` has shape {tuple(fields.shape)}, expected (batch, 3, nx, nz) with "
            "temperature and two velocities."
        )
    if fields.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"`fields` has type {fields.dtype}, expected torch.float32 or torch.float64; "
            "convert it with `.float()` or `.double()`."
        )
    check_finite("fields", fields)
    nx, nz = fields.shape[2:]
    check_steps_of = partial(
        check_steps,
        rayleigh=rayleigh,
        prandtl=prandtl,
        aspect_ratio=aspect_ratio,
        resolution=(nx, nz),
        duration=duration,
        record_interval=record_interval,
    )
    records, steps = check_steps_of(dt=dt)
    dt = record_interval / steps

    def too_large(cfl: float, time: float) -> ValueError:
        # At least the default's steps: a flow that starts from rest has no CFL number to go by.
        more = max(check_steps_of(dt=None)[1], math.ceil(steps * max(2.0, cfl)))
        return ValueError(
            f"`dt` is {dt:.6g}, expected a step for which the flow stays finite: it was lost after "
            f"t = {time:.6g}, where the CFL number dt max(|u| / dx + |w| / dz) was {cfl:.3g}; try "
            f"dt={record_interval / more!r}."
        )

    flow = _Flow(rayleigh, prandtl, aspect_ratio, fields)
    step = etdrk4(flow.diffusion, flow.tendency, flow.cast, dt)
    state = flow.to_state(fields)
    recorded = fields.new_empty(len(fields), records, 3, nx, nz)
    cfl = dt * flow.speed(fields)
    if not cfl < _HOPELESS_CFL:
        raise too_large(cfl, 0.0)
    steps_bar = (
        nullcontext(progress)
        if isinstance(progress, tqdm)
        else tqdm(total=records * steps, desc="solving", unit="step", delay=1, disable=not progress)
    )
    with steps_bar as bar:
        for record in range(records):
            for _ in range(steps):
                state = step(state)
                bar.update()
            recorded[:, record] = flow.to_fields(state)
            before, cfl = cfl, dt * flow.speed(recorded[:, record])
            if not cfl < _HOPELESS_CFL:  # also for NaN
                raise too_large(before, record * record_interval)
    return recorded


def check_steps(
    *,
    rayleigh: float,
    prandtl: float,
    aspect_ratio: float,
    resolution: tuple[int, int],
    duration: float,
    record_interval: float,
    dt: float | None,
) -> tuple[int, int]:
    """How many fields :func:`solve` records, and how many steps it takes for each.

    Args:
        rayleigh: As in :func:`solve`.
        prandtl: As in :func:`solve`.
        aspect_ratio: As in :func:`solve`.
        resolution: The solver's points along x and z.
        duration: As in :func:`solve`.
        record_interval: As in :func:`solve`.
        dt: As in :func:`solve`.

    Returns:
        Records, and steps a record.

    Raises:
        ValueError: for an argument out of range, and a time that does not divide the longer one.

    Example:
        >>> flow = dict(rayleigh=1e6, prandtl=1.0, aspect_ratio=2.0, resolution=(128, 64))
        >>> check_steps(**flow, duration=20.0, record_interval=1.0, dt=None)
        (20, 64)
    """
    check_positive("rayleigh", rayleigh)
    check_positive("prandtl", prandtl)
    check_positive("aspect_ratio", aspect_ratio)
    nx, nz = resolution
    check_positive_int("nx", nx, 4)
    check_positive_int("nz", nz, 8)
    # Points a unit of length where the flow is fastest: across, that is midway, where the Gauss
    # points are pi / (2 nz) apart; close to the plates they are closer, but nothing moves there.
    finest = max(nx / aspect_ratio, 2 * nz / math.pi)
    return check_times(
        duration=duration,
        record_interval=record_interval,
        dt=dt,
        scheme="etdrk4",
        points=math.ceil(finest),
    )


class _Flow:
    """One grid, Ra and Pr. A state is (wave number, sample, amplitudes of Stokes and heat modes).

    Wave numbers come first because each has matrices of its own; fields in here are (x, sample,
    z).
    """

    def __init__(self, rayleigh: float, prandtl: float, aspect_ratio: float, like: Tensor) -> None:
        self.nx, nz = like.shape[2:]
        self.kept = math.ceil(self.nx / 3)
        k = 2 * math.pi / aspect_ratio * torch.arange(self.kept, dtype=torch.float64)
        stokes, heat = stokes_modes(k, nz), heat_modes(nz)
        self.n_modes = len(heat.rate)
        z, weights = gauss_points(nz)

        def cast(x: Tensor) -> Tensor:
            return x.to(like.device, like.dtype)

        self.cast = cast
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
        # Conduction: the temperature over which a state counts, and no velocity.
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
        """All but diffusion: advection of momentum as vorticity times velocity, and buoyancy."""
        u_hat, w_hat, vorticity_hat, temperature_hat = self._at_points(state)
        u, w, vorticity, temperature = irfft(
            torch.stack([u_hat, w_hat, vorticity_hat, temperature_hat]),
            n=self.nx,
            dim=1,
            norm="forward",
        )
        push_x, push_z, flux_x, flux_z = self._spectrum(
            torch.stack([w * vorticity, -u * vorticity, u * temperature, w * temperature])
        )
        return torch.cat(
            [
                self._on_stokes(push_x, push_z + temperature_hat),
                _times(w_hat - self.ik * flux_x, self.on_heat) + _times(flux_z, self.on_heat_slope),
            ],
            dim=-1,
        )

    def speed(self, fields: Tensor) -> float:
        """Grid points crossed in a unit of time, max(|u| / dx + |w| / dz)."""
        _, u, w = fields.unbind(1)
        return float((u.abs() / self.dx + w.abs() / self.spacing).max())

    def _at_points(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fourier coefficients of u, w, vorticity and temperature (over conduction) at points z."""
        flow, heat = state.split(self.n_modes, dim=-1)
        u, stream, vorticity = _times(flow, self.from_stokes).chunk(3, dim=-1)
        return u, -self.ik * stream, vorticity, _times(heat, self.from_heat)

    def _on_stokes(self, u: Tensor, w: Tensor) -> Tensor:
        """Amplitudes of Stokes modes: what is a gradient, such as the pressure's, drops out."""
        return _times(u, self.on_slope) + _times(self.ik * w, self.on_value)

    def _spectrum(self, fields: Tensor) -> Tensor:
        return rfft(fields, dim=1, norm="forward")[:, : self.kept]


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """Complex times real, at half the cost of complex times complex."""
    return torch.complex(x.real @ matrix, x.imag @ matrix)
