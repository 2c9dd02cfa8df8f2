"""The point of least norm in a bounded convex hull: the quadratic programme behind AEKD."""

import itertools
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

MOST_VECTORS = 8
"""The active sets of n weights are almost 3^n."""


def min_norm_weights(gram: Float[Tensor, "n n"], bound: float, ridge: float) -> Float[Tensor, " n"]:
    """``argmin_a a^T (gram + ridge * mean(diagonal)) a`` with sum 1 and each in [0, bound].

    Solves the optimality conditions of every active set at once, and takes the best solution that
    keeps the bounds. A few hundred systems of n + 1 equations, and no branch on a value.
    """
    n = len(gram)
    mean_square = gram.trace() / n
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    matrix = gram / torch.where(mean_square > 0, mean_square, 1) + ridge * eye
    free, fixed_at = _active_sets(n, bound, gram.device)
    # Free weights: (G a)_i + multiplier = 0. The others stay where they are. All sum to 1.
    ones = torch.ones_like(free[:, :1])
    rows = torch.where(free[:, :, None] > 0, matrix, eye)
    kkt = torch.cat(
        [
            torch.cat([rows, free[:, :, None]], dim=2),
            torch.cat([torch.ones_like(free), 0 * ones], dim=1)[:, None],
        ],
        dim=1,
    )
    solution, _ = torch.linalg.solve_ex(kkt, torch.cat([fixed_at, ones], dim=1))
    weights = solution[:, :n]
    feasible = ((weights >= -1e-9) & (weights <= bound + 1e-9)).all(1)
    length = ((weights @ matrix) * weights).sum(1)
    best = torch.where(feasible, length, torch.inf).argmin(keepdim=True)
    chosen = weights.index_select(0, best)[0].clamp(0, bound)
    return torch.where(matrix.isfinite().all(), chosen, torch.nan)


@lru_cache(maxsize=32)
def _active_sets(n: int, bound: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each way in which weights can be free (1, else 0) or fixed, and where the fixed ones are.

    Kept on the device: a copy in every step would wait for it. One weight at least is free, be it
    to land on a bound, as in a corner of the feasible set.
    """
    sets = []
    for states in itertools.product(("free", "zero", "bound"), repeat=n):
        n_free, n_bound = states.count("free"), states.count("bound")
        if n_free and n_bound * bound <= 1 + 1e-9 and (n_bound + n_free) * bound >= 1 - 1e-9:
            sets.append(states)
    free = [[float(state == "free") for state in states] for states in sets]
    fixed_at = [[bound * (state == "bound") for state in states] for states in sets]
    both = torch.tensor([free, fixed_at], dtype=torch.float64).to(device)
    return both[0], both[1]
