"""What is forecast: samples, split into training, validation and test, and how they are scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import default_collate

from sdkd_plugin._checks import check_finite
from sdkd_plugin.losses.task import TaskLoss, TaskLossName
from sdkd_plugin.report import forecast_scores
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.study.arms import fingerprint
from sdkd_plugin.teachers import accepted_inputs

CHUNK = 50
"""Samples that are forecast at once where nothing is trained."""


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """A forecasting problem: data, split, domain and metrics.

    Args:
        train: for training; an arm may use the labels of a part of them only.
        validation: choose the weights of every model.
        test: are scored.
        transform: the domain of the forecasts.
        bands: of its frequencies, for distillation and scores.
        unlabelled: more inputs ``{"x": ..., **inputs}``, whose only target is the teachers'.
        shared: inputs that all samples share, such as ``edge_index``.
        task_loss: of training and validation, as for `SDKDDistiller`.
        scale: scores are those of ``scale * value + offset``, in physical units.
        offset: see ``scale``.
        at: time steps, from 0 along axis 1, that get an MAE of their own, by name.
        extra_scores: further scores of a forecast and the test samples, both in physical units.
        measure: the score that arms are compared by.
        baselines: forecasts without training, by name: functions of samples in the models' units.
        labels_first: of a share of labelled samples, whether it is the first; else it is drawn.
        name: for rows and tables.
        source: where the data come from, for tables.

    Raises:
        ValueError: if lengths differ, or inputs or observed labels are NaN or Inf.
    """

    train: Samples
    validation: Samples
    test: Samples
    transform: AbstractTransform
    bands: Bands
    unlabelled: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    task_loss: TaskLossName | TaskLoss = "mse"
    scale: float | Tensor = 1.0
    offset: float | Tensor = 0.0
    at: Mapping[str, int] = field(default_factory=dict)
    extra_scores: Callable[[Tensor, Samples], Mapping[str, float]] | None = None
    measure: str = "mse"
    baselines: Mapping[str, Callable[[Samples], Tensor]] = field(default_factory=dict)
    labels_first: bool = False
    name: str = "task"
    source: str = "tensors"

    def __post_init__(self) -> None:
        parts: dict[str, Mapping[str, Tensor]] = {"unlabelled": self.unlabelled}
        for name in ("train", "validation", "test"):
            part: Samples = getattr(self, name)
            masks = {} if part.mask is None else {"mask": part.mask}
            parts[name] = {"x": part.x, "y": part.y, **masks, **part.inputs}
            seen = part.y if part.mask is None else part.y[part.mask.expand_as(part.y)]
            check_finite(f"{name}.y", seen)
        for name, tensors in parts.items():
            lengths = {key: len(value) for key, value in tensors.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"`{name}` has {lengths} samples, expected equally many.")
            if tensors:
                check_finite(f"{name}.x", tensors["x"])

    @cached_property
    def identity(self) -> str:
        """Changes with all data and options that scores depend on."""
        parts = [(s.x, s.y, s.mask, s.inputs) for s in (self.pool, self.validation, self.test)]
        options = [self.task_loss, self.scale, self.offset, self.at, self.labels_first]
        domain = [self.transform, self.transform.domain_axes, self.bands]
        return fingerprint([parts, self.shared, options, domain, len(self.train)])

    @cached_property
    def pool(self) -> Samples:
        """The training samples, then the unlabelled inputs with labels of 0."""
        if not self.unlabelled:
            return self.train
        train, more = self.train, dict(self.unlabelled)
        n = len(more["x"])

        def padded(value: Tensor) -> Tensor:
            return torch.cat([value, value.new_zeros(n, *value.shape[1:])])

        mask = None if train.mask is None else padded(train.mask)
        inputs = {name: torch.cat([value, more[name]]) for name, value in train.inputs.items()}
        return Samples(torch.cat([train.x, more["x"]]), padded(train.y), mask, inputs)

    def labelled(self, share: float, seed: int) -> Bool[Tensor, " samples"]:
        """Which samples of the pool have labels, if a share of the training samples has."""
        n, generator = len(self.train), torch.Generator().manual_seed(seed)
        order = torch.arange(n) if self.labels_first else torch.randperm(n, generator=generator)
        chosen = torch.zeros(len(self.pool), dtype=torch.bool)
        chosen[order[: round(share * n)]] = True
        return chosen

    def inputs(self, samples: Samples) -> dict[str, Any]:
        """What a model is called with beside ``x``."""
        return {**self.shared, **samples.inputs}

    @torch.no_grad()
    def forecast(
        self, model: nn.Module, samples: Samples, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "samples ..."]:
        """A model's forecasts in its own units, on the CPU; the model is left in eval mode."""
        model.eval()
        forecasts = []
        for start in range(0, len(samples), CHUNK):
            part = samples.select(slice(start, start + CHUNK), device)
            forecasts.append(model(part.x, **accepted_inputs(model, self.inputs(part))).cpu())
        return torch.cat(forecasts)

    def scores(self, forecast: Float[Tensor, "samples ..."]) -> dict[str, float]:
        """Scores of a forecast of the test samples."""
        test, forecast = self.test, self.physical(forecast)
        truth = Samples(test.x, self.physical(test.y), test.mask, test.inputs)
        domain = (self.transform, self.bands)
        scores = forecast_scores(forecast, truth.y, *domain, mask=truth.mask, at=self.at)
        return scores | dict(self.extra_scores(forecast, truth) if self.extra_scores else {})

    def physical(self, values: Tensor) -> Tensor:
        """Values of the models' units in physical ones."""
        return self.scale * values + self.offset
