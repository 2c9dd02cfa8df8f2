"""Trajectories of Rayleigh-Benard convection: a layer of fluid, heated below and cooled above.

The equations, their units and the solver are in `boussinesq`.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from torch import Tensor
from torch.fft import irfft
from tqdm import tqdm

from sdkd_plugin._checks import check_positive, check_positive_int, check_seed, check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.data.boussinesq import convection_times, solve
from sdkd_plugin.data.plate_modes import gauss_points
from sdkd_plugin.data.time_stepping import check_dtype, solve_samples, times_in

# Initial perturbations: root mean square, and waves down to a quarter of the plates' distance.
_AMPLITUDE, _WAVES = 0.05, 4


def perturbed_conduction(
    resolution: tuple[int, int], *, seed: int, aspect_ratio: float = 2.0
) -> Float[Tensor, "1 3 nx nz"]:
    """Fluid at rest that conducts heat, with random waves of temperature added; float64.

        T = 1 - z + 0.05 sqrt(2 / n) sum_km (a_km cos(2 pi k x / L) + b_km sin(2 pi k x / L))
            sin(pi m z)

    with independent standard normal a and b for the n pairs of k = 1 to 4 L and m = 1 to 4, L the
    aspect ratio, on any grid as far as it carries them.
    """
    nx, nz = resolution
    generator = torch.Generator().manual_seed(seed)
    waves = math.ceil(_WAVES * aspect_ratio)
    drawn = torch.randn(1, waves, _WAVES, 2, dtype=torch.float64, generator=generator)
    z, _ = gauss_points(nz)
    m = torch.arange(1, _WAVES + 1, dtype=torch.float64)
    across = torch.view_as_complex(drawn) @ torch.sin(math.pi * m[:, None] * z).to(torch.complex128)
    spectrum = across.new_zeros(1, nx // 2 + 1, nz)
    carried = min(waves, (nx - 1) // 2)
    # A cosine's coefficient is half its amplitude, sqrt(2 / n) / 2.
    spectrum[:, 1 : carried + 1] = across[:, :carried] / math.sqrt(2 * waves * _WAVES)
    fields = torch.zeros(1, 3, nx, nz, dtype=torch.float64)
    fields[:, 0] = 1 - z + _AMPLITUDE * irfft(spectrum, n=nx, dim=1, norm="forward")
    return fields


@explained
def rayleigh_benard(
    n_samples: int,
    *,
    rayleigh: float = 1e6,
    prandtl: float = 1.0,
    aspect_ratio: float = 2.0,
    resolution: tuple[int, int] = (64, 32),
    solver_resolution: tuple[int, int] = (128, 64),
    spin_up: float = 20.0,
    duration: float = 20.0,
    record_interval: float = 1.0,
    velocity: bool = False,
    dt: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    progress: bool = True,
) -> Float[Tensor, "n_samples time channels nx nz"]:
    """Trajectories of two-dimensional convection between no-slip plates of fixed temperatures.

    Units are plate distance, temperature difference and free-fall time. Sample i depends on
    ``seed`` and i, and up to rounding, which a chaotic flow enlarges, on nothing else.

    Args:
        n_samples: number of trajectories.
        rayleigh: Ra, above 0; convection sets in at 1707.762.
        prandtl: Pr = viscosity / diffusivity; air 0.7, water 7.
        aspect_ratio: period along x, in plate distances.
        resolution: points of the recorded fields along x, a divisor of the solver's, and across.
        solver_resolution: points along x and across in the solver. In a free-fall time the error
            of the temperature grows to a relative 1e-4 at Ra 1e5 on 64 x 32 points, 4e-6 at Ra 1e6
            and 1e-3 at Ra 1e7 on 128 x 64 (Pr 1).
        spin_up: time before the recorded part, a multiple of ``record_interval``.
        duration: time from there to the last recorded field.
        record_interval: time between recorded fields.
        velocity: record the velocities along x and z too.
        dt: the solver's time step; None for a CFL number of 1 at the free-fall speed.
        seed: at least 0.
        dtype: precision of solver and result, torch.float32 or torch.float64.
        device: where the solver runs.
        batch_size: trajectories solved at once.
        progress: show a bar on a terminal after a second.

    Returns:
        Temperature and, if wanted, the velocities, on the CPU, at points i aspect_ratio / nx along
        x and (j + 1/2) / nz from the hot plate, as ``GridTransform(..., "reflect")`` needs them.

    Raises:
        ValueError: for an argument out of range and a step too large for the flow.

    Example:
        >>> settings = dict(rayleigh=1e4, resolution=(16, 8), solver_resolution=(16, 12))
        >>> rayleigh_benard(2, **settings, spin_up=0.0, duration=2.0, velocity=True).shape
        torch.Size([2, 2, 3, 16, 8])
    """
    check_sizes(n_samples=n_samples, batch_size=batch_size)
    check_seed(seed)
    check_positive("spin_up", spin_up, allow_zero=True)
    check_dtype("dtype", dtype)
    for points in resolution:
        check_positive_int("resolution", points)
    flow = {"rayleigh": rayleigh, "prandtl": prandtl, "aspect_ratio": aspect_ratio}
    times = convection_times(
        **flow,
        resolution=solver_resolution,
        duration=duration,
        record_interval=record_interval,
        dt=dt,
    )
    (nx, nz), (solver_nx, solver_nz) = resolution, solver_resolution
    if solver_nx % nx:
        raise ValueError(
            f"`resolution` has {nx} points along x, expected a divisor of those of "
            f"`solver_resolution`, {solver_nx}."
        )
    skipped = times_in("record_interval", record_interval, "spin_up", spin_up) if spin_up else 0
    records = skipped + times.records
    heights = (np.arange(nz) + 0.5) / nz
    to_heights = _interpolation(solver_nz, heights).to(device, dtype)
    channels = 3 if velocity else 1

    def solve_batch(seeds: list[int], bar: tqdm) -> Tensor:
        initial = [
            perturbed_conduction(solver_resolution, seed=i, aspect_ratio=aspect_ratio)
            for i in seeds
        ]
        solved = solve(
            torch.cat(initial).to(device, dtype),
            **flow,
            duration=records * record_interval,
            record_interval=record_interval,
            dt=times.dt,
            bar=bar,
        )
        return solved[:, skipped:, :channels, :: solver_nx // nx] @ to_heights

    steps = records * times.steps
    return solve_samples(n_samples, batch_size, seed, solve_batch, steps, progress)


def _interpolation(nz: int, heights: np.ndarray) -> Tensor:
    """The matrix (nz, heights) from values at the Gauss points to their polynomial's elsewhere."""
    x, weights = legendre.leggauss(nz)
    norms = (2 * np.arange(nz) + 1) / 2
    analysis = legendre.legvander(x, nz - 1) * weights[:, None] * norms
    return torch.from_numpy(analysis @ legendre.legvander(2 * heights - 1, nz - 1).T)
