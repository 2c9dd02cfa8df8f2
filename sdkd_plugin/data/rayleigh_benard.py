"""Trajectories of Rayleigh-Benard convection: a layer of fluid, heated below and cooled above.

Here live the random initial fields, the data set made of them, and Nusselt numbers. The equations,
their units and the solver are `boussinesq`'s; splitting into input and target frames, normalising
and batching are the caller's.
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
from sdkd_plugin.data.boussinesq import check_steps, solve
from sdkd_plugin.data.plate_modes import gauss_points

__all__ = [
    "Grid",
    "Surface",
    "gauss_points",
    "nusselt_number",
    "perturbed_conduction",
    "rayleigh_benard",
    "solve",
]

Grid: TypeAlias = Literal["uniform", "gauss"]
Surface: TypeAlias = Literal["volume", "bottom", "top"]

# Initial perturbations: waves down to a quarter of the plates' distance, along and across.
_WAVES = 4
# Heights, besides the plate's own, through which a polynomial gives the gradient at the plate.
_STENCIL = 6


def perturbed_conduction(
    n_samples: int,
    resolution: tuple[int, int],
    *,
    generator: torch.Generator | int,
    aspect_ratio: float = 2.0,
    amplitude: float = 0.05,
) -> Float[Tensor, "batch 3 nx nz"]:
    """Fluid at rest in which heat is conducted, and random waves of temperature over it.

        T = 1 - z + amplitude sqrt(2 / n) sum_km (a_km cos(2 pi k x / L) + b_km sin(2 pi k x / L))
            sin(pi m z)

    with independent standard normal a and b for the n pairs of k = 1 to 4 L and m = 1 to 4: the
    root mean square of the waves is ``amplitude``, on average, and they do not depend on the
    grid, as far as it carries them.

    Args:
        n_samples: How many fields.
        resolution: Points along x, at least 4, and across, at :func:`gauss_points`, at least 8.
        generator: A ``torch.Generator``, on whose device the fields are drawn, or a seed.
        aspect_ratio: Period L along x, in plate distances.
        amplitude: Root mean square of the waves, in temperature differences of the plates.

    Returns:
        Temperature and the two velocities, which are 0, as :func:`solve` takes them; float64.

    Raises:
        ValueError: for a count, a resolution, a length or an amplitude out of range.

    Example:
        >>> fields = perturbed_conduction(2, (32, 16), generator=0)
        >>> fields.shape, float(fields[:, 1:].abs().max())
        (torch.Size([2, 3, 32, 16]), 0.0)
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

    Units are `boussinesq`'s: plate distance, temperature difference, free-fall time. The lower
    plate has temperature 1, the upper one 0. Sample i has a generator of its own, so it depends on
    ``seed`` and i, but not on how many samples there are or how they are batched (but for
    round-off, which a chaotic flow enlarges with time).

    Args:
        n_samples: How many trajectories.
        rayleigh: Ra, above 0; convection sets in at 1707.762.
        prandtl: Pr = viscosity / diffusivity; air 0.7, water 7.
        aspect_ratio: Period along x, in plate distances.
        resolution: Points of the recorded fields along x, a divisor of the solver's, and across.
        solver_resolution: Points along x and across in the solver, see :func:`solve`. Fields
            carry wave numbers below a third of the first and polynomials of two thirds of the
            second. A free-fall time after the same developed flow, temperatures differ from those
            on 192 x 96 points by a relative 1e-4 at Ra 1e5 on 64 x 32 points, 4e-6 at Ra 1e6 and
            1e-3 at Ra 1e7 on 128 x 64 (Pr 1).
        spin_up: Time before the recorded part, in which convection sets in; a multiple of
            ``record_interval``.
        duration: Time from there to the last recorded field.
        record_interval: Time between recorded fields.
        initial_amplitude: As ``amplitude`` in :func:`perturbed_conduction`.
        velocity: Record the velocities along x and z too.
        dt: As in :func:`solve`.
        seed: At least 0.
        dtype: Precision of solver and result, torch.float32 or torch.float64; the initial fields
            are drawn in float64.
        device: Where the solver runs.
        batch_size: Trajectories solved at once: the more, the more memory; a GPU wants more.
        progress: Show a bar on stderr once it takes longer than a second.

    Returns:
        Shape (n_samples, duration / record_interval, channels, nx, nz), on the CPU, the channels
        temperature and, if wanted, the velocities along x and z. Point i along x is at
        i aspect_ratio / nx; point j across at (j + 1/2) / nz, from the hot plate to the cold one,
        where the cosine transform (``GridTransform(..., boundary="reflect")``) wants it. Values
        are those of the solver's waves and polynomials at these points.

    Raises:
        ValueError: as :func:`solve`, and for a resolution or a ``spin_up`` that does not divide.

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
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` is {dtype}, expected torch.float32 or torch.float64.")
    for points in resolution:
        check_positive_int("resolution", points)
    records, steps = check_steps(
        rayleigh=rayleigh,
        prandtl=prandtl,
        aspect_ratio=aspect_ratio,
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
    skipped = round(spin_up / record_interval)
    if abs(skipped * record_interval - spin_up) > 1e-9 * spin_up:
        raise ValueError(
            f"`spin_up` is {spin_up!r}, expected a multiple of `record_interval` "
            f"{record_interval!r}; the nearest one is {skipped * record_interval!r}."
        )
    # Hashed and then counted up, as in `navier_stokes`, so that no two seeds share samples.
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    heights = (np.arange(nz) + 0.5) / nz
    to_heights = _interpolation(solver_nz, heights).to(device, dtype)
    channels = 3 if velocity else 1
    fields = torch.empty(n_samples, records, channels, nx, nz, dtype=dtype)
    batches = range(0, n_samples, batch_size)
    with tqdm(
        total=len(batches) * (skipped + records) * steps,
        desc="Rayleigh-Benard",
        unit="step",
        delay=1,
        disable=not progress,
    ) as bar:
        for first in batches:
            samples = range(first, min(first + batch_size, n_samples))
            initial = [
                perturbed_conduction(
                    1,
                    solver_resolution,
                    generator=(start + i) % 2**32,
                    aspect_ratio=aspect_ratio,
                    amplitude=initial_amplitude,
                )
                for i in samples
            ]
            solved = solve(
                torch.cat(initial).to(device, dtype),
                rayleigh=rayleigh,
                prandtl=prandtl,
                aspect_ratio=aspect_ratio,
                duration=(skipped + records) * record_interval,
                record_interval=record_interval,
                dt=record_interval / steps,
                progress=bar,
            )
            coarse = solved[:, skipped:, :channels, :: solver_nx // nx]
            fields[samples.start : samples.stop] = coarse @ to_heights
    return fields


def nusselt_number(
    fields: Float[Tensor, "*batch channels nx nz"],
    *,
    rayleigh: float,
    prandtl: float = 1.0,
    through: Surface = "volume",
    grid: Grid = "uniform",
) -> Float[Tensor, "*batch"]:
    """The heat that passes the layer, as a multiple of what conduction alone would carry.

        volume: Nu = 1 + sqrt(Ra Pr) <w T>;    bottom, top: Nu = -<dT/dz> at that plate

    1 in fluid at rest. In a steady flow the three agree, in others their means over time do.

    Args:
        fields: Temperature and, for "volume", the velocities along x and z, in units of
            `boussinesq`: what :func:`rayleigh_benard` (with ``velocity=True``) or :func:`solve`
            returns.
        rayleigh: Ra of the flow.
        prandtl: Pr of the flow.
        through: Where the heat passes: averaged over the "volume", or at a plate, "bottom" or
            "top", where the gradient is that of a polynomial through the plate's temperature and
            the six nearest points.
        grid: Heights of the points: "uniform" as :func:`rayleigh_benard`, "gauss" as
            :func:`solve` returns them, which is far more accurate.

    Returns:
        One number a field.

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
            "them with `velocity=True`, or ask for the heat through 'bottom' or 'top', for which "
            "temperature will do."
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
        # Upside down and with the sign changed: warmth above cold is cold above warmth.
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
