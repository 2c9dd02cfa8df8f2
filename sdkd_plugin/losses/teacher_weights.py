"""Weights of several teachers, and the target that weighted teachers make.

For a loss that is quadratic in the student, as the frequency-aligned loss and the MSE are,
averaging the teachers first gives the same gradient as averaging their losses: with weights w_m
that sum to 1 and ``t = sum_m w_m t_m``,

    sum_m w_m <s - t_m, g(L) (s - t_m)>
        = <s - t, g(L) (s - t)> + sum_m w_m <t_m - t, g(L) (t_m - t)>

and the last term does not depend on the student.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_shape, check_within
from sdkd_plugin._explained import explained
from sdkd_plugin.losses.task import sample_errors
from sdkd_plugin.spectral.transform import working_dtype

AggregationName = Literal["mean", "aekd", "camkd"]
MAX_TEACHERS = 8
"""Of AEKD: its exact solution visits almost 3^n cases."""


def teacher_gradients(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: Float[Tensor, "batch ..."],
    teachers: Float[Tensor, "n_teachers batch ..."],
) -> Float[Tensor, "n_teachers batch ..."]:
    """Gradient of each teacher's scalar loss with respect to the student's forecast.

    It costs one forward and one backward of the loss for each teacher; the student's own graph is
    not used. It runs in float32 (float64 for float64 fields), without autocast: half-precision
    gradients underflow.
    """
    check_shape("student", student.shape, teachers.shape[1:], "each teacher's shape")
    dtype = working_dtype(student)
    with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
        point, teachers = student.detach().to(dtype).requires_grad_(), teachers.detach().to(dtype)
        gradients = [torch.autograd.grad(loss(point, t), point)[0] for t in teachers]
    return torch.stack(gradients)


def gradient_gram(
    gradients: Float[Tensor, "n_teachers ..."],
) -> Float[Tensor, "n_teachers n_teachers"]:
    """Inner products of the teachers' gradients: ``G_mn = sum_ranks <g_m, g_n>``.

    If `torch.distributed` is initialised, the matrix is summed over the ranks, so that all compute
    the same weights, those of the whole batch; every rank must then call this. It is float64,
    without gradient.
    """
    # Sums of float64 products: a matrix product might run in TF32, and gradients of a mean over
    # many elements have squares that float32 cannot hold.
    vectors = [g.detach().flatten().double() for g in gradients]
    gram = torch.stack([torch.stack([(a * b).sum() for b in vectors]) for a in vectors])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(gram)
    return gram


def aekd_weights(
    gram: Float[Tensor, "n_teachers n_teachers"],
    max_weight: float = 0.6,
    *,
    unit_gradients: bool = False,
) -> Float[Tensor, " n_teachers"]:
    """The weights of `AEKDAggregation` from the inner products of the teachers' gradients.

    They are of the dtype of ``gram``, without gradient, and NaN if it is not finite. They are exact
    but for a ridge of 1e-10 of the mean squared gradient (or of a few roundings of ``gram``), which
    makes the solution unique. Nothing waits for the device.
    """
    n = len(gram)
    _check_max_weight(max_weight, n)
    matrix = gram.detach().double()
    if unit_gradients:
        squared = matrix.diagonal()
        inverse = torch.where(squared > 0, squared, 1).rsqrt()
        matrix = matrix * inverse[:, None] * inverse
    ridge, bound = max(1e-10, 10 * torch.finfo(gram.dtype).eps), max(max_weight, 1 / n)
    mean_square = matrix.trace() / n
    eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    matrix = matrix / torch.where(mean_square > 0, mean_square, 1) + ridge * eye
    # The optimality conditions of every active set are solved at once, and the best feasible
    # solution is taken: a few hundred systems of n + 1 equations, and no branch on a value.
    # Free weights: (G a)_i + multiplier = 0. The others stay where they are. All sum to 1.
    free, fixed_at = _active_sets(n, bound, gram.device)
    ones = torch.ones_like(free[:, :1])
    rows = torch.cat([torch.where(free[:, :, None] > 0, matrix, eye), free[:, :, None]], dim=2)
    last = torch.cat([torch.ones_like(free), 0 * ones], dim=1)[:, None]
    right = torch.cat([fixed_at, ones], dim=1)
    solution, _ = torch.linalg.solve_ex(torch.cat([rows, last], dim=1), right)
    weights = solution[:, :n]
    feasible = ((weights >= -1e-9) & (weights <= bound + 1e-9)).all(1)
    length = ((weights @ matrix) * weights).sum(1)
    best = torch.where(feasible, length, torch.inf).argmin(keepdim=True)
    chosen = weights.index_select(0, best)[0].clamp(0, bound)
    return torch.where(matrix.isfinite().all(), chosen, torch.nan).to(gram.dtype)


@lru_cache(maxsize=32)
def _active_sets(n: int, max_weight: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each way to fix weights at 0 or the bound: which are free (1), and the fixed values.

    At least one weight is free. The tensors stay on the device: a copy a step would wait for it.
    """
    sets = []
    for states in itertools.product(("free", "zero", "bound"), repeat=n):
        n_free, n_bound = states.count("free"), states.count("bound")
        least, most = n_bound * max_weight, (n_bound + n_free) * max_weight
        if n_free and least <= 1 + 1e-9 and most >= 1 - 1e-9:
            sets.append(states)
    free = [[float(state == "free") for state in states] for states in sets]
    fixed_at = [[max_weight * (state == "bound") for state in states] for states in sets]
    both = torch.tensor([free, fixed_at], dtype=torch.float64).to(device)
    return both[0], both[1]


def weighted_target(
    teachers: Float[Tensor, "n_teachers batch ..."], weights: Float[Tensor, "..."]
) -> Float[Tensor, "batch ..."]:
    """The teachers' weighted mean, ``sum_m w_m t_m``, with weights common or of each sample."""
    n_teachers, batch = teachers.shape[:2]
    if weights.shape not in ((n_teachers,), (batch, n_teachers)):
        raise ValueError(
            f"`weights` has shape {tuple(weights.shape)}, expected {(n_teachers,)} or "
            f"{(batch, n_teachers)}: one a teacher, or one a sample and teacher."
        )
    weights = weights.movedim(-1, 0).reshape(n_teachers, -1, *[1] * (teachers.ndim - 2))
    return (teachers * weights).sum(0).to(teachers.dtype)


class TeacherEvidence(NamedTuple):
    """What an aggregation computes weights from, without gradient.

    Attributes:
        teachers: forecasts, of shape ``(n_teachers, batch, ...)``.
        gradients: of their losses in the student's forecast, likewise, or None if not needed.
        y: labels of shape ``(batch, ...)``, or None for an unlabelled batch.
        mask: True where a label is observed, or None for all.
    """

    teachers: Tensor
    gradients: Tensor | None = None
    y: Tensor | None = None
    mask: Tensor | None = None


class AbstractAggregation(nn.Module, ABC):
    """Computes a weight for each teacher from the evidence of one step.

    Attributes:
        needs_gradients: whether the loss computes each teacher's gradient.
        needs_labels: whether the weights depend on labels.
    """

    needs_gradients: bool = False
    needs_labels: bool = False

    def check(self, n_teachers: int) -> None:  # most take any number
        """Raise `ValueError` for a number of teachers that this aggregation cannot weigh."""

    @abstractmethod
    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, "..."]:
        """Weights of at least 0 that sum to 1: ``(n_teachers,)`` or ``(batch, n_teachers)``."""


class MeanAggregation(AbstractAggregation):
    """AVER-MKD: equal weights.

    Source: You et al., Learning from Multiple Teacher Networks, KDD 2017.
    """

    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, " n_teachers"]:
        """The weights."""
        return _equal_weights(evidence.teachers)


@explained
class AEKDAggregation(AbstractAggregation):
    """AEKD: the weights of the teachers whose weighted gradient has the least norm.

    Formula: ``argmin_a 1/2 ||sum_m a_m g_m||^2`` with ``sum_m a_m = 1`` and
    ``0 <= a_m <= max_weight``, g_m the gradient of teacher m's loss in the student's forecast.
    Where ``max_weight`` is not reached, a step against ``sum_m a_m g_m`` increases no teacher's
    loss to first order. Among equally good weights the most even ones are taken.

    Args:
        max_weight: of a teacher, in [1 / n_teachers, 1]. Two teachers have weights of at least
            ``1 - max_weight``.
        unit_gradients: scale each gradient to length 1 first, so that a teacher with a large loss
            does not get a small weight. Two teachers then have equal weights.

    Raises:
        ValueError: if ``max_weight`` is out of its range, or there are more than 8 teachers.

    Example:
        >>> gradients = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> AEKDAggregation(max_weight=1.0)(TeacherEvidence(gradients, gradients))
        tensor([0.8000, 0.2000])

    Source: Du et al., Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient
    Space, NeurIPS 2020, eq. 6.
    """

    needs_gradients = True

    def __init__(self, max_weight: float = 0.6, *, unit_gradients: bool = False) -> None:
        super().__init__()
        _check_max_weight(max_weight)
        self.max_weight = max_weight
        self.unit_gradients = unit_gradients

    def check(self, n_teachers: int) -> None:
        """See `AbstractAggregation`."""
        _check_max_weight(self.max_weight, n_teachers)

    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, " n_teachers"]:
        """The weights."""
        if evidence.gradients is None:
            raise ValueError("`evidence.gradients` is None: AEKD needs `teacher_gradients`.")
        gram = gradient_gram(evidence.gradients)
        weights = aekd_weights(gram, self.max_weight, unit_gradients=self.unit_gradients)
        return weights.to(working_dtype(evidence.gradients))


class CAMKDAggregation(AbstractAggregation):
    """CAMKD: weights of the teachers for each sample, larger for a smaller error against labels.

    Formula: ``w_k = (1 - softmax_k(e_k)) / (K - 1)`` with ``e_k`` teacher k's squared error on the
    sample over the mean of all teachers' on it: regression errors have any size, cross-entropies
    have not. Weights are at most ``1 / (K - 1)`` and sum to 1. They are equal if all errors are
    equal, and on a sample without labels.

    Example:
        >>> evidence = TeacherEvidence(torch.tensor([[[0.0]], [[2.0]]]), y=torch.zeros(1, 1))
        >>> CAMKDAggregation()(evidence)
        tensor([[0.8808, 0.1192]])

    Source: Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, eq. 3;
    the scaling is our own.
    """

    needs_labels = True

    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, "batch n_teachers"]:
        """The weights."""
        teachers, y, n = evidence.teachers, evidence.y, len(evidence.teachers)
        if y is None or n == 1:
            return _equal_weights(teachers).expand(teachers.shape[1], -1)
        # The errors of all teachers are 0 on a sample without labels.
        errors = torch.stack([sample_errors(t, y, evidence.mask)[0] for t in teachers], 1).detach()
        scaled = errors / errors.mean(1, keepdim=True).clamp_min(torch.finfo(errors.dtype).tiny)
        return (1 - scaled.softmax(1)) / (n - 1)


AGGREGATIONS: dict[AggregationName, type[AbstractAggregation]] = {
    "mean": MeanAggregation,
    "aekd": AEKDAggregation,
    "camkd": CAMKDAggregation,
}


def make_aggregation(aggregation: AggregationName | AbstractAggregation) -> AbstractAggregation:
    """The aggregation of a name, with its defaults; an aggregation is returned as it is."""
    if isinstance(aggregation, AbstractAggregation):
        return aggregation
    check_choice("aggregation", aggregation, AGGREGATIONS)
    return AGGREGATIONS[aggregation]()


def _equal_weights(teachers: Tensor) -> Tensor:
    n = len(teachers)
    return torch.full((n,), 1 / n, dtype=working_dtype(teachers), device=teachers.device)


def _check_max_weight(max_weight: float, n_teachers: int = 1) -> None:
    check_within("max_weight", max_weight, "(0, 1]")
    if n_teachers > 1 and max_weight * n_teachers < 1 - 1e-9:
        raise ValueError(
            f"`max_weight` is {max_weight}, expected at least 1 / {n_teachers}: the weights of "
            f"{n_teachers} teachers could not sum to 1."
        )
    if n_teachers > MAX_TEACHERS:
        raise ValueError(
            f"AEKD is given {n_teachers} teachers, expected at most {MAX_TEACHERS}: its exact "
            "solution visits 3^n cases; take the aggregation 'mean' or 'camkd'."
        )
