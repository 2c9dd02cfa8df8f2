"""The arms of a comparison: what each student learns from."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Arm:
    """One way to train a student.

    Args:
        name: for tables.
        labels: share of the training samples that have labels. A distilled arm learns from the
            teachers' forecasts of the others, too; a student alone leaves them out.
        unlabelled: whether a distilled arm uses the task's unlabelled inputs.
        teachers: how many of the teachers, the first ones; None is all.
        augmentation: as for `SDKDDistiller`; the teachers then forecast at every step.
        model: makes the model, if it is not the study's student.
        base: name of an arm that this one is also compared with.
        **options: of `DistillationLoss`, such as ``weighting``, ``kd_weight`` or ``latents``;
            ``kd_weight=0`` is the student alone.

    Raises:
        ValueError: if the share of labels is not in (0, 1]; a distilled arm may have none.

    Example:
        >>> Arm("plain-MSE distillation", weighting=(1.0, 1.0), labels=0.25).setting
        '25% of the labels'
    """

    def __init__(
        self,
        name: str,
        *,
        labels: float = 1.0,
        unlabelled: bool = True,
        teachers: int | None = None,
        augmentation: Any = None,
        model: Callable[[], nn.Module] | None = None,
        base: str | None = None,
        **options: Any,
    ) -> None:
        self.name, self.labels, self.unlabelled, self.teachers = name, labels, unlabelled, teachers
        self.augmentation, self.model, self.base, self.options = augmentation, model, base, options
        if not 0 <= labels <= 1 or (labels == 0 and self.alone):
            raise ValueError(f"`labels` is {labels} for {name!r}, expected a share in (0, 1].")

    @property
    def alone(self) -> bool:
        """Whether no teacher is used."""
        return self.options.get("kd_weight") == 0

    @property
    def setting(self) -> str:
        """The share of the labels, in words."""
        return "all labels" if self.labels == 1 else f"{100 * self.labels:.3g}% of the labels"


def standard_arms(
    n_bands: int = 2,
    *,
    weightings: Sequence[Any] = ("fixed",),
    latents: Sequence[Any] = (),
    labels: float = 1.0,
    **options: Any,
) -> list[Arm]:
    """The student alone, plain-MSE distillation, and SDKD with each weighting.

    Args:
        n_bands: of the task.
        weightings: as for `DistillationLoss`.
        latents: of the SDKD arms.
        labels: share of the training samples that have labels, in all arms.
        **options: of the distilled arms.

    Example:
        >>> [arm.name for arm in standard_arms(weightings=["fixed", "adaptive"])]
        ['student alone', 'plain-MSE distillation', 'SDKD, fixed', 'SDKD, adaptive']
    """
    plain = Arm("plain-MSE distillation", labels=labels, weighting=(1.0,) * n_bands, **options)
    options = {"labels": labels, "latents": tuple(latents), **options}
    named = {"SDKD" if len(weightings) == 1 else f"SDKD, {w}": w for w in weightings}
    spectral = [Arm(name, weighting=weighting, **options) for name, weighting in named.items()]
    return [Arm("student alone", labels=labels, kd_weight=0), plain, *spectral]


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that change with any value, weight or option in a value.

    Functions are told apart by name only.

    Example:
        >>> fingerprint([torch.zeros(2), {"a": 1}]) == fingerprint([torch.zeros(2), {"a": 2}])
        False
    """
    if isinstance(value, nn.Module):
        value = [repr(value), value.state_dict()]
    elif isinstance(value, Arm):
        value = {k: v for k, v in vars(value).items() if k not in ("name", "base", "model")}
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        data = flat.view(torch.uint8).numpy().tobytes()
        data += f"{value.dtype}{tuple(value.shape)}".encode()
    elif isinstance(value, Mapping):
        data = fingerprint(list(value.items())).encode()
    elif isinstance(value, list | tuple):
        data = ",".join(fingerprint(each) for each in value).encode()
    else:
        data = re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()
    return hashlib.sha256(data).hexdigest()[:12]
