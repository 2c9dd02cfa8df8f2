"""The time step of fourth order that both solvers take."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def etdrk4(diffusion: Tensor, tendency: Map, cast: Map, dt: float) -> Map:
    """The map from a state to the state one step later, of ``du/dt = diffusion u + tendency(u)``.

    Diffusion is exact; the tendency is explicit, in four stages. ``cast`` brings real factors to
    the state's dtype and device.

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
