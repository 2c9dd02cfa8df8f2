"""The two-dimensional vorticity equation on the unit torus, by a pseudo-spectral method.

The vorticity w = dv/dx - du/dy obeys

    dw/dt + u . grad w = nu Laplacian(w) + f,    u = d psi/dy,  v = -d psi/dx,  -Laplacian(psi) = w

Axis -2 of every field is x, axis -1 is y; point i of n lies at i / n.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fft import fftfreq, irfft2, rfft2, rfftfreq
from tqdm import tqdm

from sdkd_plugin._checks import check_choice, check_finite, check_positive, check_shape
from sdkd_plugin.data.time_stepping import (
    Map,
    Times,
    check_dtype,
    check_times,
    etdrk4,
    integrate,
)

Scheme: TypeAlias = Literal["etdrk4", "cn-heun", "cn-euler"]
Forcing: TypeAlias = Callable[[Tensor, Tensor], Tensor] | None

# CFL number, dt max(|u| / dx + |v| / dy), of the default step in a flow of speed 1. Runge-Kutta is
# stable below 1.35 (2.83 on the imaginary axis, wave numbers up to a third of the grid's). Heun's
# and Euler's are for accuracy; Euler's is the FNO recipe's 1e-4 on 256 points.
_DEFAULT_CFL = {"etdrk4": 1.0, "cn-heun": 0.25, "cn-euler": 0.0256}


def fno_forcing(x: Tensor, y: Tensor) -> Tensor:
    """The steady forcing of the FNO recipe, f = 0.1 (sin 2 pi (x + y) + cos 2 pi (x + y))."""
    phase = 2 * math.pi * (x + y)
    return 0.1 * (torch.sin(phase) + torch.cos(phase))


def solve(
    vorticity: Float[Tensor, "batch nx ny"],
    *,
    viscosity: float = 1e-3,
    duration: float = 20.0,
    record_interval: float = 1.0,
    forcing: Forcing = fno_forcing,
    dt: float | None = None,
    scheme: Scheme = "etdrk4",
    bar: tqdm | None = None,
) -> Float[Tensor, "batch time nx ny"]:
    """Integrate the vorticity equation; the fields set precision (float32, float64) and device.

    Wave numbers below a third of the grid's are kept (the 2/3 rule), so unforced inviscid flow
    keeps energy and enstrophy up to the error in time. A tendency costs four real FFTs:
    -u . grad w = (d^2/dy^2 - d^2/dx^2)(u v) - d^2/dxdy (v^2 - u^2).

    Fields are recorded at record_interval, 2 record_interval, ..., duration. ``scheme`` "etdrk4" is
    of fourth order, diffusion exact; "cn-heun", of second, and "cn-euler", of first, the FNO
    recipe's own, treat diffusion by Crank-Nicolson. ``dt`` None takes a CFL number of 1, 1/4 or
    1/39 at speed max(|u| + |v|) = 1; the published FNO flows peak at 0.4 to 0.8. ``forcing`` is a
    function of x and y. ``bar`` advances by one a step.

    Source: Basdevant (1983), J. Comput. Phys. 50, for the four transforms; Li et al. (2021),
    appendix A.3.
    """
    if vorticity.ndim != 3 or min(vorticity.shape[1:]) < 4 or not len(vorticity):
        raise ValueError(
            f"`vorticity` has shape {tuple(vorticity.shape)}, expected (batch, nx, ny) with at "
            "least one field of at least 4 x 4 points."
        )
    check_dtype("vorticity.dtype", vorticity.dtype)
    check_finite("vorticity", vorticity)
    check_positive("viscosity", viscosity, allow_zero=True)
    nx, ny = vorticity.shape[1:]
    times = scheme_times(scheme, max(nx, ny), duration, record_interval, dt)
    flow = _Flow(forcing_field(forcing, nx, ny), viscosity, vorticity)
    step = (
        etdrk4(flow.diffusion, flow.tendency, flow.cast, times.dt)
        if scheme == "etdrk4"
        else _crank_nicolson(flow, times.dt, scheme)
    )

    state = rfft2(vorticity) * flow.kept
    return integrate(state, step, lambda w: (flow.to_field(w), flow.speed(w)), times, bar)


def scheme_times(
    scheme: Scheme, points: int, duration: float, record_interval: float, dt: float | None
) -> Times:
    """What to record and in which steps, with ``points`` along the grid's longer axis."""
    check_choice("scheme", scheme, get_args(Scheme))
    return check_times(duration, record_interval, dt, points, _DEFAULT_CFL[scheme])


def forcing_field(forcing: Forcing, nx: int, ny: int) -> Float[Tensor, "nx ny"]:
    """The forcing's values on a grid, zeros for None; float64 on the CPU."""
    if forcing is None:
        return torch.zeros(nx, ny, dtype=torch.float64)
    x = torch.arange(nx, dtype=torch.float64)[:, None] / nx
    y = torch.arange(ny, dtype=torch.float64)[None, :] / ny
    values = forcing(*torch.broadcast_tensors(x, y))
    check_shape("forcing", values.shape, (nx, ny), "one value a grid point")
    check_finite("forcing", values)
    return values


class _Flow:
    """One grid, one viscosity, one forcing: the terms of dw/dt in the half spectrum of `rfft2`."""

    def __init__(self, forcing: Tensor, viscosity: float, like: Tensor) -> None:
        nx, ny = self.shape = like.shape[1:]
        complex_type = torch.promote_types(like.dtype, torch.complex64)
        # Complex even where real, so that no step converts them again.
        self.cast: Map = lambda x: x.to(like.device, complex_type)
        kx = (fftfreq(nx, dtype=torch.float64) * nx).round()[:, None]
        ky = (rfftfreq(ny, dtype=torch.float64) * ny).round()[None, :]
        kept = (kx.abs() < nx / 3) & (ky < ny / 3)
        square = 4 * math.pi**2 * (kx**2 + ky**2)
        inverse = torch.where(square > 0, 1 / square, 0.0)
        self.kept = self.cast(kept)
        self.diffusion = -viscosity * square
        self.forcing = self.cast(rfft2(forcing) * kept)
        self.u = self.cast(2j * math.pi * ky * inverse)
        self.v = self.cast(-2j * math.pi * kx * inverse)
        self.of_uv = self.cast(4 * math.pi**2 * (kx**2 - ky**2) * kept)
        self.of_squares = self.cast(4 * math.pi**2 * kx * ky * kept)

    def to_field(self, state: Tensor) -> Tensor:
        return irfft2(state, s=self.shape)

    def velocity(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_field(self.u * state), self.to_field(self.v * state)

    def tendency(self, state: Tensor) -> Tensor:
        """Forcing minus advection."""
        u, v = self.velocity(state)
        forced = torch.addcmul(self.forcing, self.of_uv, rfft2(u * v))
        return torch.addcmul(forced, self.of_squares, rfft2((v - u) * (v + u)))

    def speed(self, state: Tensor) -> float:
        """Grid points crossed in a unit of time, max(|u| / dx + |v| / dy)."""
        u, v = self.velocity(state.detach())
        return float((u.abs() * self.shape[0] + v.abs() * self.shape[1]).max())


def _crank_nicolson(flow: _Flow, dt: float, scheme: Scheme) -> Map:
    z = flow.diffusion * dt / 2
    keep, gain = flow.cast((1 + z) / (1 - z)), flow.cast(dt / (1 - z))

    def step(state: Tensor) -> Tensor:
        kept, first = keep * state, flow.tendency(state)
        euler = torch.addcmul(kept, gain, first)
        if scheme == "cn-euler":
            return euler
        return torch.addcmul(kept, gain, (first + flow.tendency(euler)) / 2)

    return step
