"""The two-dimensional vorticity equation on the unit torus, by a pseudo-spectral method.

Here live the equation, its steady forcing and the time stepping. Initial fields and data sets are
`navier_stokes`'s.

The vorticity w = dv/dx - du/dy obeys

    dw/dt + u . grad w = nu Laplacian(w) + f,    u = d psi/dy,  v = -d psi/dx,  -Laplacian(psi) = w

Axis -2 of every field is x, axis -1 is y; point i of n lies at i / n.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fft import fftfreq, irfft2, rfft2, rfftfreq
from tqdm import tqdm

from sdkd_plugin._checks import check_choice, check_finite, check_positive, check_shape
from sdkd_plugin.data.etdrk4 import etdrk4

Scheme: TypeAlias = Literal["etdrk4", "cn-heun", "cn-euler"]
Forcing: TypeAlias = Callable[[Tensor, Tensor], Tensor] | Tensor | None

_Map: TypeAlias = Callable[[Tensor], Tensor]

# CFL number, dt max(|u| / dx + |v| / dy), of the default step in a flow of speed 1. Runge-Kutta is
# stable below 1.35 (2.83 on the imaginary axis, wave numbers up to a third of the grid's). Heun's
# and Euler's are for accuracy; Euler's is the FNO recipe's 1e-4 on 256 points.
_DEFAULT_CFL = {"etdrk4": 1.0, "cn-heun": 0.25, "cn-euler": 0.0256}
# Three times Runge-Kutta's limit: what such a step leaves is no flow, finite or not.
_HOPELESS_CFL = 4.0


def fno_forcing(x: Tensor, y: Tensor) -> Tensor:
    """The steady forcing of the FNO recipe, f = 0.1 (sin 2 pi (x + y) + cos 2 pi (x + y)).

    Args:
        x: First coordinate, in [0, 1).
        y: Second coordinate, of a shape that broadcasts with ``x``.

    Returns:
        The forcing at these points.

    Example:
        >>> fno_forcing(torch.tensor(0.0), torch.tensor(0.0))
        tensor(0.1000)
    """
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
    progress: bool | tqdm = True,
) -> Float[Tensor, "batch time nx ny"]:
    """Integrate the vorticity equation from given fields.

    Fields and products are truncated to the wave numbers below a third of the grid's (the 2/3
    rule), so unforced inviscid flow keeps energy and enstrophy but for the error in time. A
    tendency costs four real FFTs: with u and v at the points,
    -u . grad w = (d^2/dy^2 - d^2/dx^2)(u v) - d^2/dxdy (v^2 - u^2).

    Args:
        vorticity: Initial fields, float32 or float64, which sets the precision, on any device.
        viscosity: nu, at least 0, in torus lengths squared a time unit.
        duration: Time of the last recorded field.
        record_interval: Time between recorded fields; divides ``duration``.
        forcing: The steady f: a function of x and y, a tensor of shape (nx, ny), or None.
        dt: Time step; divides ``record_interval``. None takes the largest with a CFL number of
            1 ("etdrk4"), 1/4 ("cn-heun") or 1/39 ("cn-euler": 1e-4 on 256 points) in a flow of
            speed max(|u| + |v|) = 1; 64 flows of each published FNO set peaked at 0.4 to 0.8.
        scheme: "etdrk4", fourth order, diffusion exact; or, with diffusion by Crank-Nicolson,
            "cn-heun", second order, or "cn-euler", the FNO recipe's own, first order.
        progress: Show a bar on stderr once it takes longer than a second; or a bar of the
            caller's, which advances by one a step.

    Returns:
        Fields at record_interval, 2 record_interval, ..., duration: (batch, time, nx, ny).

    Raises:
        ValueError: for an argument out of range, steps that do not divide, fields that are not
            finite, and a step too large for the flow; then it names the CFL number and another.

    Example:
        >>> x = torch.arange(16, dtype=torch.float64) / 16
        >>> wave = torch.cos(2 * math.pi * x).expand(1, 16, 16)
        >>> decayed = solve(wave, viscosity=0.01, duration=1.0, forcing=None)[:, 0]
        >>> torch.allclose(decayed, wave * math.exp(-0.01 * 4 * math.pi**2))
        True

    Source: Kassam and Trefethen (2005), Fourth-order time-stepping for stiff PDEs, section 2;
    Basdevant (1983), J. Comput. Phys. 50, for the four transforms; Li et al. (2021), appendix A.3.
    """
    if vorticity.ndim != 3 or min(vorticity.shape[1:]) < 4 or not len(vorticity):
        raise ValueError(
            f"`vorticity` has shape {tuple(vorticity.shape)}, expected (batch, nx, ny) with at "
            "least one field of at least 4 x 4 points."
        )
    if vorticity.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"`vorticity` has type {vorticity.dtype}, expected torch.float32 or torch.float64; "
            "convert it with `.float()` or `.double()`."
        )
    check_finite("vorticity", vorticity)
    check_positive("viscosity", viscosity, allow_zero=True)
    nx, ny = vorticity.shape[1:]
    records, steps = check_times(
        duration=duration,
        record_interval=record_interval,
        dt=dt,
        scheme=scheme,
        points=max(nx, ny),
    )
    dt = record_interval / steps
    flow = _Flow(forcing_field(forcing, nx, ny), viscosity, vorticity)
    step = (
        etdrk4(flow.diffusion, flow.tendency, flow.cast, dt)
        if scheme == "etdrk4"
        else _crank_nicolson(flow, dt, scheme)
    )
    state = rfft2(vorticity) * flow.kept
    cfl = dt * flow.speed(state)
    if not math.isfinite(cfl):
        raise ValueError(
            f"`vorticity` reaches {float(vorticity.abs().max()):.3g}, expected values whose "
            f"squares {vorticity.dtype} holds; scale the fields down."
        )
    if cfl >= _HOPELESS_CFL:
        raise _step_too_large(dt, cfl, 0.0, scheme, record_interval)
    fields = vorticity.new_empty(len(vorticity), records, nx, ny)
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
            before, cfl = cfl, dt * flow.speed(state)
            if not cfl < _HOPELESS_CFL:  # also for NaN
                raise _step_too_large(dt, before, record * record_interval, scheme, record_interval)
            fields[:, record] = flow.to_field(state)
    return fields


def check_times(
    *, duration: float, record_interval: float, dt: float | None, scheme: Scheme, points: int
) -> tuple[int, int]:
    """How many fields :func:`solve` records, and how many steps it takes for each.

    Args:
        duration: As in :func:`solve`.
        record_interval: As in :func:`solve`.
        dt: As in :func:`solve`; None is the scheme's default on this grid.
        scheme: As in :func:`solve`.
        points: Points along the grid's longer axis.

    Returns:
        Records, and steps a record.

    Raises:
        ValueError: for a time that is not positive or does not divide the longer one.

    Example:
        >>> check_times(duration=20.0, record_interval=1.0, dt=None, scheme="etdrk4", points=64)
        (20, 64)
    """
    check_choice("scheme", scheme, get_args(Scheme))
    check_positive("duration", duration)
    check_positive("record_interval", record_interval)
    records = _times_in("record_interval", record_interval, "duration", duration)
    if dt is None:
        return records, math.ceil(record_interval * points / _DEFAULT_CFL[scheme])
    check_positive("dt", dt)
    return records, _times_in("dt", dt, "record_interval", record_interval)


def forcing_field(forcing: Forcing, nx: int, ny: int) -> Float[Tensor, "nx ny"]:
    """The forcing's values on a grid, zeros for None.

    Args:
        forcing: As in :func:`solve`.
        nx: Points along x.
        ny: Points along y.

    Returns:
        Shape (nx, ny), float64, on the CPU.

    Raises:
        ValueError: for another shape than (nx, ny), and values that are not finite.

    Example:
        >>> forcing_field(fno_forcing, 4, 4)[0]
        tensor([ 0.1000,  0.1000, -0.1000, -0.1000], dtype=torch.float64)
    """
    if forcing is None:
        return torch.zeros(nx, ny, dtype=torch.float64)
    if not isinstance(forcing, Tensor):
        x = torch.arange(nx, dtype=torch.float64)[:, None] / nx
        y = torch.arange(ny, dtype=torch.float64)[None, :] / ny
        forcing = forcing(*torch.broadcast_tensors(x, y))
    check_shape("forcing", forcing.shape, (nx, ny), "one value a grid point")
    check_finite("forcing", forcing)
    return forcing.detach().to("cpu", torch.float64)


def _times_in(name: str, part: float, whole_name: str, whole: float) -> int:
    times = round(whole / part)
    if times < 1 or abs(times * part - whole) > 1e-9 * whole:
        raise ValueError(
            f"`{name}` is {part!r}, expected a divisor of `{whole_name}` {whole!r}; the next "
            f"smaller one is {whole / math.ceil(whole / part)!r}."
        )
    return times


def _step_too_large(
    dt: float, cfl: float, time: float, scheme: Scheme, record_interval: float
) -> ValueError:
    excess = max(2.0, cfl / _DEFAULT_CFL[scheme])
    smaller = record_interval / math.ceil(record_interval / dt * excess)
    return ValueError(
        f"`dt` is {dt:.6g}, expected a step for which the flow stays finite: it was lost after "
        f"t = {time:.6g}, where the CFL number dt max(|u| / dx + |v| / dy) was {cfl:.3g}; try "
        f"dt={smaller!r}."
    )


class _Flow:
    """One grid, one viscosity, one forcing: the terms of dw/dt in the half spectrum of `rfft2`."""

    def __init__(self, forcing: Tensor, viscosity: float, like: Tensor) -> None:
        nx, ny = self.shape = like.shape[1:]
        complex_type = torch.promote_types(like.dtype, torch.complex64)
        # Complex even where real, so that no step converts them again.
        self.cast: _Map = lambda x: x.to(like.device, complex_type)
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
        """Forcing minus advection: all of dw/dt but diffusion."""
        u, v = self.velocity(state)
        forced = torch.addcmul(self.forcing, self.of_uv, rfft2(u * v))
        return torch.addcmul(forced, self.of_squares, rfft2((v - u) * (v + u)))

    def speed(self, state: Tensor) -> float:
        """Grid points crossed in a unit of time, max(|u| / dx + |v| / dy)."""
        u, v = self.velocity(state.detach())
        return float((u.abs() * self.shape[0] + v.abs() * self.shape[1]).max())


def _crank_nicolson(flow: _Flow, dt: float, scheme: Scheme) -> _Map:
    z = flow.diffusion * dt / 2
    keep, gain = flow.cast((1 + z) / (1 - z)), flow.cast(dt / (1 - z))

    def step(state: Tensor) -> Tensor:
        kept, first = keep * state, flow.tendency(state)
        euler = torch.addcmul(kept, gain, first)
        if scheme == "cn-euler":
            return euler
        return torch.addcmul(kept, gain, (first + flow.tendency(euler)) / 2)

    return step
