"""What each of several teachers counts for.

Here live the weights of teachers, as functions and as modules behind one interface, and the target
that weighted teachers make. What is compared with that target is in `frequency` and `features`.

For a loss that is quadratic in the student, as the frequency-aligned loss and the MSE are, one
target serves for all teachers: with weights w_m that sum to 1 and ``t = sum_m w_m t_m``,

    sum_m w_m <s - t_m, g(L) (s - t_m)>
        = <s - t, g(L) (s - t)> + sum_m w_m <t_m - t, g(L) (t_m - t)>

and the last term does not depend on the student: the gradients are the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_mask, check_shape
from sdkd_plugin.losses.min_norm import MOST_VECTORS, min_norm_weights
from sdkd_plugin.spectral.transform import working_dtype

AggregationName = Literal["mean", "aekd", "camkd"]


def teacher_gradients(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: Float[Tensor, "batch ..."],
    teachers: Float[Tensor, "n_teachers batch ..."],
) -> Float[Tensor, "n_teachers batch ..."]:
    """Gradient of each teacher's loss in the student's output or feature.

    The student's own graph is not walked through and not changed: the cost is one forward and one
    backward of the loss a teacher.

    Args:
        loss: of student and one teacher, a scalar. It is called once a teacher: one that keeps
            averages of what it sees must be in eval mode.
        student: forecast or feature.
        teachers: the same of each teacher.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> student, teachers = torch.zeros(1, 2), torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> teacher_gradients(torch.nn.functional.mse_loss, student, teachers)
        tensor([[[-1.,  0.]],
        <BLANKLINE>
                [[ 0., -2.]]])
    """
    check_shape("student", student.shape, teachers.shape[1:], "each teacher's shape")
    with torch.enable_grad():
        point = student.detach().requires_grad_()
        gradients = [
            torch.autograd.grad(loss(point, teacher), point)[0] for teacher in teachers.detach()
        ]
    return torch.stack(gradients)


def gradient_gram(
    gradients: Float[Tensor, "n_teachers ..."], group: dist.ProcessGroup | None = None
) -> Float[Tensor, "n_teachers n_teachers"]:
    """Inner products of the teachers' gradients, over all ranks.

    Formula: ``G_mn = sum_ranks <g_m, g_n>``. Where `torch.distributed` is initialised the matrix
    is summed over the ranks, each of which has its own samples: all ranks then agree on the
    weights, and these are those of the whole batch. Every rank must call this.

    Args:
        gradients: one a teacher, first axis.
        group: of ranks; by default all.

    Returns:
        float64, of shape ``(n_teachers, n_teachers)``, without gradient.

    Example:
        >>> gradient_gram(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([[1., 1.],
                [1., 5.]], dtype=torch.float64)
    """
    # Sums of float64 products: a matrix product might run in TF32, and gradients of a mean over
    # many elements have squares that float32 cannot hold.
    vectors = [g.detach().flatten().double() for g in gradients]
    n = len(vectors)
    products = {(i, j): (vectors[i] * vectors[j]).sum() for i in range(n) for j in range(i, n)}
    entries = [products[min(i, j), max(i, j)] for i in range(n) for j in range(n)]
    gram = torch.stack(entries).reshape(n, n)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(gram, group=group)
    return gram


def mean_weights(teachers: Float[Tensor, "n_teachers ..."]) -> Float[Tensor, " n_teachers"]:
    """AVER-MKD: all teachers count alike.

    Example:
        >>> mean_weights(torch.randn(4, 2, 3))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Source: You et al., Learning from Multiple Teacher Networks, KDD 2017.
    """
    n, dtype = len(teachers), working_dtype(teachers)
    return torch.full((n,), 1 / n, dtype=dtype, device=teachers.device)


def aekd_weights(
    gram: Float[Tensor, "n_teachers n_teachers"],
    bound: float = 0.6,
    *,
    unit_gradients: bool = False,
) -> Float[Tensor, " n_teachers"]:
    """AEKD: the teachers' weights whose common gradient is shortest.

    Formula: ``argmin_a 1/2 ||sum_m a_m g_m||^2`` with ``sum_m a_m = 1`` and ``0 <= a_m <= bound``.
    Where the bound is not active, a step against ``sum_m a_m g_m`` increases no teacher's loss to
    first order: ``<g_m, sum_n a_n g_n> >= ||sum_n a_n g_n||^2`` for each m. Two teachers have
    weights in [1 - bound, bound]. Of equally good weights, as equal gradients have them, the most
    even ones are taken.

    Args:
        gram: inner products of the teachers' gradients g_m, as `gradient_gram` has them.
        bound: of each weight, in [1 / n_teachers, 1]; 1 is none.
        unit_gradients: as if each gradient had the length 1, so that teachers with large losses are
            not played down. The weights are meant for the losses as they are; the first-order
            property is then one of the unit gradients. Two teachers always count alike.

    Returns:
        of the dtype of ``gram``, without gradient; NaN where the matrix is not finite. Every
        active set is solved and the best feasible solution taken, in float64 and without waiting
        for the device: exact but for a ridge of 1e-10 of the mean squared gradient (or of a few
        roundings of ``gram``), which makes the solution unique.

    Raises:
        ValueError: if the bound is not in [1 / n_teachers, 1] or there are more than 8 teachers.

    Example:
        >>> gram = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> aekd_weights(gram, bound=1.0), aekd_weights(gram, bound=0.6)
        (tensor([0.8000, 0.2000]), tensor([0.6000, 0.4000]))

    Source: Du et al., Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient
    Space, NeurIPS 2020, eq. 6.
    """
    _check_bound(bound, len(gram))
    matrix = gram.detach().double()
    if unit_gradients:
        squared = matrix.diagonal()
        inverse = torch.where(squared > 0, squared, 1).rsqrt()
        matrix = matrix * inverse[:, None] * inverse
    ridge = max(1e-10, 10 * torch.finfo(gram.dtype).eps)
    return min_norm_weights(matrix, bound, ridge).to(gram.dtype)


def camkd_weights(
    errors: Float[Tensor, "batch n_teachers"], labelled: Bool[Tensor, " batch"] | None = None
) -> Float[Tensor, "batch n_teachers"]:
    """CAMKD: for each sample, the teachers count as far as they are right there.

    Formula: ``w_k = (1 - softmax_k(e_k)) / (K - 1)`` with ``e_k`` teacher k's error on the sample
    over the mean of all teachers' on it: a regression has errors of any size where a
    classification has cross-entropies. A weight is at most ``1 / (K - 1)``, and the weights of a
    sample sum to 1. One teacher counts 1; on a sample without labels, or where all teachers are
    exactly right, all count alike.

    Args:
        errors: mean squared error of each teacher on each sample, at least 0.
        labelled: which samples have labels; where False the errors may be anything.

    Returns:
        without gradient.

    Example:
        >>> camkd_weights(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        tensor([[0.5000, 0.5000],
                [0.8808, 0.1192]])

    Source: Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, eq. 3;
    the scaling is our own.
    """
    errors = errors.detach()
    n_teachers = errors.shape[1]
    if n_teachers == 1:
        return torch.ones_like(errors)
    if labelled is not None:
        errors = torch.where(labelled[:, None], errors, 0)
    scaled = errors / errors.mean(1, keepdim=True).clamp_min(torch.finfo(errors.dtype).tiny)
    return (1 - scaled.softmax(1)) / (n_teachers - 1)


def teacher_errors(
    teachers: Float[Tensor, "n_teachers batch ..."],
    y: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "batch n_teachers"], Bool[Tensor, " batch"]]:
    """Mean squared error of each teacher on each sample, and which samples have any label.

    Args:
        teachers: forecasts.
        y: labels, of a forecast's shape; anything where they are masked out.
        mask: True where observed; of as many axes as ``y``, each of its size or 1.

    Returns:
        at least float32, a mean over what was observed, 0 where nothing was; and a mask of samples.

    Raises:
        ValueError: if shapes do not match.

    Example:
        >>> teachers, y = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.zeros(1, 2)
        >>> teacher_errors(teachers, y, torch.tensor([[True, False]]))
        (tensor([[1., 0.]]), tensor([True]))
    """
    check_shape("y", y.shape, teachers.shape[1:], "a teacher's forecast")
    dtype = working_dtype(teachers)
    observed = torch.ones_like(y, dtype=torch.bool)
    if mask is not None:
        check_mask(mask, y)
        observed = mask.expand_as(y)
    squares = torch.where(observed, (teachers.detach().to(dtype) - y.to(dtype)).square(), 0)
    count = observed.flatten(1).sum(1)
    return squares.flatten(2).sum(2).T / count.clamp_min(1)[:, None], count > 0


def weighted_target(
    teachers: Float[Tensor, "n_teachers batch ..."], weights: Float[Tensor, "..."]
) -> Float[Tensor, "batch ..."]:
    """The teachers' weighted mean; to a quadratic loss it is as good as all of them.

    Formula: ``t_b = sum_m w_m t_{m, b}``, or with ``w_{b, m}`` for weights a sample. See the
    module's head for why its loss has the gradient of the weighted losses.

    Args:
        teachers: forecasts or features.
        weights: of shape ``(n_teachers,)`` or ``(batch, n_teachers)``, summing to 1.

    Returns:
        of the dtype of ``teachers``.

    Raises:
        ValueError: if the weights are of another shape.

    Example:
        >>> teachers = torch.tensor([[[0.0], [0.0]], [[4.0], [4.0]]])
        >>> weighted_target(teachers, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([[2.],
                [0.]])
    """
    n_teachers, batch = teachers.shape[:2]
    if weights.shape not in ((n_teachers,), (batch, n_teachers)):
        raise ValueError(
            f"`weights` has shape {tuple(weights.shape)}, expected {(n_teachers,)} or "
            f"{(batch, n_teachers)}: one a teacher, or one a sample and teacher."
        )
    per_sample = weights.expand(batch, n_teachers).T
    per_sample = per_sample.reshape(n_teachers, batch, *[1] * (teachers.ndim - 2))
    return (teachers * per_sample).sum(0).to(teachers.dtype)


class TeacherEvidence(NamedTuple):
    """What is known about several teachers in one step, without gradients.

    Attributes:
        teachers: their forecasts, of shape ``(n_teachers, batch, ...)``.
        gradients: of their losses in the student's output, likewise, or None where no aggregation
            asks.
        y: labels of shape ``(batch, ...)``, or None where the batch is unlabelled.
        mask: which labels count, True where observed, or None for all.
    """

    teachers: Tensor
    gradients: Tensor | None = None
    y: Tensor | None = None
    mask: Tensor | None = None


class AbstractAggregation(nn.Module, ABC):
    """Turns the evidence of one step into a weight for each teacher."""

    @property
    @abstractmethod
    def needs_gradients(self) -> bool:
        """Whether the losses' gradients shall be computed, one forward and backward a teacher."""

    @abstractmethod
    def check(self, n_teachers: int) -> None:
        """Refuse a number of teachers that this aggregation cannot weigh.

        Raises:
            ValueError: naming what does not fit.
        """

    @abstractmethod
    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, "..."]:
        """Weights of at least 0 that sum to 1: ``(n_teachers,)`` or ``(batch, n_teachers)``."""


class MeanAggregation(AbstractAggregation):
    """AVER-MKD; see `mean_weights`.

    Example:
        >>> MeanAggregation()(TeacherEvidence(torch.randn(2, 4, 3)))
        tensor([0.5000, 0.5000])
    """

    @property
    def needs_gradients(self) -> bool:
        """Never."""
        return False

    def check(self, n_teachers: int) -> None:
        """Fits every number of teachers."""

    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, " n_teachers"]:
        """The weights."""
        return mean_weights(evidence.teachers)


class AEKDAggregation(AbstractAggregation):
    """AEKD; see `aekd_weights`.

    Args:
        bound: of each weight, in (0, 1].
        unit_gradients: weigh gradients as if each had the length 1.

    Raises:
        ValueError: if the bound is not in (0, 1] or below 1 / n_teachers, or, in forward, if the
            evidence has no gradients.

    Example:
        >>> teachers = gradients = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> AEKDAggregation()(TeacherEvidence(teachers, gradients))
        tensor([0.6000, 0.4000])
    """

    def __init__(self, bound: float = 0.6, *, unit_gradients: bool = False) -> None:
        super().__init__()
        _check_bound(bound)
        self.bound = bound
        self.unit_gradients = unit_gradients

    @property
    def needs_gradients(self) -> bool:
        """Always."""
        return True

    def check(self, n_teachers: int) -> None:
        """See `AbstractAggregation`."""
        _check_bound(self.bound, n_teachers)

    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, " n_teachers"]:
        """The weights."""
        if evidence.gradients is None:
            raise ValueError(
                "`evidence.gradients` is None, but AEKD needs them: see `teacher_gradients`."
            )
        gram = gradient_gram(evidence.gradients)
        weights = aekd_weights(gram, self.bound, unit_gradients=self.unit_gradients)
        return weights.to(working_dtype(evidence.gradients))

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"bound={self.bound}, unit_gradients={self.unit_gradients}"


class CAMKDAggregation(AbstractAggregation):
    """CAMKD; see `camkd_weights`.

    Example:
        >>> teachers, y = torch.tensor([[[0.0]], [[2.0]]]), torch.zeros(1, 1)
        >>> CAMKDAggregation()(TeacherEvidence(teachers, y=y))
        tensor([[0.8808, 0.1192]])
        >>> CAMKDAggregation()(TeacherEvidence(teachers))
        tensor([[0.5000, 0.5000]])
    """

    @property
    def needs_gradients(self) -> bool:
        """Never."""
        return False

    def check(self, n_teachers: int) -> None:
        """Fits every number of teachers."""

    def forward(self, evidence: TeacherEvidence) -> Float[Tensor, "batch n_teachers"]:
        """The weights."""
        if evidence.y is None:
            batch = evidence.teachers.shape[1]
            return mean_weights(evidence.teachers).expand(batch, -1)
        return camkd_weights(*teacher_errors(evidence.teachers, evidence.y, evidence.mask))


AGGREGATIONS: dict[AggregationName, type[AbstractAggregation]] = {
    "mean": MeanAggregation,
    "aekd": AEKDAggregation,
    "camkd": CAMKDAggregation,
}


def make_aggregation(name: AggregationName) -> AbstractAggregation:
    """The aggregation of a name, with its defaults.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> make_aggregation("aekd")
        AEKDAggregation(bound=0.6, unit_gradients=False)
    """
    check_choice("aggregation", name, AGGREGATIONS)
    return AGGREGATIONS[name]()


def _check_bound(bound: float, n_teachers: int | None = None) -> None:
    if not 0 < bound <= 1:
        raise ValueError(f"`bound` is {bound}, expected a weight in (0, 1]; 1 is no bound.")
    if n_teachers is None:
        return
    if bound * n_teachers < 1 - 1e-9:
        raise ValueError(
            f"`bound` is {bound}, expected at least 1 / {n_teachers}: the weights of {n_teachers} "
            "teachers could not sum to 1."
        )
    if n_teachers > MOST_VECTORS:
        raise ValueError(
            f"AEKD is given {n_teachers} teachers, expected at most {MOST_VECTORS}: its exact "
            "solution visits 3^n cases; take the aggregation 'mean' or 'camkd'."
        )
