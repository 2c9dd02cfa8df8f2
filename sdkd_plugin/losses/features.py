"""What is compared between the latents of student and teacher.

Here live the feature losses, each as a function and as a module behind one interface. Channels
are matched by `projector`, resolutions by `sdkd_plugin.spectral.crop`, both before these losses.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_positive, check_positive_int, check_shape
from sdkd_plugin.losses.frequency import FrequencyAlignedLoss
from sdkd_plugin.losses.weighting import AbstractWeighting
from sdkd_plugin.losses.weightings import WeightingName
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.spectral.transform import working_dtype

FeatureLossName = Literal["frequency", "fitnets", "attention", "boundary"]


def fitnets_loss(
    student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
) -> Float[Tensor, ""]:
    """Mean squared difference of a regressed student latent and the teacher's.

    Formula: ``mean((r(s) - t)^2)`` over all elements, r(s) being what is given as ``student``.

    Args:
        student: the student's latent behind its regressor.
        teacher: the teacher's, of the same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> fitnets_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)

    Source: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, eq. 3.
    """
    check_shape("student", student.shape, teacher.shape, "the teacher's shape")
    return (_at_least_float32(student) - _at_least_float32(teacher)).square().mean()


def attention_map(
    feature: Float[Tensor, "batch ..."], channel_axis: int
) -> Float[Tensor, "batch places"]:
    """Where a latent is active: the mean square of its channels at each place, a unit vector.

    Formula: ``q / ||q||_2`` with ``q_x = mean_c feature_{c, x}^2``, for each sample. A sample that
    is zero everywhere has the map 0 and no gradient.

    Args:
        feature: a latent; all axes but the batch's and the channels' are places.
        channel_axis: where its channels are, counted from the end.

    Returns:
        of at least 0, of norm 1 a sample, whatever the latent's scale; at least float32.

    Raises:
        ValueError: if the channel axis is not one behind the batch axis.

    Example:
        >>> attention_map(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]).sqrt(), channel_axis=-2)
        tensor([[0.6000, 0.8000]])

    Source: Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017, F_sum^2.
    """
    if not -feature.ndim < channel_axis < 0:
        raise ValueError(
            f"`channel_axis` is {channel_axis}, expected one of {list(range(1 - feature.ndim, 0))} "
            f"for a latent of shape {tuple(feature.shape)}, counted from the end."
        )
    feature = _at_least_float32(feature)
    # The map does not depend on the latent's scale, so dividing by it needs no gradient of its
    # own; it keeps the squares from under- and overflowing.
    scale = feature.detach().abs().amax(list(range(1, feature.ndim)), keepdim=True)
    feature = feature / scale.clamp_min(torch.finfo(feature.dtype).tiny)
    return F.normalize(feature.square().mean(channel_axis).flatten(1))


def attention_loss(
    student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."], channel_axis: int
) -> Float[Tensor, ""]:
    """Squared distance of the attention maps of student and teacher, a mean over the batch.

    Formula: ``mean_b sum_x (q_s / ||q_s|| - q_t / ||q_t||)_x^2``, in [0, 2]. The sum over places is
    the paper's norm of a difference of unit vectors: it means the same at every resolution. (The
    authors' code takes the mean over places instead, which fades as latents grow.) As in that
    code the distance is squared, and so smooth where the maps agree.

    Args:
        student: the student's latent, of any number of channels.
        teacher: the teacher's, of the same shape but for its channels.
        channel_axis: of both, counted from the end.

    Raises:
        ValueError: if the shapes differ in more than their channels.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0]]])
        >>> teacher = torch.tensor([[[0.0, 5.0], [0.0, 1.0]]])
        >>> attention_loss(student, teacher, channel_axis=-2)
        tensor(2.)

    Source: Zagoruyko & Komodakis, ICLR 2017, eq. 2.
    """
    mine, theirs = attention_map(student, channel_axis), attention_map(teacher, channel_axis)
    if _without(student, channel_axis) != _without(teacher, channel_axis):
        raise ValueError(
            f"`student` has shape {tuple(student.shape)}, expected the teacher's "
            f"{tuple(teacher.shape)} but for the channels (axis {channel_axis})."
        )
    return (mine - theirs).square().sum(1).mean()


def boundary_loss(
    student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."], margin: float = 1.0
) -> Float[Tensor, ""]:
    """How far the student is from being active where the teacher is, and silent elsewhere.

    Formula: the mean over all elements, of all samples, of

        (s + margin)^2  where t <= 0 and s > -margin
        (s - margin)^2  where t > 0 and s <= margin
        0               elsewhere.

    Only the sign of the teacher's activation counts: tap it before its nonlinearity.

    Args:
        student: the student's latent, behind its projector.
        teacher: the teacher's, of the same shape.
        margin: how far beyond 0 the student's activations are pushed.

    Raises:
        ValueError: if the shapes differ or the margin is not positive.

    Example:
        >>> boundary_loss(torch.tensor([[0.5, 0.5, 2.0]]), torch.tensor([[3.0, -3.0, 0.1]]))
        tensor(0.8333)

    Source: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019,
    eq. 5.
    """
    check_positive("margin", margin)
    check_shape("student", student.shape, teacher.shape, "the teacher's shape")
    student = _at_least_float32(student)
    distance = torch.where(teacher > 0, margin - student, margin + student)
    return distance.relu().square().mean()


class AbstractFeatureLoss(nn.Module, ABC):
    """Compares a latent of the student with one of the teacher."""

    @property
    @abstractmethod
    def needs_projector(self) -> bool:
        """Whether the student's channels must first be mapped to the teacher's."""

    @abstractmethod
    def forward(
        self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """The loss of a batch, of at least 0.

        Raises:
            ValueError: if the shapes do not fit.
        """


class FrequencyFeatureLoss(AbstractFeatureLoss):
    """The frequency-aligned loss of latents, in units of the teacher's mean square.

    Formula: ``<d, g(L) d> / mean(t^2)``: 1 where a student says nothing, with equal weights.

    Args:
        loss: on the latents' domain.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> frequency = FrequencyAlignedLoss(GridTransform((8,)), Bands.split(0.25), (1.0, 1.0))
        >>> teacher = torch.randn(4, 3, 8)
        >>> round(float(FrequencyFeatureLoss(frequency)(0 * teacher, teacher)), 5)
        1.0

    Source: arXiv 2507.02939; the units are our own.
    """

    def __init__(self, loss: FrequencyAlignedLoss) -> None:
        super().__init__()
        self.loss = loss

    @property
    def needs_projector(self) -> bool:
        """Always: elements are compared."""
        return True

    def forward(
        self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """See the class."""
        return self.loss(student, teacher) / _mean_square(teacher)


class FitNetsLoss(AbstractFeatureLoss):
    """FitNets: a regressor of the student's latent, trained along with it, and the MSE.

    The regressor is the projector's 1x1 convolution followed by the batch norm in this module. A
    batch norm, because it only moves and scales channels, by the same numbers for all samples;
    a layer or group norm would take away how strong a sample's latent is, which is to be learnt.

    Formula: ``mean((norm(s) - t)^2) / mean(t^2)``. Divided by the teacher's mean square, so that
    the loss does not depend on the units of its latents; the paper has no such division.

    Args:
        channels: of the teacher's latent, to which the student's has been projected.
        channel_axis: where they are, counted from the end.
        relative: divide by the teacher's mean square.

    Raises:
        ValueError: if the number of channels is not a positive integer, or, in forward, if the
            shapes differ or a training batch has a single value a channel.

    Example:
        >>> loss = FitNetsLoss(3, channel_axis=-3)
        >>> student, teacher = torch.randn(2, 4, 3, 8, 8)
        >>> loss(student, teacher).shape
        torch.Size([])

    Source: Romero et al., ICLR 2015, eq. 3.
    """

    def __init__(self, channels: int, channel_axis: int, relative: bool = True) -> None:
        super().__init__()
        check_positive_int("channels", channels)
        self.channel_axis = channel_axis
        self.relative = relative
        self.norm = nn.BatchNorm1d(channels)

    @property
    def needs_projector(self) -> bool:
        """Always: it is the first half of the regressor."""
        return True

    def forward(
        self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """See the class."""
        check_shape("student", student.shape, teacher.shape, "the teacher's shape")
        last = student.movedim(self.channel_axis, -1)
        if last.shape[-1] != self.norm.num_features:
            raise ValueError(
                f"`student` has {last.shape[-1]} channels along axis {self.channel_axis}, expected "
                f"{self.norm.num_features}: project it to the teacher's."
            )
        rows = last.flatten(0, -2).to(self.norm.weight.dtype)
        if self.training and len(rows) < 2:
            raise ValueError(
                f"`student` has shape {tuple(student.shape)}, expected at least two values a "
                "channel: take larger batches, or another feature loss."
            )
        normed = self.norm(rows).reshape(last.shape).movedim(-1, self.channel_axis)
        loss = fitnets_loss(normed, teacher)
        return loss / _mean_square(teacher) if self.relative else loss


class AttentionLoss(AbstractFeatureLoss):
    """Attention transfer; see `attention_loss`.

    Args:
        channel_axis: where the channels of both latents are, counted from the end.

    Example:
        >>> loss = AttentionLoss(channel_axis=-3)
        >>> bool(loss(torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8, 8)) > 0)
        True

    Source: Zagoruyko & Komodakis, ICLR 2017.
    """

    def __init__(self, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis

    @property
    def needs_projector(self) -> bool:
        """Never: channels are averaged away."""
        return False

    def forward(
        self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """See `attention_loss`."""
        return attention_loss(student, teacher, self.channel_axis)


class BoundaryLoss(AbstractFeatureLoss):
    """Activation boundaries; see `boundary_loss`.

    Args:
        margin: how far beyond 0 the student's activations are pushed.

    Raises:
        ValueError: if the margin is not positive.

    Example:
        >>> student, teacher = torch.randn(2, 4, 3, 8)
        >>> bool(BoundaryLoss()(student, teacher) > 0)
        True

    Source: Heo et al., AAAI 2019.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        check_positive("margin", margin)
        self.margin = margin

    @property
    def needs_projector(self) -> bool:
        """Always: elements are compared."""
        return True

    def forward(
        self, student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, ""]:
        """See `boundary_loss`."""
        return boundary_loss(student, teacher, self.margin)


def make_feature_loss(
    name: FeatureLossName,
    transform: AbstractTransform,
    *,
    channels: int,
    bands: Bands | None = None,
    weighting: WeightingName | AbstractWeighting | Sequence[float] | None = None,
) -> AbstractFeatureLoss:
    """The feature loss of a name, for latents on a domain.

    Args:
        name: which one.
        transform: the domain of the latents; it says where their channels are.
        channels: of the teacher's latent.
        bands: of the ``frequency`` loss; below and from a quarter of the highest by default.
        weighting: of those bands; by default all count alike.

    Raises:
        ValueError: if the name is unknown, bands or a weighting are given to a loss that has none,
            or what is given does not fit.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> make_feature_loss("attention", GridTransform((8, 8)), channels=3).needs_projector
        False
    """
    check_choice("name", name, get_args(FeatureLossName))
    if name != "frequency" and not (bands is None and weighting is None):
        raise ValueError(
            f"`bands` or `weighting` is given to the feature loss {name!r}, expected none: only "
            "'frequency' has bands."
        )
    if name == "fitnets":
        return FitNetsLoss(channels, transform.channel_axis)
    if name == "attention":
        return AttentionLoss(transform.channel_axis)
    if name == "boundary":
        return BoundaryLoss()
    bands = Bands.split(0.25) if bands is None else bands
    weighting = [1.0] * bands.n_bands if weighting is None else weighting
    # A copy: each loss keeps averages of its own.
    loss = FrequencyAlignedLoss(transform, bands, copy.deepcopy(weighting))
    if loss.weighting.needs_teacher_error:
        raise ValueError(
            f"`weighting` is a {type(loss.weighting).__name__} that asks for labels, but latents "
            "have none; expected 'fixed', 'relative', 'adaptive', numbers, or one that was "
            "measured beforehand (decay=None)."
        )
    return FrequencyFeatureLoss(loss)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(working_dtype(x))


def _mean_square(teacher: Tensor) -> Tensor:
    """The teacher's mean square, or 1 for a latent that carries nothing: it has no units."""
    energy = _at_least_float32(teacher.detach()).square().mean()
    return torch.where(energy > 0, energy, 1)


def _without(x: Tensor, axis: int) -> list[int]:
    """The shape of ``x`` without one axis."""
    return [n for i, n in enumerate(x.shape) if i != axis % x.ndim]
