"""What is compared between the tapped latents of a student and its teachers.

Here live the pairs of taps and the module that holds their projectors and losses. The losses
themselves are in `sdkd_plugin.losses.features`; reading activations is in `taps`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_positive
from sdkd_plugin.losses import AbstractWeighting, ChannelProjector, WeightingName
from sdkd_plugin.losses.features import FeatureLossName, make_feature_loss
from sdkd_plugin.spectral import AbstractTransform, Bands, GridTransform
from sdkd_plugin.spectral.crop import crop_frequencies, shared_grid


@dataclass(frozen=True)
class LatentPair:
    """A tap of the student that shall follow a tap of the teacher.

    Attributes:
        student: tap of the student, a name it lists or a module path.
        teacher: tap of the teacher, likewise.
        weight: what the pair counts for beside the forecast's frequency-aligned loss.
        loss: ``frequency``, ``fitnets``, ``attention`` or ``boundary``.
        bands: partition of the latents' frequencies for ``frequency``; by default the distiller's.
        weighting: of these bands; by default all count alike.
        of: which teacher, where there are several; by default each of them.

    Raises:
        ValueError: if the weight is not positive or the loss is unknown.
    """

    student: str = "latent"
    teacher: str = "latent"
    weight: float = 1.0
    loss: FeatureLossName = "frequency"
    bands: Bands | None = None
    weighting: WeightingName | AbstractWeighting | Sequence[float] | None = None
    of: int | None = None

    def __post_init__(self) -> None:
        check_positive("LatentPair.weight", self.weight)
        check_choice("LatentPair.loss", self.loss, get_args(FeatureLossName))

    @property
    def name(self) -> str:
        """How the pair's loss is named in the terms of a step."""
        name = (
            f"{self.student}<-{self.teacher}"
            if self.of is None
            else (f"{self.student}<-{self.of}.{self.teacher}")
        )
        return name if self.loss == "frequency" else f"{name} ({self.loss})"


class LatentLoss(nn.Module):
    """One pair's loss for one teacher: fold, crop, project, compare.

    Frames and other axes that a model keeps apart count as channels. Latents of different
    resolution are compared on the frequencies that both have, never by interpolation. A student
    of another width is projected to the teacher's channels where the loss compares elements.

    Args:
        pair: which loss.
        student: an activation of the student's tap, for its shape.
        teacher: an activation of the teacher's tap, for its shape.
        transform: the domain of the forecasts; latents lie on it at their own resolution.
        bands: where the pair has none of its own.

    Raises:
        ValueError: if the activations have no batch, channel and domain axes, or lie on domains
            that share no frequencies.
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
        self.student_domain, self.teacher_domain, self.domain = _domains(
            pair, transform, mine, theirs
        )
        axis = transform.channel_axis
        self.loss = make_feature_loss(
            pair.loss,
            self.domain,
            channels=theirs.shape[axis],
            bands=(pair.bands or bands) if pair.loss == "frequency" else pair.bands,
            weighting=pair.weighting,
        )
        self.projector = (
            ChannelProjector(mine.shape[axis], theirs.shape[axis], axis)
            if self.loss.needs_projector
            else None
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The pair's loss, a scalar without its weight."""
        mine = _restrict(fold_into_channels(student, self.domain), self.student_domain, self.domain)
        theirs = _restrict(
            fold_into_channels(teacher.detach(), self.domain), self.teacher_domain, self.domain
        )
        return self.loss(mine if self.projector is None else self.projector(mine), theirs)


def fold_into_channels(x: Tensor, transform: AbstractTransform) -> Tensor:
    """Latents with one channel axis: frames and whatever else a model keeps apart become channels.

    Raises:
        ValueError: if there is no batch axis before the domain and its channels.

    Example:
        >>> import torch
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


def _domains(
    pair: LatentPair, transform: AbstractTransform, mine: Tensor, theirs: Tensor
) -> tuple[AbstractTransform, AbstractTransform, AbstractTransform]:
    """The student's, the teacher's and the shared domain of a pair's latents."""
    sizes = [tuple(x.shape[a] for a in transform.domain_axes) for x in (mine, theirs)]
    try:
        first, second = (transform.resized(size) for size in sizes)
    except ValueError as error:
        raise ValueError(
            f"the student's tap {pair.student!r} has shape {tuple(mine.shape)} and the teacher's "
            f"{pair.teacher!r} {tuple(theirs.shape)}, which do not both lie on the domain: {error}"
        ) from error
    # Only grids have several sizes: a graph's `resized` has refused another by now.
    if isinstance(first, GridTransform) and isinstance(second, GridTransform):
        return first, second, first if sizes[0] == sizes[1] else shared_grid(first, second)
    return first, second, first


def _restrict(x: Tensor, source: AbstractTransform, target: AbstractTransform) -> Tensor:
    if isinstance(source, GridTransform) and isinstance(target, GridTransform):
        return crop_frequencies(x, source, target)
    return x


class LatentLosses(nn.Module):
    """The losses of all pairs and teachers, with their projectors: what is trained and dropped.

    Args:
        pairs: which taps follow which.
        student: an activation of each of the student's taps, for its shape.
        teachers: the same for each teacher.
        transform: the domain of the forecasts.
        bands: where a pair has none of its own.

    Raises:
        ValueError: as `LatentLoss`; if a pair is there twice or names a teacher that is not.
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
        names = [pair.name for pair in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"`latents` has the pairs {names}, expected each of them once.")
        self.pairs = tuple(pairs)
        self.by_pair = nn.ModuleList()
        for pair in pairs:
            losses = nn.ModuleDict()
            for i in _teachers_of(pair, len(teachers)):
                mine, theirs = student[pair.student], teachers[i][pair.teacher]
                try:
                    loss = LatentLoss(pair, mine, theirs, transform, bands)
                except ValueError as error:
                    raise ValueError(f"`latents` {pair.name!r} of teacher {i}: {error}") from error
                losses[str(i)] = loss.to(mine.device)
            self.by_pair.append(losses)

    def forward(
        self,
        student: Mapping[str, Tensor],
        teachers: Sequence[Mapping[str, Tensor]],
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Each pair's loss, unweighted by the pair, its teachers weighted.

        Args:
            student: activations by tap.
            teachers: the same for each teacher.
            weights: of the teachers, summing to 1.

        Raises:
            ValueError: if an activation is missing.
        """
        values: dict[str, Tensor] = {}
        for pair, module in zip(self.pairs, self.by_pair, strict=True):
            losses = {int(i): loss for i, loss in cast(nn.ModuleDict, module).items()}
            if pair.student not in student or any(pair.teacher not in teachers[i] for i in losses):
                raise ValueError(
                    f"the latents of {pair.name!r} are distilled but were not given: expected the "
                    f"student's {pair.student!r} and each teacher's {pair.teacher!r}."
                )
            mine = student[pair.student]
            each = torch.stack(
                [loss(mine, teachers[i][pair.teacher]) for i, loss in losses.items()]
            )
            # One of several teachers, chosen for this pair, counts fully whatever its weight.
            shares = weights[list(losses)] if len(losses) > 1 else torch.ones_like(each)
            values[pair.name] = (each * shares).sum()
        return values


def _teachers_of(pair: LatentPair, n_teachers: int) -> list[int]:
    if pair.of is None:
        return list(range(n_teachers))
    if not 0 <= pair.of < n_teachers:
        raise ValueError(
            f"`LatentPair.of` is {pair.of}, expected a teacher from 0 to {n_teachers - 1}."
        )
    return [pair.of]
