"""One training step of distillation: who forecasts, what is compared, and the sum of it.

Here live `SDKDDistiller` and what it takes and gives. Optimisers, epochs and data are the hosts'.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_finite, check_positive, check_shape
from sdkd_plugin.losses import (
    AbstractWeighting,
    ChannelProjector,
    FrequencyAlignedLoss,
    RelativeWeighting,
)
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.taps import TapReader

TaskLoss = Callable[[Tensor, Tensor], Tensor]
TASK_LOSSES: Mapping[str, TaskLoss] = {
    "mse": partial(F.mse_loss, reduction="none"),
    "mae": partial(F.l1_loss, reduction="none"),
}


@dataclass(frozen=True)
class LatentPair:
    """A tap of the student that shall follow a tap of the teacher.

    Attributes:
        student: tap of the student, a name it lists or a module path.
        teacher: tap of the teacher, likewise.
        weight: what the pair counts for beside the forecast's frequency-aligned loss.
        bands: partition of the latents' frequencies; by default the distiller's.
        weighting: of the bands; by default all count alike.
    """

    student: str = "latent"
    teacher: str = "latent"
    weight: float = 1.0
    bands: Bands | None = None
    weighting: AbstractWeighting | Sequence[float] | None = None


class TeacherAnswer(NamedTuple):
    """What a teacher says of a batch: its forecast, and the latents of the tapped places."""

    forecast: Tensor
    latents: Mapping[str, Tensor]


@dataclass(frozen=True)
class DistillationTerms:
    """A step's loss and its parts; all but the total are without gradient.

    Attributes:
        total: ``task + kd_weight * (frequency-aligned loss + weighted latent losses)``.
        task: the loss against the labels, 0 where nothing is labelled.
        frequency: mean squared difference from the teacher in each band, unweighted, of shape
            ``(n_bands,)``; None where ``kd_weight`` is 0 and no teacher was asked.
        features: the loss of each latent pair, unweighted, by ``"student<-teacher"``.
        band_weights: what each band counted for, or None as ``frequency``.
        teacher_weights: what each teacher counted for, of shape ``(n_teachers,)``.
    """

    total: Tensor
    task: Tensor
    frequency: Tensor | None
    features: Mapping[str, Tensor]
    band_weights: Tensor | None
    teacher_weights: Tensor


class SDKDDistiller(nn.Module):
    """A frozen teacher, a student, and the loss that pulls the one towards the other.

    Formula: ``total = task + kd_weight * (<d, g(L) d> + sum_p weight_p latent_p)`` with
    d = student's forecast - teacher's, g the weighted band masks and L the domain's Laplacian.
    A latent loss is the frequency-aligned loss of projected student and teacher latents, divided
    by the mean square of the teacher's.

    The distiller owns the teacher: it is in eval mode, without gradients, and moved along with
    the distiller, but it is not in ``parameters()``, ``state_dict()`` or ``train()``. Optimise
    ``distiller.parameters()``: the student's and the projectors'.

    Args:
        teacher: any module; called as ``teacher(x, **inputs)`` with those inputs that its
            forward accepts.
        student: any module whose forecast has the teacher's shape.
        transform: the domain of the forecasts.
        bands: how its frequencies group; two bands below and from a quarter of the highest
            frequency by default.
        weighting: what each band counts for; a sequence of numbers is fixed. By default
            `RelativeWeighting`. All 1 is plain MSE distillation.
        kd_weight: what the teacher counts for against the labels; 0 never asks the teacher.
        task_loss: ``mse``, ``mae``, or a function of forecast and labels that returns the loss of
            each element.
        latents: pairs of taps to distil; needs ``example``.
        example: inputs ``{"x": ..., **inputs}`` of any batch size, to learn the shapes of the
            latents from.
        check_finite: refuse NaN and Inf in inputs, labels and the teacher's forecast at every
            step. On a GPU this waits for the device; turn it off where that costs too much.

    Raises:
        ValueError: if an option is unknown, a weight is negative, a tap does not exist, or latents
            do not fit.

    Example:
        >>> from sdkd_plugin import Bands, GridTransform
        >>> teacher, student = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
        >>> distiller = SDKDDistiller(teacher, student, GridTransform((8, 8)), Bands.split(0.25))
        >>> x, y = torch.randn(2, 4, 1, 8, 8)
        >>> terms = distiller.step(x, y)
        >>> terms.total.backward()
        >>> terms.frequency.shape
        torch.Size([2])

    Source: arXiv 2507.02939.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        transform: AbstractTransform,
        bands: Bands | None = None,
        *,
        weighting: AbstractWeighting | Sequence[float] | None = None,
        kd_weight: float = 1.0,
        task_loss: Literal["mse", "mae"] | TaskLoss = "mse",
        latents: Sequence[LatentPair] = (),
        example: Mapping[str, Any] | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        check_positive("kd_weight", kd_weight, allow_zero=True)
        if not callable(task_loss):
            check_choice("task_loss", task_loss, TASK_LOSSES)
        if teacher is student:
            raise ValueError("`teacher` and `student` are one module, expected two.")
        # In a tuple, where nn.Module does not look: the teacher is nobody's parameter or state.
        self._teachers = (teacher.eval().requires_grad_(False),)
        self.student = student
        bands = bands or Bands.split(0.25)
        weighting = RelativeWeighting() if weighting is None else weighting
        self.loss = FrequencyAlignedLoss(transform, bands, weighting)
        self.kd_weight = kd_weight
        self.task_loss = task_loss if callable(task_loss) else TASK_LOSSES[task_loss]
        self.check_finite = check_finite
        self.latents = tuple(latents)
        self.latent_losses = nn.ModuleList()
        self.projectors = nn.ModuleList()
        if latents:
            self._fit_latents(example)

    def _fit_latents(self, example: Mapping[str, Any] | None) -> None:
        """Make a loss and a projector for each pair, of the shapes that an example has."""
        if example is None or "x" not in example:
            raise ValueError(
                "`example` is needed with `latents`: give inputs {'x': ..., **inputs} to learn "
                "the shapes of the latents from."
            )
        inputs = dict(example)
        x = inputs.pop("x")
        was_training = self.student.training
        self.student.eval()
        with torch.no_grad():
            (answer,) = self.teach(x, **inputs)
            _, activations = self._run(self.student, x, inputs, self.student_taps)
        self.student.train(was_training)
        transform = self.loss.transform
        axis = transform.channel_axis
        for pair in self.latents:
            check_positive("LatentPair.weight", pair.weight)
            mine, theirs = activations[pair.student], answer.latents[pair.teacher]
            same = mine.ndim == theirs.ndim >= -min(axis, transform.domain_axes[0])
            if not same or _without(mine, axis) != _without(theirs, axis):
                raise ValueError(
                    f"the student's tap {pair.student!r} has shape {tuple(mine.shape)} and the "
                    f"teacher's {pair.teacher!r} {tuple(theirs.shape)}: expected latents that "
                    f"differ in their channels (axis {axis}) only."
                )
            domain = tuple(theirs.shape[a] for a in transform.domain_axes)
            bands = pair.bands or self.loss.bands
            weighting = [1.0] * bands.n_bands if pair.weighting is None else pair.weighting
            self.latent_losses.append(
                FrequencyAlignedLoss(transform.resized(domain), bands, weighting)
            )
            self.projectors.append(ChannelProjector(mine.shape[axis], theirs.shape[axis], axis))
        self.projectors.to(x.device)
        self.latent_losses.to(x.device)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teachers[0]

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Taps of the student that the latent pairs name."""
        return tuple(dict.fromkeys(pair.student for pair in self.latents))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Taps of the teacher that the latent pairs name."""
        return tuple(dict.fromkeys(pair.teacher for pair in self.latents))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SDKDDistiller":
        """Move the teacher along with everything else."""
        super()._apply(fn, recurse)
        for teacher in self._teachers:
            teacher._apply(fn, recurse)
        return self

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """The student's forecast alone."""
        return self.student(x, **accepted_inputs(self.student, inputs))

    def teach(self, x: Tensor, **inputs: Any) -> tuple[TeacherAnswer, ...]:
        """What each teacher says of a batch, without gradient.

        Args:
            x: as for `step`.
            **inputs: as for `step`.

        Returns:
            an answer a teacher; `step` takes them as ``answers``.
        """
        answers = []
        with torch.no_grad():
            for teacher in self._teachers:
                teacher.eval()
                forecast, latents = self._run(teacher, x, inputs, self.teacher_taps)
                answers.append(TeacherAnswer(forecast, latents))
        return tuple(answers)

    def step(
        self,
        x: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        answers: Sequence[TeacherAnswer] | None = None,
        **inputs: Any,
    ) -> DistillationTerms:
        """Forecast a batch with the student, and compare with labels and teacher.

        Args:
            x: inputs, the first axis the batch.
            y: labels, of the forecast's shape; None where the batch is unlabelled and only the
                teacher speaks.
            mask: which labels count, True where observed; of as many axes as ``y``, each of its
                size or 1. It touches the task term only: student and teacher forecast everywhere.
                Where it is False, ``y`` may be anything. Without any observed label the task term
                is 0.
            answers: the teacher's answers to this very batch, where they are known already.
            **inputs: whatever else the models' forward takes, such as ``edge_index``; each model
                gets those it accepts.

        Returns:
            the terms; call ``terms.total.backward()``.

        Raises:
            ValueError: if shapes do not match, a value is NaN or Inf, a mask comes without labels,
                an input is accepted by neither model, or there are neither labels nor a teacher
                that counts.
        """
        used = accepted_inputs(self.student, inputs).keys() | {
            name for t in self._teachers for name in accepted_inputs(t, inputs)
        }
        if unknown := inputs.keys() - used:
            raise ValueError(
                f"the inputs {sorted(unknown)} are accepted by neither student nor teacher; "
                f"the student takes {_parameters(self.student)}."
            )
        forecast, latents = self._run(self.student, x, inputs, self.student_taps)
        return self.terms(forecast, x, y, mask, latents=latents, answers=answers, **inputs)

    def terms(
        self,
        forecast: Float[Tensor, "batch ..."],
        x: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        latents: Mapping[str, Tensor] | None = None,
        answers: Sequence[TeacherAnswer] | None = None,
        **inputs: Any,
    ) -> DistillationTerms:
        """As `step`, for a forecast that the student has made already.

        Args:
            forecast: the student's.
            x: as `step`; read by a teacher that has not answered yet.
            y: as `step`.
            mask: as `step`.
            latents: the student's activations by tap, as a `TapReader` reads them.
            answers: as `step`.
            **inputs: as `step`.

        Raises:
            ValueError: as `step`, and if latents are distilled but not given.
        """
        if y is None and (mask is not None or self.kd_weight == 0):
            what = "a mask is given" if mask is not None else "kd_weight is 0"
            raise ValueError(f"`y` is None but {what}: there is nothing to learn from.")
        if self.check_finite:
            check_finite("x", x)
        task = forecast.new_zeros(()) if y is None else self._task(forecast, y, mask)
        if self.kd_weight == 0:
            ones = forecast.new_ones(1)
            return DistillationTerms(task, task.detach(), None, {}, None, ones)
        answers = self.teach(x, **inputs) if answers is None else answers
        (answer,) = answers
        target = answer.forecast.detach()
        check_shape("student's forecast", forecast.shape, target.shape, "the teacher's forecast")
        if self.check_finite:
            check_finite("teacher's forecast", target)
        kd = self.loss.terms(forecast, target)
        total = kd.total
        features = self._features(latents or {}, answer)
        for pair, value in zip(self.latents, features.values(), strict=True):
            total = total + pair.weight * value
        return DistillationTerms(
            total=task + self.kd_weight * total,
            task=task.detach(),
            frequency=kd.errors,
            features={name: value.detach() for name, value in features.items()},
            band_weights=kd.weights.detach(),
            teacher_weights=forecast.new_ones(len(answers)),
        )

    def _task(self, forecast: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        check_shape("y", y.shape, forecast.shape, "the student's forecast")
        if mask is None:
            if self.check_finite:
                check_finite("y", y)
            return self.task_loss(forecast, y).mean()
        if mask.dtype != torch.bool:
            raise ValueError(
                f"`mask` is of {mask.dtype}, expected torch.bool, True where observed."
            )
        if mask.ndim != y.ndim or any(
            m not in (1, n) for m, n in zip(mask.shape, y.shape, strict=True)
        ):
            raise ValueError(
                f"`mask` has shape {tuple(mask.shape)}, expected {tuple(y.shape)} as the labels, "
                "or 1 along an axis where it is the same."
            )
        mask = mask.expand_as(y)
        # What was not observed may be NaN, and NaN times a mask of 0 would still be NaN.
        y = torch.where(mask, y, forecast.detach().to(y.dtype))
        if self.check_finite:
            check_finite("y", y)
        errors = self.task_loss(forecast, y)
        check_shape("task_loss", errors.shape, y.shape, "with a mask it is the loss of elements")
        return torch.where(mask, errors, 0).sum() / mask.sum().clamp_min(1)

    def _features(self, latents: Mapping[str, Tensor], answer: TeacherAnswer) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for pair, loss, projector in zip(
            self.latents, self.latent_losses, self.projectors, strict=True
        ):
            missing = [n for n in (pair.student,) if n not in latents]
            missing += [n for n in (pair.teacher,) if n not in answer.latents]
            if missing:
                raise ValueError(
                    f"the latents of {missing} are distilled but were not given; expected those "
                    f"of the student's {self.student_taps} and the teacher's {self.teacher_taps}."
                )
            target = answer.latents[pair.teacher].detach()
            energy = target.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            value = loss(projector(latents[pair.student]), target) / energy
            values[f"{pair.student}<-{pair.teacher}"] = value
        return values

    @staticmethod
    def _run(
        model: nn.Module, x: Tensor, inputs: Mapping[str, Any], taps: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with TapReader(model, taps) as reader:
            forecast = model(x, **accepted_inputs(model, inputs))
        return forecast, reader.read()


def _without(x: Tensor, axis: int) -> list[int]:
    """The shape of ``x`` but for its batch and one axis."""
    return [n for i, n in enumerate(x.shape) if i not in (0, axis % x.ndim)]


def _parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of a model's forward, without its first."""
    return list(inspect.signature(model.forward).parameters)[1:]


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the named inputs that a model's forward takes.

    Example:
        >>> accepted_inputs(nn.Bilinear(2, 2, 1), {"input2": 1, "edge_index": 2})
        {'input2': 1}
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(inputs)
    names = {p.name for p in parameters}
    return {name: value for name, value in inputs.items() if name in names}
