"""Losses between the tapped latents of a student and its teachers.

Here live the pairs of taps and the module that holds their projectors. The losses themselves are in
`features`; activations are read in `sdkd_plugin.taps`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_positive, check_positive_int, check_type
from sdkd_plugin._explained import explained
from sdkd_plugin.losses.band_weights import AbstractWeighting, WeightingName
from sdkd_plugin.losses.features import (
    AbstractFeatureLoss,
    AttentionLoss,
    BoundaryLoss,
    FitNetsLoss,
    FrequencyFeatureLoss,
)
from sdkd_plugin.losses.frequency import FrequencyAlignedLoss
from sdkd_plugin.spectral import AbstractTransform, Bands, GridTransform
from sdkd_plugin.spectral.crop import crop_frequencies, shared_grid

FeatureLossName = Literal["frequency", "fitnets", "attention", "boundary"]


class ChannelProjector(nn.Module):
    """A linear map of the channels at every place: a 1x1 convolution on any domain.

    It maps the student's channels to the teacher's, is trained with the student, and not part of
    it. Its weights start orthogonal, from a generator of their own: torch's random state stays as
    it is. ``channel_axis`` is counted from the end.

    Example:
        >>> ChannelProjector(4, 7, channel_axis=-3)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 7, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, channel_axis: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.linear = nn.utils.skip_init(nn.Linear, in_channels, out_channels)
        generator = torch.Generator().manual_seed(0)
        nn.init.orthogonal_(self.linear.weight, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Map the channels of ``x``."""
        return self.linear(x.movedim(self.channel_axis, -1)).movedim(-1, self.channel_axis)


@explained
@dataclass(frozen=True)
class LatentPair:
    """A tap of the student that is distilled from a tap of a teacher.

    Attributes:
        student: tap of the student: a name in its ``taps``, or a module path.
        teacher: tap of the teacher, likewise.
        weight: of the pair's loss, beside the forecast's frequency-aligned loss.
        loss: ``frequency``, ``fitnets``, ``attention`` or ``boundary``.
        bands: partition of the latents' frequencies for ``frequency``; the forecast's by default.
        weighting: of these bands; equal weights by default.
        teacher_index: of one of several teachers; each of them by default.

    Raises:
        ValueError: if the weight is not positive or the loss is unknown.
    """

    student: str = "latent"
    teacher: str = "latent"
    weight: float = 1.0
    loss: FeatureLossName = "frequency"
    bands: Bands | None = None
    weighting: WeightingName | AbstractWeighting | Sequence[float] | None = None
    teacher_index: int | None = None

    def __post_init__(self) -> None:
        check_positive("LatentPair.weight", self.weight)
        check_choice("LatentPair.loss", self.loss, get_args(FeatureLossName))
        if self.teacher_index is not None:
            check_positive_int("LatentPair.teacher_index", self.teacher_index, minimum=0)
        if self.loss != "frequency" and not (self.bands is None and self.weighting is None):
            raise ValueError(
                f"`LatentPair` has `bands` or a `weighting` with the loss {self.loss!r}, expected "
                "neither: only 'frequency' has bands."
            )

    @property
    def name(self) -> str:
        """The key of the pair's loss in `DistillationTerms.features`."""
        of = "" if self.teacher_index is None else f"{self.teacher_index}."
        name = f"{self.student}<-{of}{self.teacher}"
        return name if self.loss == "frequency" else f"{name} ({self.loss})"


class LatentLoss(nn.Module):
    """One pair's loss for one teacher: fold, crop, project, compare.

    Frames and other axes that a model keeps apart are folded into channels. Latents of different
    resolution are compared on the frequencies that both have, never by interpolation. A student
    of another width is projected to the teacher's channels if the loss compares elements. Both
    activations are given for their shapes.
    """

    def __init__(
        self,
        pair: LatentPair,
        student: Tensor,
        teacher: Tensor,
        transform: AbstractTransform,
        bands: Bands,
    ) -> None:
        super().__init__()
        mine, theirs = (fold_into_channels(x, transform) for x in (student, teacher))
        own, other = (
            transform.resized(tuple(x.shape[a] for a in transform.domain_axes))
            for x in (mine, theirs)
        )
        self.student_domain, self.teacher_domain, self.domain = own, other, own
        # Graphs have one size: `resized` has refused another.
        if isinstance(own, GridTransform) and isinstance(other, GridTransform):
            self.domain = shared_grid(own, other)
        axis = transform.channel_axis
        in_channels, channels = mine.shape[axis], theirs.shape[axis]
        self.loss: AbstractFeatureLoss
        if pair.loss == "fitnets":
            self.loss = FitNetsLoss(channels, axis)
        elif pair.loss == "attention":
            self.loss = AttentionLoss(axis)
        elif pair.loss == "boundary":
            self.loss = BoundaryLoss()
        else:
            self.loss = _frequency_loss(pair, self.domain, pair.bands or bands)
        self.projector = (
            ChannelProjector(in_channels, channels, axis) if self.loss.needs_projector else None
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The pair's loss, a scalar without its weight."""
        mine = self._on_domain(student, self.student_domain)
        theirs = self._on_domain(teacher.detach(), self.teacher_domain)
        return self.loss(mine if self.projector is None else self.projector(mine), theirs)

    def _on_domain(self, x: Tensor, source: AbstractTransform) -> Tensor:
        x = fold_into_channels(x, source)
        if isinstance(source, GridTransform) and isinstance(self.domain, GridTransform):
            return crop_frequencies(x, source, self.domain)
        return x


class LatentLosses(nn.Module):
    """The losses of all pairs and teachers, with the projectors that are trained.

    Args:
        pairs: which taps are compared.
        student: an activation of each tap, for its shape.
        teachers: the same for each teacher.
        transform: the domain of the forecasts; latents lie on it at their own resolution.
        bands: the partition for a pair without one.

    Raises:
        ValueError: if activations have no batch, channel and domain axes, or lie on domains that
            share no frequencies.
    """

    def __init__(
        self,
        pairs: Sequence[LatentPair],
        student: Mapping[str, Tensor],
        teachers: Sequence[Mapping[str, Tensor]],
        transform: AbstractTransform,
        bands: Bands,
    ) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.by_pair = nn.ModuleList()
        for pair in pairs:
            indices = range(len(teachers)) if pair.teacher_index is None else [pair.teacher_index]
            losses = nn.ModuleDict()
            for i in indices:
                mine, theirs = student[pair.student], teachers[i][pair.teacher]
                try:
                    loss = LatentLoss(pair, mine, theirs, transform, bands)
                except ValueError as error:
                    raise ValueError(f"`latents` {pair.name!r} of teacher {i}: {error}") from error
                losses[str(i)] = loss.to(mine)
            self.by_pair.append(losses)

    def forward(
        self,
        student: Mapping[str, Tensor],
        teachers: Sequence[Mapping[str, Tensor]],
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """The loss of each pair, without the pair's weight, as a weighted sum over teachers.

        The weights of the teachers sum to 1. A pair with one teacher has weight 1.
        """
        values: dict[str, Tensor] = {}
        for pair, module in zip(self.pairs, self.by_pair, strict=True):
            losses = {int(i): loss for i, loss in cast(nn.ModuleDict, module).items()}
            if pair.student not in student or any(pair.teacher not in teachers[i] for i in losses):
                raise ValueError(
                    f"the latents of {pair.name!r} were not given: expected the student's "
                    f"{pair.student!r} and each teacher's {pair.teacher!r}."
                )
            mine = student[pair.student]
            each = torch.stack(
                [loss(mine, teachers[i][pair.teacher]) for i, loss in losses.items()]
            )
            shares = weights[list(losses)] if len(losses) > 1 else torch.ones_like(each)
            values[pair.name] = (each * shares).sum()
        return values


def fold_into_channels(x: Tensor, transform: AbstractTransform) -> Tensor:
    """Latents with one channel axis: frames and other axes are folded into it.

    Example:
        >>> fold_into_channels(torch.zeros(2, 5, 3, 8, 8), GridTransform((8, 8))).shape
        torch.Size([2, 15, 8, 8])
    """
    if x.ndim < 1 - min(transform.channel_axis, *transform.domain_axes):
        raise ValueError(
            f"a tapped activation has shape {tuple(x.shape)}, expected a batch axis, channels "
            f"(axis {transform.channel_axis}) and a domain (axes {transform.domain_axes})."
        )
    channel = transform.channel_axis % x.ndim
    domain = [a % x.ndim for a in transform.domain_axes]
    others = [a for a in range(1, x.ndim) if a not in (channel, *domain)]
    if not others:
        return x
    flat = x.permute(0, *domain, *others, channel).flatten(1 + len(domain))
    return flat.movedim(-1, transform.channel_axis)


def _frequency_loss(
    pair: LatentPair, domain: AbstractTransform, bands: Bands
) -> AbstractFeatureLoss:
    weighting = [1.0] * bands.n_bands if pair.weighting is None else pair.weighting
    # A copy: each loss measures averages of its own.
    loss = FrequencyAlignedLoss(domain, bands, copy.deepcopy(weighting))
    if loss.weighting.needs_teacher_error:
        raise ValueError(
            f"`weighting` is a {type(loss.weighting).__name__} that needs labels, but latents have "
            "none; expected 'fixed', 'relative', 'adaptive', numbers, or one that was measured "
            "beforehand (decay=None)."
        )
    return FrequencyFeatureLoss(loss)


def check_pairs(pairs: Sequence[LatentPair], n_teachers: int) -> None:
    """Refuse what is no pair, a teacher that does not exist, or a pair given twice."""
    for pair in pairs:
        check_type("latents", pair, LatentPair, "such as LatentPair('latent', 'latent')")
        if (pair.teacher_index or 0) >= n_teachers:
            raise ValueError(
                f"`LatentPair.teacher_index` is {pair.teacher_index}, expected a teacher from 0 to "
                f"{n_teachers - 1}."
            )
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"`latents` is {names}, expected each pair once.")
