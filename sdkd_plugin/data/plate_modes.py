"""Between two plates: points, and the modes in which viscosity and conduction act one by one.

Here live the Gauss points, Stokes modes and heat modes, all made of polynomials. What the modes do
together is `boussinesq`'s.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from torch import Tensor

from sdkd_plugin._checks import check_positive_int


def gauss_points(n: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The solver's points between the plates, of the Gauss-Legendre rule, and their weights.

        integral_0^1 f(z) dz = sum_j weights_j f(z_j)    for polynomials f of degree below 2 n

    Args:
        n: Points.

    Returns:
        Heights z from 0 to 1, rising, neither plate among them; and weights. Both float64.

    Raises:
        ValueError: for fewer than one point.

    Example:
        >>> z, weights = gauss_points(8)
        >>> round(float(weights @ z**15), 12)
        0.0625

    Source: Trefethen (2008), Is Gauss quadrature better than Clenshaw-Curtis?, SIAM Review 50.
    """
    check_positive_int("n", n)
    x, weights = legendre.leggauss(n)
    return torch.from_numpy((1 + x) / 2), torch.from_numpy(weights / 2)


class HeatModes(NamedTuple):
    """Functions of z at the Gauss points, and the rates at which they decay.

    Attributes:
        value: the functions f(z), of shape ``(mode, nz)``.
        slope: df/dz.
        rate: eigenvalues of minus the second derivative, of shape ``(mode,)``.
    """

    value: Tensor
    slope: Tensor
    rate: Tensor


class StokesModes(NamedTuple):
    """Functions of z at the Gauss points for each wave number, and the rates at which they decay.

    Attributes:
        value: stream functions f(z), of shape ``(wave number, mode, nz)``.
        slope: df/dz, the velocity along x.
        vorticity: k^2 f - d^2f/dz^2.
        rate: eigenvalues of the Stokes operator, of shape ``(wave number, mode)``.
    """

    value: Tensor
    slope: Tensor
    vorticity: Tensor
    rate: Tensor


def stokes_modes(k: Float[Tensor, " nk"], nz: int) -> StokesModes:
    """How a viscous fluid between two plates comes to rest, for each wave number along x.

    A mode is a stream function f(z) exp(i k x), that is, a flow u = f', w = -i k f, with f = f' = 0
    on both plates, except that where k = 0 there may be a net flux, f(1) - f(0). With the mean
    over the layer as inner product, modes are orthonormal, and

        rate = mean of |grad u|^2 + |grad w|^2 over the mean of |u|^2 + |w|^2

    Args:
        k: Wave numbers, the first one 0, the others above 0; float64, on the CPU.
        nz: Gauss points, at least 8. Functions are polynomials of degree up to two thirds of it.

    Returns:
        Functions of shape (wave number, mode, nz), the slow ones first; but for k = 0 the first is
        zero, since a net flux is no flow of such a wave number.

    Raises:
        ValueError: for fewer than 8 points.

    Example:
        >>> slow = stokes_modes(torch.tensor([0.0, 2.0], dtype=torch.float64), 16).rate[0, :2]
        >>> torch.allclose(slow.sqrt() / torch.pi, torch.tensor([1.0, 2.0], dtype=torch.float64))
        True

    Source: Shen (1994), Efficient spectral-Galerkin method I, SIAM J. Sci. Comput. 15, for the
    basis.
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
    # Without the first polynomial, the one with a net flux.
    combinations[1:, 1:, 1:], rate[1:, 1:] = _eigenmodes(
        energy[1:, 1:, 1:], dissipation[1:, 1:, 1:]
    )
    value, slope, curvature = (combinations @ f for f in (value, slope, curvature))
    return StokesModes(value, slope, k2 * value - curvature, rate)


def heat_modes(nz: int) -> HeatModes:
    """How temperature between two plates evens out: f = 0 on both, f'' = -rate f, orthonormal.

    These are sin(m pi z) as far as polynomials have them. Unlike the sines they span all
    polynomials that vanish on the plates, so that expansions converge faster than any power. A
    wave number k along x adds k^2 to all rates.

    Args:
        nz: Gauss points, at least 8. Functions are polynomials of degree up to two thirds of it.

    Returns:
        Functions of shape (mode, nz), the slow ones first, as many as Stokes modes.

    Raises:
        ValueError: for fewer than 8 points.

    Example:
        >>> z, _ = gauss_points(24)
        >>> first = heat_modes(24).value[0]
        >>> sine = 2**0.5 * torch.sin(torch.pi * z)
        >>> torch.allclose(first * first[0].sign(), sine)
        True

    Source: Shen (1994), Efficient spectral-Galerkin method I, SIAM J. Sci. Comput. 15.
    """
    slope, value, _ = _polynomials(nz)
    _, weights = gauss_points(nz)
    identity = torch.eye(len(value), dtype=torch.float64)
    combinations, rate = _eigenmodes(value * weights @ value.mT, identity)
    return HeatModes(combinations @ value, combinations @ slope, rate)


def _polynomials(nz: int) -> list[Tensor]:
    """L_j, its first and its second integral from z = 0, for j = 1 to n, at the Gauss points.

    L_j are the Legendre polynomials, orthonormal over 0 < z < 1. First integrals vanish on both
    plates. So do second ones and their slopes, but for j = 1: that is the one with a net flux.
    """
    check_positive_int("nz", nz, 8)
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
    # By the dissipation's factor and not the energy's: it is nearly the identity, and the slow
    # modes, which carry the flow, come out to rounding.
    factor = torch.linalg.cholesky(dissipation)
    half = torch.linalg.solve_triangular(factor, energy, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    inverse_rate, vectors = torch.linalg.eigh((whole + whole.mT) / 2)
    inverse_rate, vectors = inverse_rate.flip(-1), vectors.flip(-1)
    combinations = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    return (combinations / inverse_rate.sqrt()[..., None, :]).mT, 1 / inverse_rate
