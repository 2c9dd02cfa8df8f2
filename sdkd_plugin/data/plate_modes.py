"""Between two plates: the Gauss points, and the modes of viscosity and of heat conduction."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from torch import Tensor


def gauss_points(n: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Heights z between 0 and 1, ascending, and weights of the Gauss-Legendre rule; float64.

    integral_0^1 f(z) dz = sum_j weights_j f(z_j)    for polynomials f of degree below 2 n
    """
    x, weights = legendre.leggauss(n)
    return torch.from_numpy((1 + x) / 2), torch.from_numpy(weights / 2)


class HeatModes(NamedTuple):
    """Heat modes f(z) at the Gauss points, their slopes, and their rates -f'' / f."""

    value: Float[Tensor, "mode nz"]
    slope: Float[Tensor, "mode nz"]
    rate: Float[Tensor, " mode"]


class StokesModes(NamedTuple):
    """Stream functions f(z) at the Gauss points for each wave number k, and their decay rates.

    ``slope`` is df/dz, the velocity along x; ``vorticity`` is k^2 f - d^2f/dz^2.
    """

    value: Float[Tensor, "nk mode nz"]
    slope: Float[Tensor, "nk mode nz"]
    vorticity: Float[Tensor, "nk mode nz"]
    rate: Float[Tensor, "nk mode"]


def stokes_modes(k: Float[Tensor, " nk"], nz: int) -> StokesModes:
    """The modes in which a viscous fluid between two plates comes to rest, slow ones first.

    A mode is a stream function f(z) exp(i k x), a flow u = f', w = -i k f, with f = f' = 0 on both
    plates, except that at k = 0, the first of the wave numbers, there may be a net flux, f(1) -
    f(0); for other k the first mode is zero in its place. Modes are polynomials of degree up to two
    thirds of the ``nz`` Gauss points, orthonormal in the mean over the layer, with

        rate = mean of |grad u|^2 + |grad w|^2 over the mean of |u|^2 + |w|^2

    Source: Shen (1994), Efficient spectral-Galerkin method I, SIAM J. Sci. Comput. 15.
    """
    curvature, slope, value = _polynomials(nz)
    _, weights = gauss_points(nz)
    flat, steep = (f * weights @ f.mT for f in (value, slope))
    k2 = k[:, None, None] ** 2
    energy = steep + k2 * flat
    dissipation = torch.eye(len(value), dtype=torch.float64) + 2 * k2 * steep + k2**2 * flat
    combinations = torch.zeros_like(energy)
    rate = torch.ones_like(energy[..., 0])
    combinations[0], rate[0] = _eigenmodes(energy[0], dissipation[0])
    # Without the first polynomial, which has a net flux.
    combinations[1:, 1:, 1:], rate[1:, 1:] = _eigenmodes(
        energy[1:, 1:, 1:], dissipation[1:, 1:, 1:]
    )
    value, slope, curvature = (combinations @ f for f in (value, slope, curvature))
    return StokesModes(value, slope, k2 * value - curvature, rate)


def heat_modes(nz: int) -> HeatModes:
    """The modes in which temperature evens out: f = 0 on both plates, f'' = -rate f, orthonormal.

    They approximate sin(m pi z), slow ones first, as many as `stokes_modes`, and span all
    polynomials that vanish on the plates. A wave number k along x adds k^2 to all rates.
    """
    slope, value, _ = _polynomials(nz)
    _, weights = gauss_points(nz)
    identity = torch.eye(len(value), dtype=torch.float64)
    combinations, rate = _eigenmodes(value * weights @ value.mT, identity)
    return HeatModes(combinations @ value, combinations @ slope, rate)


def _polynomials(nz: int) -> list[Tensor]:
    """L_j, its first and its second integral from z = 0, for j = 1 to n, at the Gauss points.

    L_j are the Legendre polynomials, orthonormal over 0 < z < 1. First integrals vanish on both
    plates; second ones and their slopes too, except for j = 1, which has a net flux.
    """
    # The highest product, of w, T and a mode's slope, is of degree 3 n + 3: below 2 nz.
    n = (2 * nz - 4) // 3
    coefficients = np.diag(np.sqrt(2 * np.arange(n + 1) + 1))[:, 1:]
    x, _ = legendre.leggauss(nz)
    return [
        torch.from_numpy(
            legendre.legval(x, legendre.legint(coefficients, m=times, lbnd=-1, scl=0.5))
        )
        for times in range(3)
    ]


def _eigenmodes(energy: Tensor, dissipation: Tensor) -> tuple[Tensor, Tensor]:
    """Combinations v, as rows, with dissipation v = rate energy v and v . energy v = 1; rates."""
    # The dissipation is nearly the identity: with its factor the slow modes are exact to rounding.
    factor = torch.linalg.cholesky(dissipation)
    half = torch.linalg.solve_triangular(factor, energy, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    inverse_rate, vectors = torch.linalg.eigh((whole + whole.mT) / 2)
    inverse_rate, vectors = inverse_rate.flip(-1), vectors.flip(-1)
    combinations = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    return (combinations / inverse_rate.sqrt()[..., None, :]).mT, 1 / inverse_rate
