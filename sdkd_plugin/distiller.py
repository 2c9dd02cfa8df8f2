"""One training step of distillation in a loop of one's own: student, teachers, labels.

What a forecast is compared with is in `loss`; optimizers, epochs and data are the caller's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sdkd_plugin._checks import check_batch, check_finite, check_shape, check_type
from sdkd_plugin._explained import explained
from sdkd_plugin.augmentation import Augmentation, AugmentationName, make_augmentation
from sdkd_plugin.loss import DistillationLoss, DistillationTerms
from sdkd_plugin.losses.task import TaskLoss, TaskLossName, make_task_loss, masked_error
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
            keeps the shape. Teacher and student are compared on the augmented ``x``, the labels
            with a second forecast, of ``x`` as it is. It excludes options that judge a teacher by
            labels.
        example: inputs ``{"x": ..., **inputs}`` of any batch size; needed with ``latents``.
            With stored outputs it has the ``index`` of its samples too.
        **options: of `DistillationLoss`: ``weighting``, ``kd_weight``, ``aggregation``,
            ``teacher_bound``, ``resolutions``, ``latents``, ``check_finite``.

    Raises:
        ValueError: as `DistillationLoss`, and if teacher and student share weights.

    Example:
        >>> import torch
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
        augmentation: AugmentationName | Augmentation | None = None,
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
        self.task_loss = make_task_loss(task_loss)
        self.augmentation = None if augmentation is None else make_augmentation(augmentation)
        if self.augmentation is not None and self.loss.stored is not None:
            raise ValueError(
                "`augmentation` is given with stored outputs, but the teachers must run on the "
                "augmented inputs: leave it out, and precompute with `augmentation` and `views`."
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
                augmented = self.augmentation(x)
                check_shape("augmentation(x)", augmented.shape, x.shape, "it keeps the shape")
                x = augmented
                if loss.check_finite:
                    check_finite("augmentation(x)", x)
        mine = call_model(self.student, x, accepted, loss.student_taps)
        if task is None:
            task = mine.forecast.new_zeros(())
            if y is not None:
                task = masked_error(mine.forecast, y, mask, self.task_loss)
        terms = loss.compare(mine.forecast, x, y, mask, mine.latents, outputs, inputs, index)
        return terms.with_task(task)
