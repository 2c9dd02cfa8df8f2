"""Trajectories of Rayleigh-Benard convection: a layer of fluid, heated below and cooled above.

Random initial fields, the data set made of them, and Nusselt numbers. The equations, their units
and the solver are in `boussinesq`.
"""

import math
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from torch import Tensor
from torch.fft import irfft
from tqdm import tqdm

from sdkd_plugin._checks import check_choice, check_finite, check_positive, check_positive_int
from sdkd_plugin.data.boussinesq import convection_times, solve
from sdkd_plugin.data.plate_modes import gauss_points
from sdkd_plugin.data.time_stepping import check_dtype, solve_samples, times_in

Grid: TypeAlias = Literal["uniform", "gauss"]
Surface: TypeAlias = Literal["volume", "bottom", "top"]

# Initial perturbations have waves down to a quarter of the plates' distance, along and across.
_WAVES = 4
# Points of the polynomial that gives the gradient at a plate, the plate itself not counted.
_STENCIL = 6


def perturbed_conduction(
    n_samples: int,
    resolution: tuple[int, int],
    *,
    generator: torch.Generator | int,
    aspect_ratio: float = 2.0,
    amplitude: float = 0.05,
) -> Float[Tensor, "batch 3 nx nz"]:
    """Fluid at rest that conducts heat, with random waves of temperature added; float64.

        T = 1 - z + amplitude sqrt(2 / n) sum_km (a_km cos(2 pi k x / L) + b_km sin(2 pi k x / L))
            sin(pi m z)

    with independent standard normal a and b for the n pairs of k = 1 to 4 L and m = 1 to 4, L the
    aspect ratio, on any grid as far as it carries them. ``generator`` may be a seed.
    """
    check_positive_int("n_samples", n_samples)
    nx, nz = resolution
    check_positive_int("nx", nx, 4)
    check_positive_int("nz", nz, 8)
    check_positive("aspect_ratio", aspect_ratio)
    check_positive("amplitude", amplitude, allow_zero=True)
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    device = generator.device
    waves = math.ceil(_WAVES * aspect_ratio)
    drawn = torch.randn(
        n_samples, waves, _WAVES, 2, dtype=torch.float64, device=device, generator=generator
    )
    z = gauss_points(nz)[0].to(device)
    m = torch.arange(1, _WAVES + 1, dtype=torch.float64, device=device)
    across = torch.view_as_complex(drawn) @ torch.sin(math.pi * m[:, None] * z).to(torch.complex128)
    spectrum = across.new_zeros(n_samples, nx // 2 + 1, nz)
    carried = min(waves, (nx - 1) // 2)
    # A cosine's coefficient is half its amplitude, sqrt(2 / n) / 2.
    spectrum[:, 1 : carried + 1] = across[:, :carried] / math.sqrt(2 * waves * _WAVES)
    fields = torch.zeros(n_samples, 3, nx, nz, dtype=torch.float64, device=device)
    fields[:, 0] = 1 - z + amplitude * irfft(spectrum, n=nx, dim=1, norm="forward")
    return fields


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
    initial_amplitude: float = 0.05,
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
    ``seed`` and i, and not on the number of samples or the batch size up to rounding, which a
    chaotic flow enlarges with time.

    Args:
        n_samples: number of trajectories.
        rayleigh: Ra, above 0; convection sets in at 1707.762.
        prandtl: Pr = viscosity / diffusivity; air 0.7, water 7.
        aspect_ratio: period along x, in plate distances.
        resolution: points of the recorded fields along x, a divisor of the solver's, and across.
        solver_resolution: points along x and across in the solver. A free-fall time after the same
            developed flow, temperatures differ from those on 192 x 96 points by a relative 1e-4
            at Ra 1e5 on 64 x 32 points, 4e-6 at Ra 1e6 and 1e-3 at Ra 1e7 on 128 x 64 (Pr 1).
        spin_up: time before the recorded part, a multiple of ``record_interval``.
        duration: time from there to the last recorded field.
        record_interval: time between recorded fields.
        initial_amplitude: root mean square of the initial waves, in temperature differences.
        velocity: record the velocities along x and z too.
        dt: the solver's time step; None for a CFL number of 1 at the free-fall speed.
        seed: at least 0.
        dtype: precision of solver and result, torch.float32 or torch.float64.
        device: where the solver runs.
        batch_size: trajectories solved at once; more need more memory and suit a GPU.
        progress: show a bar on a terminal after a second.

    Returns:
        Temperature and, if wanted, the velocities along x and z, on the CPU. Point i along x is at
        i aspect_ratio / nx, point j across at (j + 1/2) / nz from the hot plate, as
        ``GridTransform(..., boundary="reflect")`` needs it.

    Raises:
        ValueError: for an argument out of range, times or a resolution that do not divide, and a
            step too large for the flow.

    Example:
        >>> settings = dict(rayleigh=1e4, resolution=(16, 8), solver_resolution=(16, 12))
        >>> rayleigh_benard(2, **settings, spin_up=0.0, duration=2.0, velocity=True).shape
        torch.Size([2, 2, 3, 16, 8])
    """
    check_positive_int("n_samples", n_samples)
    check_positive_int("batch_size", batch_size)
    check_positive_int("seed", seed, 0)
    check_positive("initial_amplitude", initial_amplitude, allow_zero=True)
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
    waves = {"aspect_ratio": aspect_ratio, "amplitude": initial_amplitude}

    def solve_batch(seeds: list[int], bar: tqdm) -> Tensor:
        initial = [perturbed_conduction(1, solver_resolution, generator=i, **waves) for i in seeds]
        solved = solve(
            torch.cat(initial).to(device, dtype),
            **flow,
            duration=records * record_interval,
            record_interval=record_interval,
            dt=times.dt,
            progress=bar,
        )
        return solved[:, skipped:, :channels, :: solver_nx // nx] @ to_heights

    steps = records * times.steps
    return solve_samples(
        n_samples, batch_size, seed, solve_batch, steps, "Rayleigh-Benard", progress
    )


def nusselt_number(
    fields: Float[Tensor, "*batch channels nx nz"],
    *,
    rayleigh: float,
    prandtl: float = 1.0,
    through: Surface = "volume",
    grid: Grid = "uniform",
) -> Float[Tensor, "*batch"]:
    """The heat that passes the layer, as a multiple of the heat that conduction alone carries.

        volume: Nu = 1 + sqrt(Ra Pr) <w T>;    bottom, top: Nu = -<dT/dz> at that plate

    The three agree in a steady flow, and in others their means over time.

    Args:
        fields: temperature and, for "volume", the velocities along x and z.
        rayleigh: Ra of the flow.
        prandtl: Pr of the flow.
        through: "volume" averages over the layer; "bottom" and "top" take the gradient at a plate,
            of a polynomial through the plate's temperature and the six nearest points.
        grid: heights of the points: "uniform" as :func:`rayleigh_benard` returns them, or the
            solver's own, "gauss", which is far more accurate.

    Raises:
        ValueError: for an unknown option, a missing velocity, and values that are not finite.

    Example:
        >>> conduction = perturbed_conduction(1, (16, 8), generator=0, amplitude=0.0)
        >>> bottom = nusselt_number(conduction, rayleigh=1e4, through="bottom", grid="gauss")
        >>> round(float(bottom), 10)
        1.0

    Source: Ahlers, Grossmann and Lohse (2009), Rev. Mod. Phys. 81, 503, section II.
    """
    check_choice("through", through, get_args(Surface))
    check_choice("grid", grid, get_args(Grid))
    check_positive("rayleigh", rayleigh)
    check_positive("prandtl", prandtl)
    channels, _, nz = fields.shape[-3:]
    if channels not in (1, 3) or (through == "volume" and channels != 3):
        raise ValueError(
            f"`fields` has {channels} channels, expected temperature and two velocities; record "
            "them with `velocity=True`, or take `through='bottom'` or 'top', which need only "
            "temperature."
        )
    check_finite("fields", fields)
    z, weights = gauss_points(nz)
    if grid == "uniform":
        z = (torch.arange(nz, dtype=torch.float64) + 0.5) / nz
        weights = torch.full_like(z, 1 / nz)
    temperature = fields[..., 0, :, :]
    if through == "volume":
        flux = (fields[..., 2, :, :] * temperature).mean(-2) @ weights.to(fields)
        return 1 + math.sqrt(rayleigh * prandtl) * flux
    profile = temperature.mean(-2)
    if through == "top":
        # Turned upside down, with the temperatures of the plates exchanged.
        profile = 1 - profile.flip(-1)
    points = min(_STENCIL, nz)
    return (1 - profile[..., :points]) @ _slope_weights(z[:points]).to(fields)


def _slope_weights(z: Tensor) -> Tensor:
    """Weights of f(z_1), ..., f(z_n) in f'(0) for polynomials f of degree n with f(0) = 0."""
    scaled = z / z[-1]
    powers = scaled[None, :] ** torch.arange(1, len(z) + 1)[:, None]
    first = torch.eye(len(z), dtype=torch.float64)[0]
    return torch.linalg.solve(powers, first) / z[-1]


def _interpolation(nz: int, heights: np.ndarray) -> Tensor:
    """The matrix (nz, heights) from values at the Gauss points to their polynomial's elsewhere."""
    x, weights = legendre.leggauss(nz)
    norms = (2 * np.arange(nz) + 1) / 2
    analysis = legendre.legvander(x, nz - 1) * weights[:, None] * norms
    return torch.from_numpy(analysis @ legendre.legvander(2 * heights - 1, nz - 1).T)
