"""Distillation by tsl's ``Predictor`` and Lightning."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from tsl.data import SpatioTemporalDataModule
from tsl.data.batch import DisjointBatch
from tsl.data.loader import StaticGraphLoader
from tsl.ops.connectivity import convert_torch_connectivity

from sdkd_plugin._checks import check_shape
from sdkd_plugin.adapters.ranks import average_measurements
from sdkd_plugin.adapters.tsl.answers import WindowAnswers, first_steps, known_inputs
from sdkd_plugin.adapters.tsl.checkpoint import PlainPredictor
from sdkd_plugin.adapters.tsl.graphs import DisjointGraphs, SharedSensors
from sdkd_plugin.adapters.tsl.sensors import OnSensors
from sdkd_plugin.distiller import SDKDDistiller
from sdkd_plugin.latents import LatentPair
from sdkd_plugin.losses import (
    AbstractAggregation,
    AbstractWeighting,
    AggregationName,
    CAMKDAggregation,
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


class DistillationPredictor(PlainPredictor):
    """A tsl ``Predictor`` whose training step also asks a teacher.

    The task loss is tsl's own: ``loss_fn`` on masked targets, scaled or not as ``scale_target``
    says. The distillation term compares what student and teacher put out, in the scaled space and
    at all nodes and steps, observed or not. Validation, test and prediction are tsl's.

    The teacher is in eval mode, without gradients, and neither in ``parameters()`` nor in
    ``state_dict()``; it moves to the device along with the predictor. Checkpoints hold the student,
    the projectors and the averages of a weighting, as plain values (see `PlainPredictor`).

    Where ``batch.mask`` is False the target may be anything, NaN included. A batch without any
    observed target has a task term of 0. Under several processes each weighs the bands by what it
    sees in this step, and what a weighting measures is averaged after it.

    Args:
        teacher: any module that forecasts in the layout and the scaled units of the student, or
            several.
        transform: the graph's, over the nodes; `DisjointGraphs` for tsl's disjoint batches (made
            with ``force_batch=True``), `SharedSensors` where the student has sensors that the
            teacher does not know.
        bands: as `SDKDDistiller`.
        weighting: as `SDKDDistiller`.
        kd_weight: as `SDKDDistiller`; 0 trains exactly as ``Predictor`` does.
        aggregation: as `SDKDDistiller`.
        teacher_bound: as `SDKDDistiller`, in scaled units.
        latents: as `SDKDDistiller`.
        example: as `SDKDDistiller`: the scaled inputs of a batch, ``batch.input``.
        check_finite: as `SDKDDistiller`.
        model: the student, or None with ``model_class``.
        **predictor: the other arguments of tsl's ``Predictor``.

    Raises:
        ValueError: as `SDKDDistiller`; if there is neither a model nor a model class; in a step, if
            the mask is of another shape than the target or the batch does not fit the transform.
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
        teacher_bound: float | None = None,
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
            teacher_bound=teacher_bound,
            latents=latents,
            example=example,
            check_finite=check_finite,
        )
        _check_sensors(distiller)
        _check_judges(distiller)
        # In a tuple, where nn.Module does not look: the student is registered as `model` already.
        # What else is trained or kept is registered by itself.
        self._distillers = (distiller,)
        self.weighting = distiller.loss.weighting
        self.aggregation = distiller.aggregation
        self.latent_losses = distiller.latent_losses
        self._taps = TapReader(self.model, distiller.student_taps)
        self.answers: WindowAnswers | None = None

    def ask_teachers(self, data: SpatioTemporalDataModule) -> None:
        """Ask the teachers about all windows of training now, and never again.

        It saves their forward pass in every step. Put the predictor on its device before.

        Args:
            data: set up, of a data set that `number_windows` has numbered.

        Raises:
            ValueError: if windows were not numbered; and, in training, if a window was not asked
                about or reads otherwise than it did.
        """
        device = next(self.distiller.student.parameters()).device
        loader = StaticGraphLoader(data.trainset, batch_size=data.batch_size)
        self.answers = WindowAnswers(self.distiller, (batch.to(device) for batch in loader))

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
        if mask is not None:
            check_shape("batch.mask", mask.shape, y.shape, "one value for each of the target")
            mask = mask.bool()  # tsl takes bytes too
            # What was not observed counts 0 times, but 0 times NaN is NaN in the gradient.
            y = torch.where(mask, y, y.nan_to_num(0.0, 0.0, 0.0))
        if self.distiller.kd_weight > 0:
            _set_graphs(self.distiller.loss.transform, batch)
        scaler = transform.get("y")
        with self._taps:
            scaled = self.predict_batch(batch, preprocess=False, postprocess=False)
        forecast = scaled if scaler is None else scaler.inverse_transform(scaled)
        if self.scale_target and scaler is not None:
            task = self.loss_fn(scaled, scaler.transform(y), mask)
        else:
            task = self.loss_fn(forecast, y, mask)
        answers = None
        if self.answers is not None:
            answers = self.answers(first_steps(batch), inputs["x"])
        terms = self.distiller.terms(
            scaled,
            # What neither model takes is left out here, as tsl leaves it out there, with a warning.
            **known_inputs(self.distiller, inputs),
            # The labels in the models' units, for what judges a teacher by them.
            y=y if scaler is None else scaler.transform(y),
            mask=mask,
            task=task,
            latents=self._taps.read(),
            answers=answers,
        )
        average_measurements(self)
        self.train_metrics.update(forecast.detach(), y, mask)
        self.log_metrics(self.train_metrics, batch_size=batch.batch_size)
        self.log_loss("train", terms.total, batch_size=batch.batch_size)
        logged = {f"train_{n}": value for n, value in terms.scalars().items() if n != "total"}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=batch.batch_size)
        return terms.total


def _set_graphs(transform: AbstractTransform, batch: Any) -> None:
    """Tell the transform which graphs the batch holds, or refuse those it is not made for."""
    disjoint = isinstance(batch, DisjointBatch)
    if disjoint and batch.input.x.ndim != 4:
        raise ValueError(
            f"`batch.input.x` has shape {tuple(batch.input.x.shape)}, expected (1, time, nodes, "
            "features): make the loader with force_batch=True."
        )
    if isinstance(transform, DisjointGraphs):
        edge_index, edge_weight = batch.edge_index, batch.edge_weight
        n_nodes = batch.input.x.shape[-2]
        if not isinstance(edge_index, Tensor):
            edge_index, edge_weight = convert_torch_connectivity(
                edge_index, "edge_index", num_nodes=n_nodes
            )
        ptr = batch.ptr if disjoint else torch.tensor([0, n_nodes])
        transform.set_graphs(edge_index, edge_weight, ptr)
    elif disjoint:
        raise ValueError(
            f"the batch holds {batch.num_graphs} disjoint graphs and `transform` is a "
            f"{type(transform).__name__} of one, expected transform=DisjointGraphs(), which looks "
            "at each batch's own graphs."
        )


def _check_judges(distiller: SDKDDistiller) -> None:
    """Refuse what judges a teacher by a sample, where samples are not what is compared."""
    transform = distiller.loss.transform
    camkd = isinstance(distiller.aggregation, CAMKDAggregation)
    if isinstance(transform, SharedSensors | DisjointGraphs) and (
        camkd or distiller.teacher_bound is not None
    ):
        raise ValueError(
            f"{'aggregation camkd' if camkd else '`teacher_bound`'} judges a teacher by all "
            f"sensors of a sample, but `transform` is a {type(transform).__name__}, expected a "
            "GraphTransform of one graph whose sensors the teacher knows; leave one of them out."
        )


def _check_sensors(distiller: SDKDDistiller) -> None:
    """Refuse a transform that would count sensors of which a teacher can say nothing."""
    transform = distiller.loss.transform
    for teacher in distiller.teachers:
        if not isinstance(teacher, OnSensors) or len(teacher.at_student) == teacher.n_student:
            continue
        if isinstance(transform, SharedSensors):
            # On the CPU: a teacher may have been moved already.
            known = set(teacher.at_student.tolist())
            if known.issuperset(transform.places.tolist()):
                continue
        raise ValueError(
            f"a teacher knows {len(teacher.at_student)} of the student's {teacher.n_student} "
            f"sensors and `transform` is a {type(transform).__name__}, expected "
            "SharedSensors(transform, match.student, n_nodes), which leaves out the others."
        )
