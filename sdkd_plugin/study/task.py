"""A comparison's task and arms: what is forecast and scored, and what each student learns from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import default_collate

from sdkd_plugin._checks import check_finite, check_labels, check_positive_int, check_type, shown
from sdkd_plugin._explained import explained
from sdkd_plugin.data.symmetry import Symmetry
from sdkd_plugin.losses.task import TaskLoss, TaskLossName
from sdkd_plugin.report import forecast_scores
from sdkd_plugin.report.records import fingerprint
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.teachers import accepted_inputs

PARTS = ("train", "validation", "test")


@explained
@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs and labels on the CPU, in the models' units; their first axis is the sample.

    Args:
        x: what a model reads.
        y: what it shall forecast; any value where ``mask`` is False.
        mask: True where ``y`` was observed; as many axes as ``y``, each of its size or 1.
        inputs: further inputs of the models, by name.
    """

    x: Float[Tensor, "samples ..."]
    y: Float[Tensor, "samples ..."]
    mask: Bool[Tensor, "samples ..."] | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def collect(cls, dataset: Any) -> "Samples":
        """The samples of a map-style data set of dicts ``{"x": ..., "y": ..., **inputs}``.

        Example:
            >>> sample = {"x": torch.zeros(3), "y": torch.zeros(1), "u": torch.zeros(2)}
            >>> Samples.collect([sample, sample]).inputs["u"].shape
            torch.Size([2, 2])
        """
        columns = default_collate([dataset[i] for i in range(len(dataset))])
        return cls(columns.pop("x"), columns.pop("y"), columns.pop("mask", None), columns)

    def __len__(self) -> int:
        return len(self.x)

    def select(self, rows: Tensor | slice, device: torch.device | str = "cpu") -> "Samples":
        """Some of the samples, on a device."""
        mask = None if self.mask is None else self.mask[rows].to(device)
        inputs = {name: value[rows].to(device) for name, value in self.inputs.items()}
        return Samples(self.x[rows].to(device), self.y[rows].to(device), mask, inputs)


@explained
@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """A forecasting problem: data, split, domain and metrics.

    Args:
        train: for training; an arm may use the labels of a share of them only.
        validation: for the choice of every model's weights among those of its training.
        test: for the scores.
        transform: the domain of the forecasts.
        bands: of its frequencies, for distillation and scores.
        shared: inputs that all samples share, such as ``edge_index``.
        task_loss: of training and validation, as for `SDKDDistiller`.
        scale: of physical units; scores are those of ``scale * value + offset``.
        offset: of physical units.
        units: scale and offset of ``input`` and ``output`` in physical units, where they are not
            those of the scores.
        at: time steps, from 0 along axis 1, that get an MAE of their own, by name.
        extra_scores: further scores of a forecast and the test samples, both in physical units.
        measure: the score that arms are compared by.
        baselines: forecasts without training, by name: functions of samples in the models' units.
        labels_first: of a share of labelled samples, whether it is the first; else it is drawn.
        symmetry: each sample gets a random element of it in every step of every arm, and so do its
            labels and the teachers' stored forecasts; where latents are distilled the teachers
            forecast at every step.
        name: for rows and tables.
        source: where the data come from, for tables.
        positions: of the nodes of a graph, for maps: east and north, in one unit.
        channels: of a frame on a grid, whose frames are channels too, for curves by step.

    Raises:
        ValueError: if lengths differ, or inputs or observed labels are NaN or Inf.
    """

    train: Samples
    validation: Samples
    test: Samples
    transform: AbstractTransform
    bands: Bands
    shared: Mapping[str, Any] = field(default_factory=dict)
    task_loss: TaskLossName | TaskLoss = "mse"
    scale: float | Tensor = 1.0
    offset: float | Tensor = 0.0
    units: Mapping[str, tuple[float | Tensor, float | Tensor]] = field(default_factory=dict)
    at: Mapping[str, int] = field(default_factory=dict)
    extra_scores: Callable[[Tensor, Samples], Mapping[str, float]] | None = None
    measure: str = "mse"
    baselines: Mapping[str, Callable[[Samples], Tensor]] = field(default_factory=dict)
    labels_first: bool = False
    symmetry: Symmetry | None = None
    name: str = "task"
    source: str = "tensors"
    positions: Float[Tensor, "nodes 2"] | None = None
    channels: int = 1

    def __post_init__(self) -> None:
        for name, part in zip(PARTS, (self.train, self.validation, self.test), strict=True):
            lengths = {key: len(each) for key, each in {"y": part.y, **part.inputs}.items()}
            if set(lengths.values()) != {len(part)}:
                raise ValueError(f"`{name}` has {len(part)} samples, but {lengths} of the others.")
            check_finite(f"{name}.x", part.x)
            check_labels(part.y, part.mask, f"{name}.y")

    @cached_property
    def identity(self) -> str:
        """Changes with all data and options that scores depend on; with functions' names only."""
        parts = [(s.x, s.y, s.mask, s.inputs) for s in (self.train, self.validation, self.test)]
        units = [self.task_loss, self.scale, self.offset, self.at]
        domain = [self.transform, self.transform.domain_axes, self.bands]
        identity = [parts, self.shared, units, domain, self.labels_first]
        if (group := self.symmetry) is not None:
            identity += [group.name, group.elements(self.train.y.shape[-group.axes :])]
        if self.extra_scores is not None:
            identity.append(self.extra_scores)
        return fingerprint(identity)

    def labelled(self, share: float, seed: int) -> Bool[Tensor, " samples"]:
        """Which training samples have labels, if only a share of them has."""
        n, generator = len(self.train), torch.Generator().manual_seed(seed)
        order = torch.arange(n) if self.labels_first else torch.randperm(n, generator=generator)
        return torch.zeros(n, dtype=torch.bool).index_fill(0, order[: round(share * n)], True)

    def batches(
        self, samples: Samples, device: torch.device | str = "cpu", size: int = 50
    ) -> Iterator[dict[str, Any]]:
        """Keyword arguments of a model for all samples, a chunk of ``size`` at a time."""
        for start in range(0, len(samples), size):
            part = samples.select(slice(start, start + size), device)
            yield {"x": part.x, **self.shared, **part.inputs}

    @torch.no_grad()
    def forecast(
        self, model: nn.Module, samples: Samples, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "samples ..."]:
        """A model's forecasts in its own units, on the CPU; the model is left in eval mode."""
        model.eval()
        batches = ((batch.pop("x"), batch) for batch in self.batches(samples, device))
        return torch.cat([model(x, **accepted_inputs(model, more)).cpu() for x, more in batches])

    def scores(self, forecast: Float[Tensor, "samples ..."]) -> dict[str, float]:
        """Scores of a forecast of the test samples."""
        forecast, truth = self.physical(forecast), replace(self.test, y=self.physical(self.test.y))
        given = (forecast, truth.y, self.transform, self.bands)
        scores = forecast_scores(*given, mask=truth.mask, at=self.at)
        return scores | dict(self.extra_scores(forecast, truth) if self.extra_scores else {})

    def physical(self, values: Tensor) -> Tensor:
        """Values of the models' units in physical ones."""
        return self.scale * values + self.offset


@explained
class Arm:
    """One way to train a student.

    Args:
        name: for tables.
        labels: share of the training samples that have labels. A distilled arm learns from the
            teachers' forecasts of all samples; a student alone leaves those without labels out.
        teachers: how many of the teachers, the first ones; None is all.
        model: makes the model, if it is not the study's student.
        base: name of an arm that this one is also compared with.
        **options: of `SDKDDistiller`, such as ``weighting``, ``kd_weight`` or ``latents``;
            ``kd_weight=0`` is the student alone. A ``transform`` or ``bands`` replaces the task's
            in distillation, not in the scores. With an ``augmentation`` the teachers forecast at
            every step.

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
        teachers: int | None = None,
        model: Callable[[], nn.Module] | None = None,
        base: str | None = None,
        **options: Any,
    ) -> None:
        check_type("name", name, str, "for tables")
        if teachers is not None:
            check_positive_int("teachers", teachers)
        self.name, self.labels, self.teachers, self.model = name, labels, teachers, model
        self.base, self.options = base, options
        self.alone = options.get("kd_weight") == 0
        self.setting = "all labels" if labels == 1 else f"{100 * labels:.3g}% of the labels"
        if not 0 <= labels <= 1 or (labels == 0 and self.alone):
            raise ValueError(f"`labels` is {labels} for {shown(name)}, expected a share in (0, 1].")


@explained
def standard_arms(
    n_bands: int = 2,
    *,
    weightings: Sequence[Any] = ("fixed",),
    latents: Sequence[Any] = (),
    **options: Any,
) -> list[Arm]:
    """The student alone, plain-MSE distillation, and SDKD with each weighting.

    Args:
        n_bands: of the task.
        weightings: of the SDKD arms, as for `DistillationLoss`.
        latents: of the SDKD arms.
        **options: of `Arm`: ``labels`` for all arms, others for the distilled ones.

    Example:
        >>> [arm.name for arm in standard_arms(weightings=["fixed", "adaptive"])]
        ['student alone', 'plain-MSE distillation', 'SDKD, fixed', 'SDKD, adaptive']
    """
    check_positive_int("n_bands", n_bands, most=1024)
    named = {"SDKD" if len(weightings) == 1 else f"SDKD, {w}": w for w in weightings}
    sdkd = [Arm(k, weighting=w, latents=tuple(latents), **options) for k, w in named.items()]
    plain = Arm("plain-MSE distillation", weighting=(1.0,) * n_bands, **options)
    return [Arm("student alone", labels=plain.labels, kd_weight=0), plain, *sdkd]
