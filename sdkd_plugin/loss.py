"""The distillation loss: what a student's forecast is compared with, and the parts of the result.

A student with its task loss is in `distiller`; calling teachers is in `teachers`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sdkd_plugin._checks import check_batch, check_choice, check_positive, check_shape, check_type
from sdkd_plugin._explained import explained
from sdkd_plugin.losses import AbstractAggregation, AbstractWeighting, AggregationName, LatentPair
from sdkd_plugin.losses.amplitude import AMSE
from sdkd_plugin.losses.band_weights import WeightingName
from sdkd_plugin.losses.frequency import FrequencyAlignedLoss, FrequencyTerms
from sdkd_plugin.losses.latents import LatentLosses, check_pairs
from sdkd_plugin.losses.task import sample_errors
from sdkd_plugin.losses.teacher_weights import (
    TeacherEvidence,
    make_aggregation,
    teacher_gradients,
    weighted_target,
)
from sdkd_plugin.losses.trust import TeacherTrust
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.teachers import (
    InputNames,
    Resolutions,
    StoredOutputs,
    Teacher,
    TeacherOutput,
    accepted_inputs,
    aliased_copy,
    call_model,
    check_taps,
    checked_forecasts,
    evaluated,
    frozen_copies,
    named_inputs,
    warn_of_empty_bands,
)


@dataclass(frozen=True)
class DistillationTerms:
    """The loss of a step and its parts; all but the total are without gradient.

    Attributes:
        total: ``kd_weight * (frequency-aligned loss + weighted latent losses)``, plus the task
            term after `with_task`.
        task: the loss against labels, 0 for an unlabelled batch; None before `with_task`.
        frequency: mean squared difference from the teacher in each band, unweighted, of shape
            ``(n_bands,)``; None if ``kd_weight`` is 0, where no teacher runs.
        features: the loss of each latent pair, unweighted, by ``"student<-teacher"``.
        band_weights: of shape ``(n_bands,)``, or None with ``frequency``.
        teacher_weights: of shape ``(n_teachers,)``, a mean over the batch if they differ by
            sample; or None with ``frequency``.
    """

    total: Tensor
    task: Tensor | None = None
    frequency: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    band_weights: Tensor | None = None
    teacher_weights: Tensor | None = None

    def with_task(self, task: Float[Tensor, ""]) -> "DistillationTerms":
        """The terms with a task term added to the total."""
        total = task if self.frequency is None else task + self.total
        return replace(self, total=total, task=task.detach())

    def scalars(self) -> dict[str, Tensor]:
        """Numbers without gradient, for a logger.

        Their names are ``total``, ``task``, ``kd_band_0``, ``weight_0`` and so on for each band,
        ``teacher_weight_0`` and so on, and ``kd_student<-teacher`` for each latent pair.
        """
        scalars = {"total": self.total.detach()}
        if self.task is not None:
            scalars["task"] = self.task
        vectors = (self.frequency, self.band_weights, self.teacher_weights)
        for name, values in zip(("kd_band", "weight", "teacher_weight"), vectors, strict=True):
            for i, value in enumerate(() if values is None else values):
                scalars[f"{name}_{i}"] = value
        return scalars | {f"kd_{name}": value for name, value in self.features.items()}


@explained
class DistillationLoss(nn.Module):
    """The loss between a student's forecast and frozen teachers; it knows no student.

    Formula: ``kd_weight * (<d, g(L) d> + sum_p weight_p latent_p)`` with d = student's forecast -
    teacher's, g the weighted band masks and L the domain's Laplacian. Several teachers are averaged
    first, which gives the same gradient as averaging their losses.

    Nothing given is changed. Teachers, transform, weighting and aggregation are copied; the weights
    of teachers and transform share memory with the originals until the loss is moved to another
    device or dtype. The teachers are in eval mode and without gradients, move with the loss, and
    are not in ``parameters()``, ``state_dict()`` or ``train()``. ``parameters()`` are the
    projectors'.

    Args:
        teacher: a module, a function, or several; called as ``teacher(x, **inputs)`` with the
            inputs that its signature accepts. A function runs as it is: freeze models inside it.
            Or their stored outputs, a `TeacherCache`; then a step takes its samples' ``index``.
        transform: the domain of the forecasts.
        bands: the partition of its frequencies; below and from a quarter of the highest by default.
        weighting: of the bands: ``fixed``, ``relative``, ``adaptive``, ``confidence``, numbers from
            the lowest band to the highest, or an `AbstractWeighting`. ``fixed`` is 1 for the lowest
            band and 2 for the others: the paper's form with an alpha of 1/2, our own choice. All 1
            is plain-MSE distillation.
        kd_weight: weight of this loss beside the task loss; with 0 no teacher runs.
        aggregation: of several teachers: ``mean`` (AVER-MKD), ``aekd``, ``camkd``, or an
            `AbstractAggregation`.
        teacher_bound: a margin in squared units, or None. Distil a labelled sample only if
            MSE(student, y) + margin > MSE(teacher, y). Unlabelled samples are always distilled, and
            latents too. AEKD's weights are computed from all samples.
        resolutions: ``equal`` refuses a teacher whose forecast has another shape than the
            student's. ``shared`` allows another resolution on a grid; the frequencies that both
            have are compared. Wrap a teacher that reads one resolution only in `AtResolution`.
        latents: pairs of taps to distil; call `fit_latents` before training.
        trust: lower teachers' weights in bands where `measure_teachers` finds them worse.
        amse: counts amplitude that the student lacks too, see `AMSE`; none by default.
        check_finite: look for NaN and Inf in inputs, labels and teachers' outputs in every step;
            a GPU is waited for.

    Raises:
        ValueError: if an option is unknown or of a wrong type, a weight is negative, or a teacher's
            tap does not exist.

    Example:
        >>> from sdkd_plugin import GridTransform
        >>> loss = DistillationLoss(nn.Conv2d(1, 1, 3, padding=1), GridTransform((8, 8)))
        >>> student, x = nn.Conv2d(1, 1, 1), torch.randn(4, 1, 8, 8)
        >>> loss(student(x), x).total.backward()

    Source: arXiv 2507.02939; ``teacher_bound``: Chen et al. 2017, "Learning efficient object
    detection models with knowledge distillation", eq. 4, with a sample in place of a box.
    """

    def __init__(
        self,
        teacher: Teacher | Sequence[Teacher] | StoredOutputs,
        transform: AbstractTransform,
        bands: Bands | None = None,
        *,
        weighting: WeightingName | AbstractWeighting | Sequence[float] = "fixed",
        kd_weight: float = 1.0,
        aggregation: AggregationName | AbstractAggregation = "mean",
        teacher_bound: float | None = None,
        resolutions: Resolutions = "equal",
        latents: Sequence[LatentPair] = (),
        trust: bool = True,
        amse: AMSE | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        check_positive("kd_weight", kd_weight, allow_zero=True)
        if teacher_bound is not None:
            check_positive("teacher_bound", teacher_bound, allow_zero=True)
        check_choice("resolutions", resolutions, get_args(Resolutions))
        check_type("latents", latents, Sequence, "such as [LatentPair('latent', 'latent')]")
        self.stored = teacher if isinstance(teacher, StoredOutputs) else None
        # In a tuple, where nn.Module does not look: no parameters or state of this loss.
        self.teachers = () if isinstance(teacher, StoredOutputs) else frozen_copies(teacher)
        names = [type(each).__name__ for each in self.teachers]
        kinds = names if self.stored is None else list(self.stored.names)
        self.names = [f"teacher {i} ({kind})" for i, kind in enumerate(kinds)]
        self.frequency = FrequencyAlignedLoss(
            aliased_copy(transform),
            Bands.split(0.25) if bands is None else bands,
            copy.deepcopy(weighting),
            amse=amse,
        )
        self.trust = TeacherTrust(self.bands.n_bands) if trust else None
        self.aggregation = copy.deepcopy(make_aggregation(aggregation))
        self.aggregation.check(len(kinds))
        self.kd_weight, self.teacher_bound = kd_weight, teacher_bound
        self.resolutions, self.check_finite = resolutions, check_finite
        # Whether labels decide how the teachers are weighted.
        self.needs_labels = (
            teacher_bound is not None
            or self.aggregation.needs_labels
            or self.frequency.needs_labels
        )
        self.latents = tuple(latents)
        self.latent_losses: LatentLosses | None = None
        check_pairs(self.latents, len(kinds))
        self.student_taps = tuple(dict.fromkeys(pair.student for pair in self.latents))
        self.teacher_taps = [
            tuple(dict.fromkeys(p.teacher for p in self.latents if p.teacher_index in (None, i)))
            for i in range(len(kinds))
        ]
        self._inputs = [named_inputs(each) for each in self.teachers]
        if self.stored is not None:
            self._check_stored(self.stored)
        for each, taps in zip(self.teachers, self.teacher_taps, strict=False):
            check_taps(each, taps)
        self.inputs = self.stored.inputs if self.stored else InputNames.any_of(self._inputs)
        self._seen_a_batch = False

    def _check_stored(self, stored: StoredOutputs) -> None:
        for name, taps, kept in zip(self.names, self.teacher_taps, stored.taps, strict=True):
            if missing := set(taps) - set(kept):
                raise ValueError(
                    f"`latents` has the taps {sorted(missing)} of {name}, but the stored outputs "
                    f"have {list(kept)}: precompute them with a loss that has these latents."
                )
        if stored.views and self.needs_labels:
            raise ValueError(
                "the stored outputs have augmented views, without labels, but `teacher_bound`, "
                "'camkd' and 'confidence' need labels: precompute without views."
            )

    def fit_latents(
        self, student: nn.Module, x: Tensor, *, index: Tensor | None = None, **inputs: Any
    ) -> "DistillationLoss":
        """Make the projectors of the latent pairs, for a student and an example of its inputs.

        The student is run once, in eval mode and without gradient, and not kept. ``x`` may have any
        batch size; ``inputs`` are further inputs of student and teachers. With stored outputs,
        ``index`` has the numbers of the samples. Returns this loss.

        Raises:
            ValueError: if a tap of the student does not exist, or latents do not fit.
        """
        check_taps(student, self.student_taps)
        with evaluated(student), torch.no_grad():
            outputs = self.outputs(index, x, inputs)
            accepted = accepted_inputs(student, inputs)
            latents = call_model(student, x, accepted, self.student_taps).latents
        shapes = latents, [output.latents for output in outputs]
        self.latent_losses = LatentLosses(self.latents, *shapes, self.transform, self.bands)
        return self

    @property
    def transform(self) -> AbstractTransform:
        """The domain of the forecasts."""
        return self.frequency.transform

    @property
    def bands(self) -> Bands:
        """The partition of its frequencies."""
        return self.frequency.bands

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationLoss":
        """Move the teachers along with everything else."""
        super()._apply(fn, recurse)
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        return self

    def outputs(
        self, index: Tensor | None, x: Tensor | None, inputs: Mapping[str, Any]
    ) -> tuple[TeacherOutput, ...]:
        """The teachers' outputs for a batch, stored or live."""
        if self.stored is not None:
            if index is None:
                raise ValueError(
                    "`index` is None and the teachers' outputs are stored: give the numbers of the "
                    "samples, or a live teacher in place of the stored outputs."
                )
            return self.stored.outputs(index, x)
        if x is None:
            raise ValueError("`x` and `outputs` are None, expected one of them.")
        return self.teacher_outputs(x, **inputs)

    @torch.no_grad()
    def teacher_outputs(self, x: Tensor, **inputs: Any) -> tuple[TeacherOutput, ...]:
        """The output of each teacher for inputs ``(batch, ...)``, without gradient.

        Each teacher gets those of the further inputs that it accepts.
        """
        outputs = []
        for teacher, names, taps in zip(
            self.teachers, self._inputs, self.teacher_taps, strict=True
        ):
            known = inputs.keys() <= names.names
            taken = inputs if known else accepted_inputs(names, inputs)
            outputs.append(call_model(teacher, x, taken, taps))
        return tuple(outputs)

    def forward(
        self,
        forecast: Float[Tensor, "batch ..."],
        x: Float[Tensor, "batch ..."] | None = None,
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        latents: Mapping[str, Tensor] | None = None,
        outputs: Sequence[TeacherOutput] | None = None,
        index: Int[Tensor, " batch *view"] | None = None,
        **inputs: Any,
    ) -> DistillationTerms:
        """The distillation terms of a student's forecast.

        Args:
            forecast: the student's.
            x: the inputs of the forecast, for teachers whose outputs are not given.
            y: labels of the forecast's shape, or None; used only by options that judge teachers.
            mask: True where a label is observed; as many axes as ``y``, each of its size or 1.
            latents: the student's activations by tap, if latents are distilled.
            outputs: of the teachers for this batch, if they are known.
            index: numbers of the samples in stored outputs; not used with live teachers.
            **inputs: further inputs of the teachers, such as ``edge_index``.

        Raises:
            ValueError: if shapes do not match, a value is NaN or Inf, a mask has no labels, or
                neither ``x`` nor ``outputs`` is given.
        """
        if not inputs.keys() <= self.inputs.names:
            inputs = accepted_inputs(self.inputs, inputs)
        check_batch(x, y, mask, inputs, finite=self.check_finite, forecast=forecast)
        return self.compare(forecast, x, y, mask, latents, outputs, inputs, index)

    def compare(
        self,
        forecast: Tensor,
        x: Tensor | None,
        y: Tensor | None,
        mask: Tensor | None,
        latents: Mapping[str, Tensor] | None,
        outputs: Sequence[TeacherOutput] | None,
        inputs: Mapping[str, Any],
        index: Tensor | None = None,
    ) -> DistillationTerms:
        """`forward` for a batch that `check_batch` has checked."""
        if self.kd_weight == 0:
            return DistillationTerms(forecast.new_zeros(()))
        if outputs is None:
            outputs = self.outputs(index, x, inputs)
        if y is not None and y.shape != forecast.shape:
            check_shape("y", y.shape, forecast.shape, "the student's forecast")
        transform, finite = self.frequency.transform, self.check_finite
        forecasts = checked_forecasts(
            outputs, self.names, forecast, transform, self.resolutions, finite
        )
        if finite and not self._seen_a_batch:
            self._seen_a_batch = True
            warn_of_empty_bands(forecasts, self.names, transform, self.bands)
        terms, weights = self._frequency_terms(forecast, forecasts, y, mask)
        total, features = terms.total, {}
        if self.latents:
            if self.latent_losses is None:
                raise ValueError(
                    "`latents` are distilled but their shapes are not known: call "
                    "`fit_latents(student, x, **inputs)` before the optimizer is made."
                )
            losses = self.latent_losses(latents or {}, [o.latents for o in outputs], weights)
            # A teacher's latent is trusted as its forecast is.
            share = 1.0 if self.trust is None else self.trust.weights.mean()
            for pair in self.latents:
                total = total + pair.weight * share * losses[pair.name]
                features[pair.name] = losses[pair.name].detach()
        total, band_weights = self.kd_weight * total, terms.weights.detach()
        return DistillationTerms(total, None, terms.errors, features, band_weights, weights)

    def _frequency_terms(
        self, forecast: Tensor, forecasts: list[Tensor], y: Tensor | None, mask: Tensor | None
    ) -> tuple[FrequencyTerms, Tensor]:
        """The frequency-aligned loss to the weighted mean of the teachers, and their weights."""
        band_weights, trust = None, None if self.trust is None else self.trust.weights
        if len(forecasts) == 1:
            target, weights = forecasts[0], forecasts[0].new_ones(1)
        else:
            teachers, gradients = torch.stack(forecasts), None
            if self.aggregation.needs_gradients:
                # The bands' weights come first: a weighting may keep averages of what it measures.
                with torch.no_grad():
                    known = self.frequency.terms(forecast, teachers.mean(0), y, mask, trust=trust)
                    band_weights, trust = known.weights, None
                loss = partial(self.frequency, weights=band_weights)
                gradients = teacher_gradients(loss, forecast, teachers)
            weights = self.aggregation(TeacherEvidence(teachers, gradients, y, mask))
            target = weighted_target(teachers, weights)
            weights = weights if weights.ndim == 1 else weights.mean(0)
        kept = None
        if self.teacher_bound is not None and y is not None:
            mine, labelled = sample_errors(forecast, y, mask)
            theirs, _ = sample_errors(target, y, mask)
            kept = (~labelled | (mine + self.teacher_bound > theirs)).to(mine.dtype)
        terms = self.frequency.terms(
            forecast, target, y, mask, weights=band_weights, sample_weights=kept, trust=trust
        )
        return terms, weights
