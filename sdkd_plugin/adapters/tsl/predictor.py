"""Distillation by tsl's ``Predictor`` and Lightning."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, cast

from torch import Tensor, nn
from tsl.engines import Predictor

from sdkd_plugin.answers import accepted_inputs
from sdkd_plugin.distiller import DistillationTerms, SDKDDistiller
from sdkd_plugin.latents import LatentPair
from sdkd_plugin.losses import (
    AbstractAggregation,
    AbstractWeighting,
    AggregationName,
    WeightingName,
)
from sdkd_plugin.spectral import AbstractTransform, Bands
from sdkd_plugin.taps import TapReader

_NOT_RECORDED = (
    "teacher",
    "transform",
    "bands",
    "weighting",
    "aggregation",
    "latents",
    "example",
)


class DistillationPredictor(Predictor):
    """A tsl ``Predictor`` whose training step also asks a teacher.

    The task loss is tsl's own: ``loss_fn`` on masked targets, scaled or not as ``scale_target``
    says. The distillation term compares what student and teacher put out, in the scaled space and
    at all nodes and steps, observed or not. Validation, test and prediction are tsl's.

    The teacher is in eval mode, without gradients, and neither in ``parameters()`` nor in
    ``state_dict()``; it moves to the device along with the predictor.

    Args:
        teacher: any module that forecasts in the layout and the scaled units of the student, or
            several.
        transform: the graph's, over the nodes.
        bands: as `SDKDDistiller`.
        weighting: as `SDKDDistiller`.
        kd_weight: as `SDKDDistiller`; 0 trains exactly as ``Predictor`` does.
        aggregation: as `SDKDDistiller`.
        latents: as `SDKDDistiller`.
        example: as `SDKDDistiller`: the scaled inputs of a batch, ``batch.input``.
        check_finite: as `SDKDDistiller`.
        model: the student, or None with ``model_class``.
        **predictor: the other arguments of tsl's ``Predictor``.

    Raises:
        ValueError: as `SDKDDistiller`; and if there is neither a model nor a model class.
    """

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        transform: AbstractTransform,
        bands: Bands | None = None,
        *,
        weighting: WeightingName | AbstractWeighting | Sequence[float] = "fixed",
        kd_weight: float = 1.0,
        aggregation: AggregationName | AbstractAggregation = "mean",
        latents: Sequence[LatentPair] = (),
        example: Mapping[str, Any] | None = None,
        check_finite: bool = True,
        model: nn.Module | None = None,
        **predictor: Any,
    ) -> None:
        super().__init__(model=model, **predictor)
        if self.model is None:
            raise ValueError(
                "`model` and `model_class` are None, expected one of them: the student."
            )
        distiller = SDKDDistiller(
            teacher,
            self.model,
            transform,
            bands,
            weighting=weighting,
            kd_weight=kd_weight,
            aggregation=aggregation,
            latents=latents,
            example=example,
            check_finite=check_finite,
        )
        # In a tuple, where nn.Module does not look: the student is registered as `model` already.
        # What else is trained or kept is registered by itself.
        self._distillers = (distiller,)
        self.weighting = distiller.loss.weighting
        self.latent_losses = distiller.latent_losses
        self._taps = TapReader(self.model, distiller.student_taps)

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] = (), frame: FrameType | None = None, **options: Any
    ) -> None:
        """As Lightning's, without what a checkpoint must not hold: the teacher and its like."""
        caller = cast(FrameType, inspect.currentframe()).f_back
        super().save_hyperparameters(
            *args, ignore=[*ignore, *_NOT_RECORDED], frame=frame or caller, **options
        )

    @property
    def distiller(self) -> SDKDDistiller:
        """The distiller, with the teacher."""
        return self._distillers[0]

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "DistillationPredictor":
        """Move the teacher and the transforms along."""
        super()._apply(fn, recurse)
        distiller = self.distiller
        for module in (*distiller.teachers, distiller.loss, distiller.aggregation):
            module._apply(fn, recurse)
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Task loss as tsl computes it, plus the distillation term."""
        view, targets, mask, transform = self._unpack_batch(batch)
        inputs = dict(view.items())
        y = targets["y"]
        scaler = transform.get("y")
        with self._taps:
            scaled = self.predict_batch(batch, preprocess=False, postprocess=False)
        forecast = scaled if scaler is None else scaler.inverse_transform(scaled)
        if self.scale_target and scaler is not None:
            task = self.loss_fn(scaled, scaler.transform(y), mask)
        else:
            task = self.loss_fn(forecast, y, mask)
        # What neither model takes is left out here, as tsl leaves it out, with a warning, there.
        models = (self.model, *self.distiller.teachers)
        taken = {name for model in models for name in accepted_inputs(model, inputs)}
        known = {name: value for name, value in inputs.items() if name in taken}
        terms = self.distiller.terms(scaled, task=task, latents=self._taps.read(), **known)
        self.train_metrics.update(forecast.detach(), y, mask)
        self.log_metrics(self.train_metrics, batch_size=batch.batch_size)
        self.log_loss("train", terms.total, batch_size=batch.batch_size)
        self.log_dict(
            terms_to_log(terms), on_step=False, on_epoch=True, batch_size=batch.batch_size
        )
        return terms.total


def terms_to_log(terms: DistillationTerms) -> dict[str, Tensor]:
    """The terms by the names under which they are logged.

    Example:
        >>> import torch
        >>> zero = torch.tensor(0.0)
        >>> terms = DistillationTerms(zero, zero, torch.zeros(2), {}, torch.ones(2), torch.ones(1))
        >>> list(terms_to_log(terms))
        ['train_task', 'train_kd_band_0', 'train_kd_band_1', 'train_weight_0', 'train_weight_1']
    """
    logged = {"train_task": terms.task}
    for i, error in enumerate(() if terms.frequency is None else terms.frequency):
        logged[f"train_kd_band_{i}"] = error
    for i, weight in enumerate(() if terms.band_weights is None else terms.band_weights):
        logged[f"train_weight_{i}"] = weight
    for name, value in terms.features.items():
        logged[f"train_kd_{name}"] = value
    return logged
