"""Distillation by neuraloperator's own, unmodified ``Trainer``.

Here live the loss that the trainer calls and the samples it reads. What a resumed run needs besides
is in `resuming`, what several processes need in `adapters.ranks`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from neuralop.data.transforms.data_processors import DataProcessor
from torch import Tensor, nn
from torch.utils.data import StackDataset

from sdkd_plugin._checks import check_shape
from sdkd_plugin.adapters.neuralop.units import check_same_units
from sdkd_plugin.adapters.ranks import RankSync
from sdkd_plugin.answers import TeacherAnswer, accepted_inputs
from sdkd_plugin.distiller import SDKDDistiller
from sdkd_plugin.losses.task import observed_mean
from sdkd_plugin.taps import TapReader
from sdkd_plugin.terms import DistillationTerms

_LATENT = "teacher."
_STUDENT = "student."


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

    None of these is handed to a student whose forward does not name it: the host's own models
    would warn of each.

    In evaluation, which the host does without gradients and in physical units, it is the task loss
    alone: of any resolution, at any step of a rollout, and without the teacher. So it can stand
    among the trainer's ``eval_losses``, as it does where none are given.

    With ``use_distributed=True`` the host wraps the student for GPUs. On CPUs it cannot: wrap it
    yourself, ``Trainer(model=DistributedDataParallel(distiller.student), ...)``. Projectors and
    measured band weights are kept the same on all processes either way.

    Args:
        distiller: with one teacher, where the samples hold its answers.
        on_step: called with the terms of every training step, to log them.
        data_processor: the trainer's, to compare with ``teacher_processor``.
        teacher_processor: the one that the teacher was trained behind. With other normalisers the
            teacher is refused: see `Renormalized`.

    Raises:
        ValueError: if the two processors normalise differently or only one is given, or the
            distiller has an augmentation; at a step, as `SDKDDistiller.terms`.

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

    def __init__(
        self,
        distiller: SDKDDistiller,
        *,
        on_step: Callable[[DistillationTerms], None] | None = None,
        data_processor: DataProcessor | None = None,
        teacher_processor: DataProcessor | None = None,
    ) -> None:
        if data_processor is not None and teacher_processor is not None:
            check_same_units(data_processor, teacher_processor)
        elif teacher_processor is not None:
            raise ValueError(
                "`teacher_processor` is given but `data_processor` is None: give the trainer's "
                "too, to compare them."
            )
        if distiller.augmentation is not None:
            raise ValueError(
                "`distiller` has an augmentation, but the host's trainer forecasts the inputs "
                "itself, before the loss is called: augment them in the data set or the data "
                "processor, so that teacher and student see the same."
            )
        self.distiller = distiller
        self.on_step = on_step
        self.last_terms: DistillationTerms | None = None
        self._taps = TapReader(distiller.student, distiller.student_taps)
        self._taps.attach()
        distiller.student.register_forward_pre_hook(_leave_out_labels, with_kwargs=True)
        self._ranks = RankSync(distiller)

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
        if not torch.is_grad_enabled():
            if y is None:
                raise ValueError("`y` is None in evaluation, expected the labels of the sample.")
            return observed_mean(self.distiller.task_loss, out, y, mask) * out.shape[0]
        self._ranks.join()
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
        terms = self.distiller.terms(
            out, x, y, mask, latents=self._taps.read(), answers=answers, **inputs
        )
        self._ranks.average()
        # Without its graph, which the next step would still hold.
        self.last_terms = dataclasses.replace(terms, total=terms.total.detach())
        if self.on_step is not None:
            self.on_step(self.last_terms)
        return terms.total * out.shape[0]

    def state_dict(self) -> dict[str, Tensor]:
        """What the distiller trains or measures beside the student, whom the host saves."""
        return {
            name: value
            for name, value in self.distiller.state_dict().items()
            # The host's models add metadata of theirs, which is no tensor.
            if not name.startswith(_STUDENT) and isinstance(value, Tensor)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: if it is of a distiller with other parts.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"`state` has {sorted(state)}, expected {sorted(self.state_dict())}: make the "
                "distiller with the weighting, latents and aggregation of the saved run."
            )
        self.distiller.load_state_dict(state, strict=False)


def _leave_out_labels(
    student: nn.Module, args: tuple[Any, ...], sample: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a student gets of the sample: all but what is for the loss, unless it asks for it."""
    named = inspect.signature(student.forward).parameters
    kept = {
        name: value
        for name, value in sample.items()
        if name in named or not (name in ("y", "mask", "teacher") or name.startswith(_LATENT))
    }
    return args, kept


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
