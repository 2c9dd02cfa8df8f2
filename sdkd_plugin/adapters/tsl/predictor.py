"""Distillation by tsl's ``Predictor`` and Lightning."""

import inspect
from collections.abc import Sequence
from types import FrameType
from typing import Any, cast

import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from tsl.data import SpatioTemporalDataModule
from tsl.data.batch import DisjointBatch
from tsl.data.loader import StaticGraphLoader
from tsl.ops.connectivity import convert_torch_connectivity

from sdkd_plugin._checks import check_shape, check_type
from sdkd_plugin.adapters.tsl.checkpoint import PlainPredictor
from sdkd_plugin.adapters.tsl.graphs import DisjointGraphs, SharedSensors
from sdkd_plugin.adapters.tsl.resuming import SeededDataModule
from sdkd_plugin.adapters.tsl.sensors import OnSensors
from sdkd_plugin.adapters.tsl.windows import WindowOutputs, first_steps
from sdkd_plugin.distributed import average_measurements
from sdkd_plugin.judging import judge
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.spectral import AbstractTransform
from sdkd_plugin.taps import TapReader
from sdkd_plugin.teachers import accepted_inputs, check_no_shared_weights


class DistillationPredictor(PlainPredictor):
    """A tsl ``Predictor`` whose training step adds a `DistillationLoss`.

    The task loss is tsl's own: ``loss_fn`` on masked targets, scaled if ``scale_target``; 0 for a
    batch without observed targets. Where ``batch.mask`` is False a target may be NaN. Student and
    teachers are compared in the scaled units, at all nodes and steps, observed or not. Validation,
    test and prediction are tsl's.

    Checkpoints hold the student, the projectors and the averages of a weighting, as plain values
    (see `PlainPredictor`); no teacher. With several processes each weights the bands by its own
    batch, and the averages of a weighting are averaged after each step. With stored outputs, a
    window's number is its first step: `number_windows`. Each validation in a fit weighs live
    teachers by their errors there (`TeacherTrust`).

    Args:
        loss: its transform is a `GraphTransform`; `DisjointGraphs` for tsl's disjoint batches
            (made with ``force_batch=True``); `SharedSensors` if the teacher does not know all of
            the student's sensors. With ``kd_weight=0`` training is exactly ``Predictor``'s.
        model: the student, or None with ``model_class``.
        **predictor: the other arguments of tsl's ``Predictor``.

    Raises:
        ValueError: if ``loss`` is no `DistillationLoss`, there is no student, it shares weights
            with a teacher, or the transform does not fit the teachers; in a step, if the mask does
            not fit the target or the batch the transform.
    """

    def __init__(
        self, loss: DistillationLoss, *, model: nn.Module | None = None, **predictor: Any
    ) -> None:
        check_type("loss", loss, DistillationLoss, "DistillationLoss(teacher, transform)")
        super().__init__(model=model, **predictor)
        if self.model is None:
            raise ValueError("`model` and `model_class` are None, expected one: the student.")
        check_no_shared_weights(loss.teachers, self.model)
        _check_sensors(loss)
        self.distillation = loss
        self.window_outputs: WindowOutputs | None = None

    def precompute(self, data: SpatioTemporalDataModule) -> None:
        """Run the teachers on all windows of training now, and in no step.

        Args:
            data: set up, of a data set that `number_windows` has numbered. The unlabelled windows
                of a `SeededDataModule` are included.

        Raises:
            ValueError: if it was not; in training, if a window is missing or its readings changed.
        """
        windows = data.training_windows if isinstance(data, SeededDataModule) else data.trainset
        loader = StaticGraphLoader(windows, batch_size=data.batch_size)
        self.window_outputs = WindowOutputs(self.distillation, loader)

    def save_hyperparameters(
        self, *args: Any, ignore: Sequence[str] = (), frame: FrameType | None = None, **options: Any
    ) -> None:
        """Lightning's, without the loss, which a checkpoint must not hold."""
        frame = frame or cast(FrameType, inspect.currentframe()).f_back
        super().save_hyperparameters(*args, ignore=[*ignore, "loss"], frame=frame, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Task loss as tsl computes it, plus the distillation terms."""
        inputs, targets, mask, transform = self._unpack_batch(batch)
        y, loss, latents, outputs, index = targets["y"], self.distillation, None, None, None
        if mask is not None:
            check_shape("batch.mask", mask.shape, y.shape, "one value for each of the target")
            mask = mask.bool()  # tsl takes bytes too
            # The gradient of a NaN is NaN, even with weight 0.
            y = torch.where(mask, y, y.nan_to_num(0.0, 0.0, 0.0))
        if loss.kd_weight > 0:
            _set_graphs(loss.transform, batch)
            if self.window_outputs is not None:
                outputs = self.window_outputs(first_steps(batch), inputs.x)
            elif loss.stored is not None:
                index = first_steps(batch)
        if loss.latents:
            with TapReader(self.model, loss.student_taps) as taps:
                scaled = self.predict_batch(batch, preprocess=False, postprocess=False)
            latents = taps.read()
        else:
            scaled = self.predict_batch(batch, preprocess=False, postprocess=False)
        scaler = transform.get("y")
        forecast = scaled if scaler is None else scaler.inverse_transform(scaled)
        scaled_y = y if scaler is None else scaler.transform(y)
        pair = (scaled, scaled_y) if self.scale_target else (forecast, y)
        known = {"outputs": outputs, "index": index}
        terms = loss(scaled, y=scaled_y, mask=mask, latents=latents, **known, **inputs)
        terms = terms.with_task(self.loss_fn(*pair, mask))
        average_measurements(loss)
        self.train_metrics.update(forecast.detach(), y, mask)
        self.log_metrics(self.train_metrics, batch_size=batch.batch_size)
        self.log_loss("train", terms.total, batch_size=batch.batch_size)
        logged = {f"train_{n}": value for n, value in terms.scalars().items() if n != "total"}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=batch.batch_size)
        return terms.total

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """As tsl's; live teachers are compared with the student on the scaled targets."""
        result: Tensor | None = super().validation_step(batch, batch_idx)
        loss = self.distillation
        # Not in Lightning's check of a few batches, which a resumed run makes once more.
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if fitting and loss.trust is not None and loss.kd_weight > 0 and loss.stored is None:
            inputs, targets, mask, transform = self._unpack_batch(batch)
            _set_graphs(loss.transform, batch)
            y, scaler = targets["y"], transform.get("y")
            y = y if scaler is None else scaler.transform(y)
            forecast = self.predict_batch(batch, preprocess=False, postprocess=False)
            further = {name: value for name, value in inputs.items() if name != "x"}
            outputs = loss.outputs(None, inputs.x, accepted_inputs(loss.inputs, further))
            judge(loss, loss.trust, forecast, outputs, y, None if mask is None else mask.bool())
        return result

    def on_validation_epoch_end(self) -> None:
        """Weigh the teachers; log ``val_teacher_mse``, ``val_student_mse`` and their like."""
        super().on_validation_epoch_end()
        trust = self.distillation.trust
        if trust is not None and trust.measured:
            self.log_dict({f"val_{name}": each for name, each in trust.update().scalars().items()})


def _set_graphs(transform: AbstractTransform, batch: Any) -> None:
    """Tell the transform which graphs the batch holds; refuse graphs that it is not made for."""
    disjoint = isinstance(batch, DisjointBatch)
    if disjoint and batch.input.x.ndim != 4:
        raise ValueError(
            f"`batch.input.x` has shape {tuple(batch.input.x.shape)}, expected (1, time, nodes, "
            "features): make the loader with force_batch=True."
        )
    if isinstance(transform, DisjointGraphs):
        edges, n_nodes = (batch.edge_index, batch.edge_weight), batch.input.x.shape[-2]
        if not isinstance(edges[0], Tensor):
            edges = convert_torch_connectivity(edges[0], "edge_index", num_nodes=n_nodes)
        transform.set_graphs(*edges, batch.ptr if disjoint else torch.tensor([0, n_nodes]))
    elif disjoint:
        raise ValueError(
            f"the batch holds {batch.num_graphs} disjoint graphs and `transform` is a "
            f"{type(transform).__name__} of one, expected transform=DisjointGraphs()."
        )


def _check_sensors(loss: DistillationLoss) -> None:
    """Refuse a loss that would use a teacher at sensors that it does not know."""
    transform = loss.transform
    if isinstance(transform, SharedSensors | DisjointGraphs) and (
        loss.teacher_bound is not None or loss.aggregation.needs_labels
    ):
        raise ValueError(
            "`teacher_bound` and the aggregation 'camkd' compare teachers on all sensors of a "
            f"sample, but `transform` is a {type(transform).__name__}, expected a GraphTransform "
            "of one graph whose sensors the teacher knows; leave one of them out."
        )
    partial = loss.stored is not None and "OnSensors" in loss.stored.names
    if partial and not isinstance(transform, SharedSensors):
        raise ValueError(
            "the stored outputs are of a teacher of some sensors, 0 at the others, and `transform` "
            f"is a {type(transform).__name__}, expected SharedSensors(transform, match.student, "
            "n_nodes)."
        )
    for teacher in loss.teachers:
        if not isinstance(teacher, OnSensors):
            continue
        used: Sequence[int] = range(teacher.n_student)
        if isinstance(transform, SharedSensors):
            used = transform.places.tolist()  # numbers, since they may lie on two devices
        if not set(teacher.at_student.tolist()).issuperset(used):
            raise ValueError(
                f"a teacher knows {len(teacher.at_student)} of the student's {teacher.n_student} "
                f"sensors and `transform` is a {type(transform).__name__}, expected "
                "SharedSensors(transform, match.student, n_nodes), which leaves out the others."
            )
