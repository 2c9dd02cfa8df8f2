"""Feature losses: comparisons of a latent of the student with one of the teacher.

Here live the losses, behind one interface. Which taps are compared, and how their channels and
resolutions are matched, is in `latents`.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_shape
from sdkd_plugin.losses.frequency import FrequencyAlignedLoss
from sdkd_plugin.spectral.transform import working_dtype

Latent = Float[Tensor, "batch ..."]


class AbstractFeatureLoss(nn.Module, ABC):
    """Compares a latent of the student with the teacher's, on one domain.

    Attributes:
        needs_projector: whether the student's channels are first projected to the teacher's.
    """

    needs_projector: bool = True

    @abstractmethod
    def forward(self, student: Latent, teacher: Latent) -> Float[Tensor, ""]:
        """The loss of a batch, of at least 0.

        Raises:
            ValueError: if the shapes do not fit.
        """


class FrequencyFeatureLoss(AbstractFeatureLoss):
    """``<d, g(L) d> / mean(t^2)``: 1 for a student that is 0 everywhere, with equal weights.

    Source: arXiv 2507.02939; the division by the teacher's mean square is our own.
    """

    def __init__(self, loss: FrequencyAlignedLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Latent, teacher: Latent) -> Float[Tensor, ""]:
        """The loss of a batch."""
        return self.loss(student, teacher) / _mean_square(teacher)


class FitNetsLoss(AbstractFeatureLoss):
    """FitNets: ``mean((norm(s) - t)^2) / mean(t^2)``, s projected to the teacher's channels.

    Projector and batch norm are the paper's regressor. A batch norm scales a channel by the same
    number for all samples; a layer norm would remove how strong a sample's latent is. The division
    by the teacher's mean square is our own. ``channels`` are the teacher's, along ``channel_axis``
    counted from the end.

    Raises:
        ValueError: in forward, if the shapes differ or a training batch has one value a channel.

    Source: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, eq. 3.
    """

    def __init__(self, channels: int, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, student: Latent, teacher: Latent) -> Float[Tensor, ""]:
        """The loss of a batch."""
        check_shape("student", student.shape, teacher.shape, "the teacher's shape")
        last = student.movedim(self.channel_axis, -1)
        rows = last.flatten(0, -2).to(self.norm.weight.dtype)
        if self.training and len(rows) < 2:
            raise ValueError(
                f"`student` has shape {tuple(student.shape)}, expected at least two values a "
                "channel: take larger batches, or another feature loss."
            )
        normed = self.norm(rows).reshape(last.shape).movedim(-1, self.channel_axis)
        difference = _at_least_float32(normed) - _at_least_float32(teacher)
        return difference.square().mean() / _mean_square(teacher)


class AttentionLoss(AbstractFeatureLoss):
    """Squared distance of the attention maps of student and teacher, a mean over the batch.

    Formula: ``mean_b sum_x (q_s / ||q_s|| - q_t / ||q_t||)_x^2`` in [0, 2], with the channel mean
    ``q_x = mean_c feature_{c, x}^2`` at each place x. The sum over places keeps the paper's meaning
    at every resolution; the authors' code averages over places. Channels, along ``channel_axis``
    counted from the end, may differ in number.

    Raises:
        ValueError: in forward, if the shapes differ in more than their channels.

    Source: Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017, eq. 2; squared,
    and so smooth where the maps agree, as in the authors' code.
    """

    needs_projector = False

    def __init__(self, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis

    def forward(self, student: Latent, teacher: Latent) -> Float[Tensor, ""]:
        """The loss of a batch."""
        axis = self.channel_axis
        if student.select(axis, 0).shape != teacher.select(axis, 0).shape:
            raise ValueError(
                f"`student` has shape {tuple(student.shape)}, expected the teacher's "
                f"{tuple(teacher.shape)} but for the channels (axis {axis})."
            )
        mine, theirs = (_attention_map(x, axis) for x in (student, teacher))
        return (mine - theirs).square().sum(1).mean()


class BoundaryLoss(AbstractFeatureLoss):
    """Distance of the student's activations from the side of 0 on which the teacher's are.

    Formula: the mean over all elements of

        (s + 1)^2  where t <= 0 and s > -1
        (s - 1)^2  where t > 0 and s <= 1
        0          elsewhere.

    Only the sign of the teacher's activation matters: tap it before its nonlinearity.

    Raises:
        ValueError: in forward, if the shapes differ.

    Source: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019,
    eq. 5.
    """

    def forward(self, student: Latent, teacher: Latent) -> Float[Tensor, ""]:
        """The loss of a batch."""
        check_shape("student", student.shape, teacher.shape, "the teacher's shape")
        student = _at_least_float32(student)
        distance = torch.where(teacher > 0, 1 - student, 1 + student)
        return distance.relu().square().mean()


def _attention_map(feature: Tensor, channel_axis: int) -> Tensor:
    feature = _at_least_float32(feature)
    # The map does not depend on the latent's scale. Dividing by it, without a gradient, keeps the
    # squares from under- and overflowing.
    scale = feature.detach().abs().amax(list(range(1, feature.ndim)), keepdim=True)
    feature = feature / scale.clamp_min(torch.finfo(feature.dtype).tiny)
    return F.normalize(feature.square().mean(channel_axis).flatten(1))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(working_dtype(x))


def _mean_square(teacher: Tensor) -> Tensor:
    """The teacher's mean square, or 1 for a latent that is 0 everywhere."""
    energy = _at_least_float32(teacher.detach()).square().mean()
    return torch.where(energy > 0, energy, 1)
