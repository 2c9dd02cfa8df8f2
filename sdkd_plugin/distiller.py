"""One training step of distillation: who forecasts, what is compared, and the sum of it.

Here lives `SDKDDistiller`; what a step gives is in `terms`. Optimisers, epochs and data are the
hosts'; asking the models is in `answers`, what is compared between latents in `latents`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sdkd_plugin._checks import check_choice, check_finite, check_mask, check_positive, check_shape
from sdkd_plugin.answers import (
    Resolutions,
    TeacherAnswer,
    accepted_inputs,
    ask,
    check_answers,
    forward_parameters,
    warn_of_empty_bands,
)
from sdkd_plugin.augmentation import Augmentation, AugmentationName, augment, make_augmentation
from sdkd_plugin.latents import LatentLosses, LatentPair
from sdkd_plugin.losses import (
    AbstractAggregation,
    AbstractWeighting,
    AggregationName,
    CAMKDAggregation,
    FrequencyAlignedLoss,
    FrequencyTerms,
    TeacherEvidence,
    WeightingName,
    make_aggregation,
    teacher_gradients,
    weighted_target,
)
from sdkd_plugin.losses.bound import bounded_samples
from sdkd_plugin.losses.task import TASK_LOSSES, TaskLoss, observed_mean
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.terms import DistillationTerms


class SDKDDistiller(nn.Module):
    """Frozen teachers, a student, and the loss that pulls the one towards the others.

    Formula: ``total = task + kd_weight * (<d, g(L) d> + sum_p weight_p latent_p)`` with
    d = student's forecast - teacher's, g the weighted band masks and L the domain's Laplacian.
    Of several teachers the weighted mean forecast is taken, which to this quadratic form is as
    good as the weighted sum of their losses.

    The distiller owns its teachers: they are in eval mode, without gradients, and moved along with
    the distiller, but not in ``parameters()``, ``state_dict()`` or ``train()``. Optimise
    ``distiller.parameters()``: the student's and the projectors'.

    Args:
        teacher: any module, or several; called as ``teacher(x, **inputs)`` with those inputs that
            its forward accepts.
        student: any module whose forecast has the teacher's shape.
        transform: the domain of the forecasts.
        bands: how its frequencies group; two bands below and from a quarter of the highest
            frequency by default.
        weighting: what each band counts for: ``fixed``, ``relative``, ``adaptive``,
            ``confidence``, or a module; a sequence of numbers is fixed, from low to high. By
            default the lowest band counts 1 and the others 2: the paper's form with an alpha of
            1/2, our own choice. All 1 is plain MSE distillation.
        kd_weight: what the teacher counts for against the labels; 0 never asks the teacher.
        task_loss: ``mse``, ``mae``, or a function of forecast and labels that returns the loss of
            each element.
        aggregation: of several teachers: ``mean`` (AVER-MKD), ``aekd``, ``camkd``, or a module.
        teacher_bound: where a number, a labelled sample's forecast follows the teacher only while
            the student is worse than it by more than minus this margin: the squared error against
            the label, a mean over the sample, plus the margin exceeds the teacher's. Unlabelled
            samples always follow. Latents have no labels and are not bounded, and AEKD's weights
            are those of all samples.
        augmentation: of the inputs, for function matching in `step`: ``mixup``, ``noise``, or a
            function of ``x`` that keeps its shape. Teacher and student see the same augmented
            input; the labels are compared with a second forecast, of the input as it is. Other
            inputs, such as covariates, stay as they are. It has no labels, so it goes with nothing
            that judges the teacher by them.
        resolutions: ``equal`` refuses a teacher whose forecast has another shape than the
            student's. ``shared`` lets it have another resolution on a grid: what counts are the
            frequencies that both have. A teacher that reads at one resolution only is given as
            `AtResolution`. CAMKD and measured weightings take the student's word where a teacher
            carries less.
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

    Source: arXiv 2507.02939; ``teacher_bound``: Chen et al. 2017, "Learning efficient object
    detection models with knowledge distillation", eq. 4, with a sample in place of a box;
    ``augmentation``: Beyer et al. 2022, arXiv 2106.05237.
    """

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        student: nn.Module,
        transform: AbstractTransform,
        bands: Bands | None = None,
        *,
        weighting: WeightingName | AbstractWeighting | Sequence[float] = "fixed",
        kd_weight: float = 1.0,
        task_loss: Literal["mse", "mae"] | TaskLoss = "mse",
        aggregation: AggregationName | AbstractAggregation = "mean",
        teacher_bound: float | None = None,
        augmentation: AugmentationName | Augmentation | None = None,
        resolutions: Resolutions = "equal",
        latents: Sequence[LatentPair] = (),
        example: Mapping[str, Any] | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        check_positive("kd_weight", kd_weight, allow_zero=True)
        if teacher_bound is not None:
            check_positive("teacher_bound", teacher_bound, allow_zero=True)
        if not callable(task_loss):
            check_choice("task_loss", task_loss, TASK_LOSSES)
        teachers: tuple[nn.Module, ...]
        if isinstance(teacher, nn.ModuleList) or not isinstance(teacher, nn.Module):
            teachers = tuple(teacher)
        else:
            teachers = (teacher,)
        if not teachers:
            raise ValueError("`teacher` is an empty sequence, expected at least one teacher.")
        for each in teachers:
            if each is student or _state_ids(each) & _state_ids(student):
                raise ValueError(
                    "`teacher` and `student` share weights, expected modules with none in common: "
                    "a frozen teacher would freeze the student; give one a `copy.deepcopy`."
                )
            each.eval().requires_grad_(False)
        # In a tuple, where nn.Module does not look: teachers are nobody's parameters or state.
        self._teachers: tuple[nn.Module, ...] = teachers
        self.student = student
        self.loss = FrequencyAlignedLoss(transform, bands or Bands.split(0.25), weighting)
        self.aggregation: AbstractAggregation = (
            aggregation
            if isinstance(aggregation, AbstractAggregation)
            else make_aggregation(aggregation)
        )
        self.aggregation.check(len(teachers))
        self.kd_weight = kd_weight
        self.task_loss = task_loss if callable(task_loss) else TASK_LOSSES[task_loss]
        self.teacher_bound = teacher_bound
        self.augmentation = None if augmentation is None else make_augmentation(augmentation)
        if self.augmentation is not None:
            self._check_augmented()
        check_choice("resolutions", resolutions, get_args(Resolutions))
        self.resolutions = resolutions
        self.check_finite = check_finite
        self._looked_at_bands = False
        self.latents = tuple(latents)
        self.latent_losses = self._fit_latents(example) if latents else None

    def _check_augmented(self) -> None:
        """Refuse what asks for labels of augmented inputs, which have none."""
        judging = {
            "teacher_bound": self.teacher_bound is not None,
            "aggregation 'camkd'": isinstance(self.aggregation, CAMKDAggregation),
            "weighting 'confidence'": self.loss.weighting.needs_teacher_error,
        }
        if asked := [name for name, asks in judging.items() if asks]:
            raise ValueError(
                f"`augmentation` is given with {' and '.join(asked)}, expected nothing that judges "
                "a teacher by labels: augmented inputs have none; leave one of them out."
            )

    def _fit_latents(self, example: Mapping[str, Any] | None) -> LatentLosses:
        """Make the losses and projectors of the latents, of the shapes that an example has."""
        if example is None or "x" not in example:
            raise ValueError(
                "`example` is needed with `latents`: give inputs {'x': ..., **inputs} to learn "
                "the shapes of the latents from."
            )
        inputs = dict(example)
        x = inputs.pop("x")
        modes = {module: module.training for module in self.student.modules()}
        self.student.eval()
        with torch.no_grad():
            answers = self.teach(x, **inputs)
            latents = ask(self.student, x, inputs, self.student_taps).latents
        for module, training in modes.items():
            module.training = training
        of_teachers = [answer.latents for answer in answers]
        return LatentLosses(
            self.latents, latents, of_teachers, self.loss.transform, self.loss.bands
        ).to(x)

    @property
    def teachers(self) -> tuple[nn.Module, ...]:
        """The frozen teachers."""
        return self._teachers

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Taps of the student that the latent pairs name."""
        return tuple(dict.fromkeys(pair.student for pair in self.latents))

    def teacher_taps(self, index: int) -> tuple[str, ...]:
        """Taps of one of the teachers that the latent pairs name."""
        pairs = (pair for pair in self.latents if pair.of in (None, index))
        return tuple(dict.fromkeys(pair.teacher for pair in pairs))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SDKDDistiller":
        """Move the teachers along with everything else."""
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
            for i, teacher in enumerate(self._teachers):
                teacher.eval()
                answers.append(ask(teacher, x, inputs, self.teacher_taps(i)))
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
        # Before the student forecasts, lest a NaN enter its running statistics.
        self._check_batch(x, y, mask, inputs)
        task = None
        if self.augmentation is not None and self.kd_weight > 0:
            if answers is not None:
                raise ValueError(
                    "`answers` is given with an `augmentation`: nobody has asked the teacher about "
                    "the augmented inputs yet; leave one of them out."
                )
            if y is not None:
                task = observed_mean(self.task_loss, self(x, **inputs), y, mask)
            x, y, mask = augment(self.augmentation, x, finite=self.check_finite), None, None
        forecast, latents = ask(self.student, x, inputs, self.student_taps)
        return self._compare(forecast, x, y, mask, task, latents, answers, inputs)

    def terms(
        self,
        forecast: Float[Tensor, "batch ..."],
        x: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        task: Float[Tensor, ""] | None = None,
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
            task: the task term, where a host has computed it from its own labels; then ``y`` and
                ``mask`` only tell how good a teacher is, to what asks for that.
            latents: the student's activations by tap, as a `TapReader` reads them.
            answers: as `step`.
            **inputs: as `step`.

        Raises:
            ValueError: as `step`, and if latents are distilled but not given.
        """
        self._check_batch(x, y, mask, inputs)
        return self._compare(forecast, x, y, mask, task, latents or {}, answers, inputs)

    def _check_batch(
        self,
        x: Tensor,
        y: Tensor | None,
        mask: Tensor | None,
        inputs: Mapping[str, Any],
    ) -> None:
        models = (self.student, *self._teachers)
        if unknown := inputs.keys() - {n for m in models for n in accepted_inputs(m, inputs)}:
            raise ValueError(
                f"the inputs {sorted(unknown)} are accepted by neither student nor teacher; "
                f"the student takes {forward_parameters(self.student)}."
            )
        if mask is not None:
            if y is None:
                raise ValueError("`mask` is given but `y` is None: there are no labels to mask.")
            check_mask(mask, y)
        if not self.check_finite:
            return
        check_finite("x", x)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                check_finite(name, value)
        if y is not None:
            check_finite("y", y if mask is None else y[mask.expand_as(y)])

    def _compare(
        self,
        forecast: Tensor,
        x: Tensor,
        y: Tensor | None,
        mask: Tensor | None,
        task: Tensor | None,
        latents: Mapping[str, Tensor],
        answers: Sequence[TeacherAnswer] | None,
        inputs: Mapping[str, Any],
    ) -> DistillationTerms:
        if task is None and y is not None:
            if self.kd_weight == 0 and mask is not None and not bool(mask.any()):
                raise ValueError("`mask` is False everywhere and kd_weight is 0: nothing to learn.")
            task = observed_mean(self.task_loss, forecast, y, mask)
        elif task is None:
            if self.kd_weight == 0:
                raise ValueError("`y` is None and kd_weight is 0: there is nothing to learn from.")
            task = forecast.new_zeros(())
        if self.kd_weight == 0:
            return DistillationTerms(task, task.detach(), None, {}, None, None)
        answers = check_answers(
            self.teach(x, **inputs) if answers is None else answers,
            self._teachers,
            forecast,
            self.loss.transform,
            resolutions=self.resolutions,
            finite=self.check_finite,
        )
        if self.check_finite and not self._looked_at_bands:
            self._looked_at_bands = True
            warn_of_empty_bands(answers, self._teachers, self.loss.transform, self.loss.bands)
        kd, teacher_weights = self._distil(forecast, answers, y, mask)
        total = kd.total
        features: dict[str, Tensor] = {}
        if self.latent_losses is not None:
            of_teachers = [answer.latents for answer in answers]
            features = self.latent_losses(latents, of_teachers, teacher_weights)
            for pair in self.latents:
                total = total + pair.weight * features[pair.name]
        return DistillationTerms(
            total=task + self.kd_weight * total,
            task=task.detach(),
            frequency=kd.errors,
            features={name: value.detach() for name, value in features.items()},
            band_weights=kd.weights.detach(),
            teacher_weights=teacher_weights,
        )

    def _distil(
        self,
        forecast: Tensor,
        answers: Sequence[TeacherAnswer],
        y: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[FrequencyTerms, Tensor]:
        """The frequency-aligned loss to what the teachers say together, and their weights."""
        if len(answers) == 1:
            target = answers[0].forecast
            counts = self._counts(forecast, target, y, mask)
            return self.loss.terms(forecast, target, y, mask, counts=counts), target.new_ones(1)
        teachers = torch.stack([answer.forecast for answer in answers])
        gradients = band_weights = None
        if self.aggregation.needs_gradients:
            # The bands' weights are settled first: a weighting may keep averages of what it sees.
            with torch.no_grad():
                middle = self.loss.terms(forecast, teachers.mean(0), y, mask)
            band_weights = middle.weights
            loss = partial(self.loss.total, weights=band_weights)
            gradients = teacher_gradients(loss, forecast, teachers)
        weights = self.aggregation(TeacherEvidence(teachers, gradients, y, mask))
        target = weighted_target(teachers, weights)
        counts = self._counts(forecast, target, y, mask)
        terms = self.loss.terms(forecast, target, y, mask, weights=band_weights, counts=counts)
        return terms, weights if weights.ndim == 1 else weights.mean(0)

    def _counts(
        self, forecast: Tensor, target: Tensor, y: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """What each sample's forecast counts for: 0 where it is better than the teacher's."""
        if self.teacher_bound is None or y is None:
            return None
        check_shape("y", y.shape, forecast.shape, "the student's forecast")
        return bounded_samples(forecast, target, y, self.teacher_bound, mask)


def _state_ids(model: nn.Module) -> set[int]:
    """Identities of a model's parameters and buffers."""
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
