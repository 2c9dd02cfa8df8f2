"""Distillation by neuraloperator's own, unmodified ``Trainer``: its loss and its samples."""

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from neuralop import LpLoss
from neuralop.data.transforms.data_processors import DataProcessor
from torch import Tensor, nn
from torch.utils.data import StackDataset

from sdkd_plugin._checks import check_shape, check_type
from sdkd_plugin.adapters.neuralop.units import check_same_units
from sdkd_plugin.distributed import DistributedSync, average_measurements, several_processes
from sdkd_plugin.loss import DistillationLoss, DistillationTerms
from sdkd_plugin.losses import SpectralLoss
from sdkd_plugin.losses.task import TaskLossName, make_task_loss, masked_error
from sdkd_plugin.on_policy import StudentAugmentation, augmentation_for, augmented
from sdkd_plugin.taps import TapReader
from sdkd_plugin.teachers import (
    StoredOutputs,
    TeacherOutput,
    accepted_inputs,
    check_no_shared_weights,
    named_inputs,
    warn_of_other_boundary,
)

_LATENT = "teacher."
_FOR_THE_LOSS = ("y", "mask", "teacher", "index")


class TrainerLoss:
    """A distillation loss and a task loss as ``training_loss`` of a neuraloperator ``Trainer``.

    Give the trainer ``model=student`` and an optimizer of
    ``[*student.parameters(), *loss.parameters()]``; put the loss on the trainer's device, which
    moves the student alone. The trainer calls the student and then ``loss(out, **sample)``, and
    expects a sum over the batch. Student, teachers and labels are in the units that the data
    processor makes of the sample: normalised ones if it has normalisers.

    A sample has ``x`` and ``y``, and it may have

    - ``mask``: True where a label is observed; as many axes as ``y``, each of its size or 1. It is
      False everywhere for an unlabelled input, whose ``y`` has the same shape and any value,
    - ``teacher``: the teacher's forecast for ``x`` in the units of the model's output, with its
      latents as ``teacher.TAP``. Without it the teachers run in every step,
    - ``index``: its number, if the loss has stored outputs in place of teachers.

    A student whose forward does not name these does not receive them. Without gradient, as the host
    evaluates, it is the task loss alone, in physical units, at any resolution and step of a
    rollout: it may be one of the trainer's ``eval_losses``.

    With ``use_distributed=True`` the host wraps the student, on GPUs alone: on CPUs pass
    ``Trainer(model=DistributedDataParallel(student), ...)``. Projectors and measured band weights
    are kept the same on all processes.

    Args:
        loss: the distillation; with one teacher if the samples hold its outputs.
        student: the model that the trainer trains.
        task_loss: ``mse``, ``mae``, ``relative_l2`` or a `SpectralLoss`, a mean over the observed
            labels; or a function called as the host calls it, ``task_loss(out, y=y, ...)`` for a
            sum over the batch, such as ``LpLoss(d=2)``. Unlabelled samples are left out of its
            batch, and the sum is scaled to all samples. If only some labels of a sample are
            missing, a function with a parameter ``mask`` receives it, for `LpLoss` both fields are
            set to 0 there, and any other function is refused.
        augmentation: of ``x``, as of `SDKDDistiller`: student and teachers are compared on the
            augmented ``x``, which costs a second forecast. For ``on-policy`` a forecast has the
            units of ``x``.
        on_step: called with the terms of every training step, to log them.
        data_processor: the trainer's, to compare with ``teacher_processor``.
        teacher_processor: the one that the teacher was trained with. A teacher with other
            normalisers is refused: see `Renormalized`.

    Raises:
        ValueError: if an argument has a wrong type, ``task_loss`` averages over the batch, teacher
            and student share weights, or the processors normalise differently or one is missing;
            at a step, see `DistillationLoss.forward`, or if the task loss cannot take the mask.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sdkd_plugin import DistillationLoss, GridTransform
        >>> teacher, student = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
        >>> loss = TrainerLoss(DistillationLoss(teacher, GridTransform((8, 8))), student)
        >>> x, y = torch.randn(2, 4, 1, 8, 8)
        >>> loss(student(x), x=x, y=y).shape
        torch.Size([])
    """

    def __init__(
        self,
        loss: DistillationLoss,
        student: nn.Module | None = None,
        task_loss: TaskLossName | Callable[..., Tensor] = "mse",
        *,
        augmentation: StudentAugmentation | None = None,
        on_step: Callable[[DistillationTerms], None] | None = None,
        data_processor: DataProcessor | None = None,
        teacher_processor: DataProcessor | None = None,
    ) -> None:
        check_type("loss", loss, DistillationLoss, "DistillationLoss(teacher, transform)")
        check_type("student", student, nn.Module, "the model that the trainer trains")
        student = cast(nn.Module, student)
        check_no_shared_weights(loss.teachers, student)
        warn_of_other_boundary(student, loss.transform)
        if data_processor is not None and teacher_processor is not None:
            check_same_units(data_processor, teacher_processor)
        elif teacher_processor is not None:
            remedy = "give the trainer's too, to compare them."
            raise ValueError(f"`teacher_processor` is given but `data_processor` is None: {remedy}")
        self.loss = loss
        self.task_loss = _host_loss(task_loss)
        self.augmentation = augmentation_for(student, augmentation)
        if self.augmentation is not None and (loss.stored is not None or loss.needs_labels):
            raise ValueError(
                "`augmentation` is given, but the teachers' outputs are stored, or an option uses "
                "labels; augmented inputs have neither: leave one of them out."
            )
        self.student = student
        self.on_step = on_step
        self.last_terms: DistillationTerms | None = None
        # What a teacher names. One that takes any keyword would warn of what is not for it.
        self._inputs = frozenset().union(*(named_inputs(each)[0] for each in loss.teachers))
        self._taps = TapReader(student, loss.student_taps)
        self._taps.attach()
        try:
            hook = student.register_forward_pre_hook(_input_filter(student), with_kwargs=True)
        except RuntimeError as error:
            raise ValueError(
                f"`student` is a {type(student).__name__}, which takes no hooks, expected a plain "
                "module: script the student after training."
            ) from error
        # The student outlives this loss, its hooks must not.
        weakref.finalize(self, _remove_hooks, [hook, *self._taps.handles])
        self._sync = DistributedSync(loss)

    def __call__(
        self,
        out: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mask: Tensor | None = None,
        teacher: Tensor | None = None,
        index: Tensor | None = None,
        **sample: Any,
    ) -> Tensor:
        """The loss of a batch, summed over its samples; its parts are in ``last_terms``."""
        if y is None:
            raise ValueError("`y` is None, expected labels of the forecast's shape in the sample.")
        # The host's data processors move x and y to the device, and nothing else.
        for name, value in sample.items():
            sample[name] = value.to(out.device) if isinstance(value, Tensor) else value
        if mask is not None:
            mask = mask.to(out.device)
        if not torch.is_grad_enabled():
            return self.task_loss(out, x=x, y=y, mask=mask, **sample)
        if several := several_processes():
            self._sync.join()
        compared: tuple[Tensor | None, ...] = out, x, y, mask
        if self.augmentation is not None and self.loss.kd_weight > 0:
            if x is None or teacher is not None:
                raise ValueError(
                    "`augmentation` is given, but the sample has no `x` or the teacher's outputs: "
                    "the teachers must run on the augmented inputs."
                )
            accepted = accepted_inputs(self.student, sample)
            moved = augmented(self.augmentation, x, accepted, finite=self.loss.check_finite)
            compared = self.student(moved, **accepted), moved, None, None
        outputs = None
        if teacher is not None:
            known = {n[len(_LATENT) :]: v for n, v in sample.items() if n.startswith(_LATENT)}
            outputs = [TeacherOutput(teacher.to(out.device), known)]
        inputs = {name: sample[name] for name in self._inputs & sample.keys()} if sample else {}
        latents = self._taps.read() if self.loss.latents else None
        known = {"outputs": outputs, "index": index}
        terms = self.loss(*compared, latents=latents, **known, **inputs)
        task = self.task_loss(out, x=x, y=y, mask=mask, **sample) / len(out)
        terms = terms.with_task(task)
        if several:
            average_measurements(self.loss)
        # Without its graph, which the next step would still hold.
        self.last_terms = dataclasses.replace(terms, total=terms.total.detach())
        if self.on_step is not None:
            self.on_step(self.last_terms)
        return terms.total * len(out)

    def state_dict(self) -> dict[str, Tensor]:
        """What is trained or measured beside the student, whom the host saves."""
        return dict(self.loss.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned; a ValueError if of a loss with other parts."""
        if state.keys() != self.loss.state_dict().keys():
            raise ValueError(
                f"`state` has {sorted(state)}, expected {sorted(self.loss.state_dict())}: make the "
                "loss with the weighting, latents and aggregation of the saved run."
            )
        self.loss.load_state_dict(state)


def _host_loss(task_loss: TaskLossName | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of forecast, labels, mask and the rest of a sample that sums over the batch."""
    if not callable(task_loss) or isinstance(task_loss, SpectralLoss):
        function = make_task_loss(task_loss)
        return lambda out, *, y, mask, **_: masked_error(out, y, mask, function) * len(out)
    if getattr(task_loss, "reduction", "sum") == "mean":
        raise ValueError(
            f"`task_loss` is a {type(task_loss).__name__} with reduction='mean', expected 'sum': "
            "the trainer's losses are sums over the batch."
        )
    parameters = inspect.signature(task_loss).parameters
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    # The host's own losses take any keyword, and warn of each.
    any_name &= not type(task_loss).__module__.startswith("neuralop.")

    def loss(out: Tensor, *, y: Tensor, mask: Tensor | None, **sample: Any) -> Tensor:
        if y.shape != out.shape:
            check_shape("y", y.shape, out.shape, "the student's forecast")
        if not any_name:
            known = sample.keys() & parameters.keys()
            sample = {name: sample[name] for name in known} if known else {}
        if mask is None:
            return task_loss(out, y=y, **sample)
        mask = mask.expand_as(y)
        labelled = mask.flatten(1).any(1)
        rows = dict(sample)
        for name, value in sample.items():
            if isinstance(value, Tensor) and value.shape[:1] == y.shape[:1]:
                rows[name] = value[labelled]
        out, y, mask = out[labelled], y[labelled], mask[labelled]
        if not len(out):
            return out.sum()
        share = len(labelled) / len(out)
        if "mask" in parameters:
            return share * task_loss(out, y=y, mask=mask, **rows)
        if not bool(mask.all()):
            if type(task_loss) is not LpLoss:
                # A derivative sees the jump of zeroed fields at the edge, a mean their zeros.
                given = getattr(task_loss, "__name__", type(task_loss).__name__)
                raise ValueError(
                    f"`mask` leaves out some labels of a sample, but `task_loss` ({given}) has no "
                    "parameter `mask`: give one that has, LpLoss, or 'mse', 'mae' or 'relative_l2'."
                )
            out, y = torch.where(mask, out, 0), torch.where(mask, y, 0)
        return share * task_loss(out, y=y, **rows)

    return loss


def _remove_hooks(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _input_filter(student: nn.Module) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook that keeps from the student what is for the loss, unless forward names it."""
    named = named_inputs(student)[0]

    def inputs(
        _: nn.Module, args: tuple[Any, ...], sample: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {
            name: value
            for name, value in sample.items()
            if name in named or not (name in _FOR_THE_LOSS or name.startswith(_LATENT))
        }

    return inputs


def distillation_dataset(
    x: Float[Tensor, "samples ..."],
    y: Float[Tensor, "samples ..."],
    labelled: Bool[Tensor, " samples"] | None = None,
    teacher: TeacherOutput | StoredOutputs | None = None,
) -> StackDataset[Any]:
    """Samples ``{"x", "y", "mask", "teacher", ...}`` as `TrainerLoss` and the trainer read them.

    Args:
        x: inputs.
        y: labels. Those of unlabelled samples are replaced by NaN, so that none can leak.
        labelled: which samples have labels; all by default.
        teacher: the teacher's output for all samples, as `sdkd_plugin.precompute` returns it. For a
            cache, whose samples are numbered as these, they have an ``index``.

    Raises:
        ValueError: if the numbers of samples differ.
    """
    output: dict[str, Tensor] = {}
    if isinstance(teacher, StoredOutputs):
        output = {"index": torch.arange(len(x))}
    elif teacher is not None:
        latents = {f"{_LATENT}{tap}": value for tap, value in teacher.latents.items()}
        output = {"teacher": teacher.forecast, **latents}
    for name, value in {"y": y, "labelled": labelled, **output}.items():
        if value is not None:
            check_shape(name, value.shape[:1], x.shape[:1], "one for each sample of x")
    parts: dict[str, Any] = {"x": x, "y": y, **output}
    if labelled is not None:
        mask = labelled.reshape(-1, *[1] * (y.ndim - 1))
        parts |= {"y": torch.where(mask, y, torch.nan), "mask": mask}
    return StackDataset(**parts)
