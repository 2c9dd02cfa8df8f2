"""One training step of distillation in a loop of one's own: student, teachers, labels.

What a forecast is compared with is in `loss`; optimizers, epochs and data are the caller's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sdkd_plugin._checks import check_batch, check_type
from sdkd_plugin._explained import explained
from sdkd_plugin.loss import DistillationLoss, DistillationTerms
from sdkd_plugin.losses.derivatives import DerivativeMatching
from sdkd_plugin.losses.task import TaskLoss, TaskLossName, make_task_loss, masked_error
from sdkd_plugin.on_policy import StudentAugmentation, augmentation_for, augmented
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.teachers import (
    InputNames,
    StoredOutputs,
    Teacher,
    TeacherOutput,
    accepted_inputs,
    call_model,
    check_no_shared_weights,
    named_inputs,
    warn_of_other_boundary,
)


@explained
class SDKDDistiller(nn.Module):
    """A student, a `DistillationLoss` and a task loss.

    Formula: ``total = task(student, y) + distillation(student, teacher)``. Optimise
    ``distiller.parameters()``: the student's and the projectors'.

    Args:
        teacher: a module, a function, or several; see `DistillationLoss`.
        student: a module whose forecast has the teacher's shape.
        transform: the domain of the forecasts.
        bands: the partition of its frequencies; see `DistillationLoss`.
        task_loss: ``mse``, ``mae``, ``relative_l2``, or a function of forecast and labels that
            returns the loss of each element or of each sample (``reduction="none"`` in torch).
        augmentation: of ``x``, for function matching: ``mixup``, ``noise``, or a function that
            keeps the shape; or ``on-policy``, an `OnPolicy` of the student with its defaults.
            Teacher and student are compared on the augmented ``x``, the labels
            with a second forecast, of ``x`` as it is. It excludes options that judge a teacher by
            labels.
        derivatives: match the derivatives of student and teachers too, in random directions on the
            domain, which is also that of ``x``; a loss beside the others, times ``kd_weight``, and
            ``kd_derivatives`` in the terms.
        example: inputs ``{"x": ..., **inputs}`` of any batch size; needed with ``latents``.
            With stored outputs it has the ``index`` of its samples too.
        **options: of `DistillationLoss`: ``weighting``, ``kd_weight``, ``aggregation``,
            ``teacher_bound``, ``resolutions``, ``latents``, ``check_finite``.

    Raises:
        ValueError: as `DistillationLoss`, and if teacher and student share weights.

    Example:
        >>> from sdkd_plugin import Bands, GridTransform
        >>> teacher, student = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
        >>> distiller = SDKDDistiller(teacher, student, GridTransform((8, 8)), Bands.split(0.25))
        >>> x, y = torch.randn(2, 4, 1, 8, 8)
        >>> distiller.step(x, y).total.backward()

    Source: arXiv 2507.02939; ``augmentation``: Beyer et al. 2022, arXiv 2106.05237.
    """

    def __init__(
        self,
        teacher: Teacher | Sequence[Teacher] | StoredOutputs,
        student: nn.Module,
        transform: AbstractTransform,
        bands: Bands | None = None,
        *,
        task_loss: TaskLossName | TaskLoss = "mse",
        augmentation: StudentAugmentation | None = None,
        derivatives: DerivativeMatching | None = None,
        example: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_type("student", student, nn.Module, "the model to be trained")
        self.student = student
        self.loss = DistillationLoss(teacher, transform, bands, **options)
        self._inputs = named_inputs(student)
        self._known_inputs = InputNames.any_of((self._inputs, self.loss.inputs))
        check_no_shared_weights(self.loss.teachers, student)
        warn_of_other_boundary(student, self.loss.transform)
        self.task_loss = make_task_loss(task_loss)
        self.augmentation = augmentation_for(student, augmentation)
        if self.augmentation is not None and self.loss.stored is not None:
            raise ValueError(
                "`augmentation` is given with stored outputs, but the teachers must run on the "
                "augmented inputs: leave it out, and precompute with `augmentation` and `views`."
            )
        self.derivatives = derivatives
        if derivatives is not None and self.loss.stored is not None:
            raise ValueError(
                "`derivatives` is given with stored outputs, but the teachers must run near `x`: "
                "leave it out, or give live teachers."
            )
        if self.augmentation is not None and self.loss.needs_labels:
            raise ValueError(
                "`augmentation` is given with a `teacher_bound`, the aggregation 'camkd' or the "
                "weighting 'confidence', which need labels: leave one of them out."
            )
        if self.loss.latents:
            if not isinstance(example, Mapping) or "x" not in example:
                raise ValueError(
                    "`example` is needed with `latents`, for their shapes: give {'x': x, **inputs}."
                )
            self.loss.fit_latents(student, **example)

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """The student's forecast alone."""
        return self.student(x, **accepted_inputs(self._inputs, inputs))

    def step(
        self,
        x: Float[Tensor, "batch ..."],
        y: Float[Tensor, "batch ..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        outputs: Sequence[TeacherOutput] | None = None,
        index: Int[Tensor, " batch"] | None = None,
        **inputs: Any,
    ) -> DistillationTerms:
        """Forecast a batch with the student, and compare with labels and teachers.

        Args:
            x: inputs, the first axis the batch.
            y: labels of the forecast's shape, or None for an unlabelled batch.
            mask: True where a label is observed; as many axes as ``y``, each of its size or 1.
                Elsewhere ``y`` may have any value; student and teachers are compared there too.
                Without any observed label the task term is 0.
            outputs: of the teachers for this batch, if they are known.
            index: numbers of the samples in stored outputs; not used with live teachers. If these
                have augmented views, one is drawn for each sample, as with an ``augmentation``.
            **inputs: further inputs of the models, such as ``edge_index``; each model gets those
                that it accepts.

        Raises:
            ValueError: if shapes do not match, a value is NaN or Inf, a mask comes without labels,
                no model accepts an input, or there are neither labels nor a teacher with a weight.
        """
        loss = self.loss
        # Before the student's forecast: a NaN would stay in its running statistics.
        check_batch(x, y, mask, inputs, finite=loss.check_finite)
        known = self._known_inputs
        if not known.any_name and (unknown := inputs.keys() - known.names):
            raise ValueError(
                f"the inputs {sorted(unknown)} are accepted by neither student nor teacher, "
                f"expected some of {sorted(known.names)}."
            )
        if loss.kd_weight == 0 and (y is None or (mask is not None and not bool(mask.any()))):
            raise ValueError("`kd_weight` is 0 and the batch has no label: nothing to learn from.")
        accepted = accepted_inputs(self._inputs, inputs)
        task = None
        views = loss.stored if loss.stored is not None and loss.stored.views else None
        if (self.augmentation is not None or views is not None) and loss.kd_weight > 0:
            if outputs is not None:
                raise ValueError(
                    "`outputs` is given with an `augmentation`, but the teachers must run on the "
                    "augmented inputs: leave one of them out."
                )
            if y is not None:
                task = masked_error(self.student(x, **accepted), y, mask, self.task_loss)
            y = mask = None
            if views is not None and index is not None:
                index, x = views.draw_views(index, x)
            elif self.augmentation is not None:
                x = augmented(self.augmentation, x, accepted, finite=loss.check_finite)
        mine = call_model(self.student, x, accepted, loss.student_taps)
        if task is None:
            task = mine.forecast.new_zeros(())
            if y is not None:
                task = masked_error(mine.forecast, y, mask, self.task_loss)
        derivatives = self.derivatives if loss.kd_weight > 0 else None
        if derivatives is not None and outputs is None:
            outputs = loss.teacher_outputs(x, **inputs)
        terms = loss.compare(mine.forecast, x, y, mask, mine.latents, outputs, inputs, index)
        if derivatives is not None and outputs is not None:
            value = derivatives(
                lambda moved: self.student(moved, **accepted),
                lambda moved: _mean_forecast(loss.teacher_outputs(moved, **inputs)),
                x,
                mine.forecast,
                _mean_forecast(outputs),
                loss.transform,
                loss.bands,
            )
            features = {**terms.features, "derivatives": value.detach()}
            terms = replace(terms, total=terms.total + loss.kd_weight * value, features=features)
        return terms.with_task(task)


def _mean_forecast(outputs: Sequence[TeacherOutput]) -> Tensor:
    return torch.stack([each.forecast for each in outputs]).mean(0)
