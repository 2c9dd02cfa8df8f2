"""What the two solvers share: recorded times, the time step, and batches of samples."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdkd_plugin._checks import check_positive

Map = Callable[[Tensor], Tensor]

# A solver gives up at this CFL number, three times the limit of Runge-Kutta's stability.
_MAX_CFL = 4.0


class Times(NamedTuple):
    """What a solver records, ``interval`` apart, in how many steps, and the default's number."""

    records: int
    steps: int
    interval: float
    default_steps: int
    default_cfl: float

    @property
    def dt(self) -> float:
        """The time step."""
        return self.interval / self.steps


def check_times(
    duration: float, record_interval: float, dt: float | None, points: int, cfl: float = 1.0
) -> Times:
    """Count records and steps; the default step has CFL number ``cfl`` on ``points`` a length."""
    check_positive("duration", duration)
    check_positive("record_interval", record_interval)
    records = times_in("record_interval", record_interval, "duration", duration)
    default = steps = math.ceil(record_interval * points / cfl)
    if dt is not None:
        check_positive("dt", dt)
        steps = times_in("dt", dt, "record_interval", record_interval)
    return Times(records, steps, record_interval, default, cfl)


def times_in(name: str, part: float, whole_name: str, whole: float) -> int:
    """How often one time goes into another, which it must divide."""
    times = round(whole / part)
    if times < 1 or abs(times * part - whole) > 1e-9 * whole:
        raise ValueError(
            f"`{name}` is {part!r}, expected a divisor of `{whole_name}` {whole!r}; the next "
            f"smaller one is {whole / math.ceil(whole / part)!r}."
        )
    return times


def check_dtype(argument: str, dtype: torch.dtype) -> None:
    """Refuse any type but the two that the solvers compute in."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`{argument}` is {dtype}, expected torch.float32 or torch.float64.")


def etdrk4(diffusion: Tensor, tendency: Map, cast: Map, dt: float) -> Map:
    """The map from a state to the state one step later, of ``du/dt = diffusion u + tendency(u)``.

    Diffusion is exact. ``cast`` brings real factors to the state's dtype and device.

    Source: Cox and Matthews 2002; the coefficients as in Kassam and Trefethen 2005.
    """
    z = diffusion * dt
    q, f1, f2, f3 = (cast(dt * c) for c in etdrk4_coefficients(z))
    whole, half = cast(torch.exp(z)), cast(torch.exp(z / 2))

    def step(state: Tensor) -> Tensor:
        halfway = half * state
        n0 = tendency(state)
        a = torch.addcmul(halfway, q, n0)
        na = tendency(a)
        nb = tendency(torch.addcmul(halfway, q, na))
        nc = tendency(torch.addcmul(half * a, q, 2 * nb - n0))
        after = torch.addcmul(whole * state, f1, n0)
        return torch.addcmul(torch.addcmul(after, f2, na + nb), f3, nc)

    return step


def etdrk4_coefficients(z: Tensor) -> list[Tensor]:
    """Weights of the half step and of the first, both middle and the last stage, for real z.

    Each is the mean of its formula over the unit circle around z, because at small z the
    numerators cancel. By symmetry the real part over the upper half circle suffices.
    """
    points = 32
    sums = [torch.zeros_like(z) for _ in range(4)]
    for i in range(points):
        angle = math.pi * (i + 0.5) / points
        r = z + complex(math.cos(angle), math.sin(angle))
        e = torch.exp(r)
        formulas = (
            (torch.exp(r / 2) - 1) / r,
            (-4 - r + e * (4 - 3 * r + r**2)) / r**3,
            2 * (2 + r + e * (r - 2)) / r**3,
            (-4 - 3 * r - r**2 + e * (4 - r)) / r**3,
        )
        sums = [total + value.real / points for total, value in zip(sums, formulas, strict=True)]
    return sums


def integrate(
    state: Tensor,
    step: Map,
    observe: Callable[[Tensor], tuple[Tensor, float]],
    times: Times,
    bar: tqdm | None,
) -> Tensor:
    """The recorded fields, ``(batch, time, ...)``, and a ValueError if the flow is lost.

    ``observe`` gives a state's fields, ``(batch, ...)``, and its speed: how many grid points the
    flow crosses in a unit of time, max(sum_i |u_i| / dx_i).
    """

    def too_large(cfl: float, time: float) -> ValueError:
        # At least the default's steps: a flow that starts from rest has no CFL number to go by.
        more = math.ceil(times.steps * max(2.0, cfl / times.default_cfl))
        smaller = times.interval / max(times.default_steps, more)
        return ValueError(
            f"`dt` is {times.dt:.6g}, expected a step for which the flow stays finite: it was lost "
            f"after t = {time:.6g}, where the CFL number dt max(sum_i |u_i| / dx_i) was {cfl:.3g}; "
            f"try dt={smaller!r}."
        )

    fields, speed = observe(state)
    if not math.isfinite(speed):
        raise ValueError(
            f"the initial flow has speed {speed}, expected values whose squares {fields.dtype} "
            "holds; scale the fields down."
        )
    cfl = times.dt * speed
    if not cfl < _MAX_CFL:
        raise too_large(cfl, 0.0)
    recorded = fields.new_empty(len(fields), times.records, *fields.shape[1:])
    for record in range(times.records):
        for _ in range(times.steps):
            state = step(state)
            if bar is not None:
                bar.update()
        fields, speed = observe(state)
        before, cfl = cfl, times.dt * speed
        if not cfl < _MAX_CFL:  # also for NaN
            raise too_large(before, record * times.interval)
        recorded[:, record] = fields
    return recorded


def solve_samples(
    n_samples: int,
    batch_size: int,
    seed: int,
    solve: Callable[[list[int], tqdm], Tensor],
    steps: int,
    progress: bool,
) -> Tensor:
    """Trajectories of all samples, ``(n_samples, ...)`` on the CPU, a batch at a time.

    ``solve`` takes the seeds of a batch's samples and a bar, which it advances by ``steps``. The
    first seed is a hash of ``seed``, so that data sets share no samples; the others count up.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    seeds = [(start + i) % 2**32 for i in range(n_samples)]
    batches = range(0, n_samples, batch_size)
    fields = torch.empty(0)
    disable = None if progress else True  # None: where stderr is no terminal
    with tqdm(
        total=len(batches) * steps, desc="solving", unit="step", delay=1, disable=disable
    ) as bar:
        for first in batches:
            solved = solve(seeds[first : first + batch_size], bar)
            if not first:
                fields = solved.new_empty(n_samples, *solved.shape[1:], device="cpu")
            fields[first : first + batch_size] = solved
    return fields
