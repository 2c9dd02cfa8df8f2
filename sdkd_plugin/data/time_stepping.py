"""What the two solvers share: recorded times, bars, and batches of samples.

The equations are in `vorticity` and `boussinesq`.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdkd_plugin._checks import check_positive
from sdkd_plugin.data.etdrk4 import Map

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


def steps_bar(total: int, description: str, progress: bool | tqdm) -> Any:
    """A bar on stderr after a second; none where stderr is no terminal; or the caller's own."""
    if isinstance(progress, tqdm):
        return nullcontext(progress)
    disable = None if progress else True
    return tqdm(total=total, desc=description, unit="step", delay=1, disable=disable)


def integrate(
    state: Tensor,
    step: Map,
    observe: Callable[[Tensor], tuple[Tensor, float]],
    times: Times,
    progress: bool | tqdm,
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
    with steps_bar(times.records * times.steps, "solving", progress) as bar:
        for record in range(times.records):
            for _ in range(times.steps):
                state = step(state)
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
    description: str,
    progress: bool,
) -> Tensor:
    """Trajectories of all samples, ``(n_samples, ...)`` on the CPU, a batch at a time.

    ``solve`` takes the seeds of a batch's samples and a bar, which it advances by ``steps``. The
    first seed is a hash of ``seed``, so that no two data sets share samples; the others count up,
    because hashes might collide: PyTorch's CPU generator uses 32 bits of a seed.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    seeds = [(start + i) % 2**32 for i in range(n_samples)]
    batches = range(0, n_samples, batch_size)
    fields = torch.empty(0)
    with steps_bar(len(batches) * steps, description, progress) as bar:
        for first in batches:
            solved = solve(seeds[first : first + batch_size], bar)
            if not first:
                fields = solved.new_empty(n_samples, *solved.shape[1:], device="cpu")
            fields[first : first + batch_size] = solved
    return fields
