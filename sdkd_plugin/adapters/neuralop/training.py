"""Distillation by neuraloperator's own, unmodified ``Trainer``."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import StackDataset

from sdkd_plugin._checks import check_shape
from sdkd_plugin.answers import TeacherAnswer, accepted_inputs
from sdkd_plugin.distiller import DistillationTerms, SDKDDistiller
from sdkd_plugin.taps import TapReader

_LATENT = "teacher."


class TrainerLoss:
    """A distiller as the ``training_loss`` of a neuraloperator ``Trainer``.

    Give the trainer ``model=distiller.student`` and an optimizer of ``distiller.parameters()``.
    The trainer moves the student alone: put the distiller on the trainer's device beforehand.
    It calls the student and then ``loss(out, **sample)``; the loss is summed over the
    batch, as the trainer expects. What it sees is what the data processor made of the sample: with
    normalisers the student, the teacher and the labels are all in normalised units.

    A sample holds ``x`` and ``y``, and it may hold

    - ``mask``: which labels count, as `SDKDDistiller.step` takes it; all False for an input that
      nobody labelled (``y`` must still have its shape there, and may be NaN),
    - ``teacher``: the teacher's forecast for ``x``, in the units of the model's output, where it is
      known already, and its latents as ``teacher.TAP``. Without them it is asked at every step.

    Args:
        distiller: with one teacher.

    Raises:
        ValueError: at a step, as `SDKDDistiller.terms`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sdkd_plugin import GridTransform, SDKDDistiller
        >>> teacher, student = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
        >>> loss = TrainerLoss(SDKDDistiller(teacher, student, GridTransform((8, 8))))
        >>> x, y = torch.randn(2, 4, 1, 8, 8)
        >>> loss(student(x), x=x, y=y).shape
        torch.Size([])
    """

    def __init__(self, distiller: SDKDDistiller) -> None:
        self.distiller = distiller
        self.last_terms: DistillationTerms | None = None
        self._taps = TapReader(distiller.student, distiller.student_taps)
        self._taps.attach()

    def __call__(
        self,
        out: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        mask: Tensor | None = None,
        teacher: Tensor | None = None,
        **sample: Any,
    ) -> Tensor:
        """The loss of a batch, summed over its samples; its parts are in ``last_terms``."""
        # The host's data processors move x and y to the device, and nothing else.
        mask = None if mask is None else mask.to(out.device)
        answers = None
        if teacher is not None:
            latents = {
                name.removeprefix(_LATENT): value.to(out.device)
                for name, value in sample.items()
                if name.startswith(_LATENT)
            }
            answers = [TeacherAnswer(teacher.to(out.device), latents)]
        # The host gives the student the whole sample; a teacher gets what it takes of it.
        inputs = {
            name: value.to(out.device) if isinstance(value, Tensor) else value
            for model in self.distiller.teachers
            for name, value in accepted_inputs(model, sample, named_only=True).items()
        }
        self.last_terms = self.distiller.terms(
            out, x, y, mask, latents=self._taps.read(), answers=answers, **inputs
        )
        return self.last_terms.total * out.shape[0]


def distillation_dataset(
    x: Float[Tensor, "samples ..."],
    y: Float[Tensor, "samples ..."],
    labelled: Bool[Tensor, " samples"] | None = None,
    teacher: TeacherAnswer | None = None,
) -> StackDataset[Any]:
    """Samples ``{"x", "y", "mask", "teacher", ...}``, as `TrainerLoss` and the trainer take them.

    Args:
        x: inputs.
        y: labels. Those of unlabelled samples are replaced by NaN, so that none can leak.
        labelled: which samples have labels; by default all.
        teacher: what the teacher says of all samples, where it is known already, as
            ``distiller.teach`` gives it.

    Raises:
        ValueError: if the numbers of samples differ.
    """
    n = len(x)
    answer: dict[str, Tensor] = {}
    if teacher is not None:
        latents = {f"{_LATENT}{tap}": value for tap, value in teacher.latents.items()}
        answer = {"teacher": teacher.forecast, **latents}
    for name, value in {"y": y, "labelled": labelled, **answer}.items():
        if value is not None:
            check_shape(name, value.shape[:1], (n,), "one for each sample of x")
    parts: dict[str, Any] = {"x": x, "y": y, **answer}
    if labelled is not None:
        mask = labelled.reshape(-1, *[1] * (y.ndim - 1))
        parts |= {"y": torch.where(mask, y, torch.nan), "mask": mask}
    return StackDataset(**parts)
