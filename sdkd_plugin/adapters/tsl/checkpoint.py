"""Checkpoints of tsl predictors that hold weights and plain values, and nothing that runs.

Here live saving and loading. Resuming bit for bit also takes a repeatable order of the training
windows and a repeatable dropout: these are in `resuming`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from tsl.engines import Predictor

from sdkd_plugin.teachers import accepted_inputs

_SIZES = ("input_size", "output_size", "exog_size", "n_nodes", "window", "horizon")
_RECORD = "sdkd_model"
_MODEL = "model."
_UNKNOWN = object()


class PlainCheckpoints:
    """What a tsl ``Predictor`` gets to write and read checkpoints without pickled objects.

    tsl records the classes of model and optimizer, and the metrics themselves: such a file can
    only be read by running what it names. Here only plain values are recorded, so that
    ``torch.load(file, weights_only=True)`` reads it, and with it ``trainer.fit(ckpt_path=...)``.
    Beside the weights the file says which model they belong to and for what sizes it was built.

    It also says what inputs the model was trained with: where one of them is missing in validation,
    test or prediction, that is an error before it is a wrong number.

    Mixed in before ``Predictor``; see `PlainPredictor`.
    """

    model: Any
    model_cls: Any
    model_kwargs: Any
    scheduler_kwargs: Any
    training: bool

    inputs_trained_with: tuple[str, ...] = ()

    def predict_batch(self, batch: Any, *args: Any, **options: Any) -> Any:
        """As tsl's, of a batch that has what the model was trained with.

        Raises:
            ValueError: if it lacks an input, such as the covariates ``u``.
        """
        given = accepted_inputs(self.model, dict(batch.input.items()))
        if self.training:
            self.inputs_trained_with = tuple(sorted(given))
        elif missing := [name for name in self.inputs_trained_with if name not in given]:
            raise ValueError(
                f"`batch.input` lacks {missing}, which the model was trained with; it has "
                f"{sorted(given)}: give the data set the same covariates as in training."
            )
        return super().predict_batch(batch, *args, **options)  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep of the hyperparameters what is plain, and record which model this is."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = plain(checkpoint["hyper_parameters"])
        checkpoint[_RECORD] = {
            "class": type(self.model).__name__,
            "arguments": model_arguments(self.model, self.model_kwargs),
            "inputs": list(self.inputs_trained_with),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what the model was trained with from the record."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._recall(checkpoint)

    def _recall(self, checkpoint: Mapping[str, Any]) -> None:
        self.inputs_trained_with = tuple(checkpoint.get(_RECORD, {}).get("inputs", ()))

    def load_model(self, filename: str | Path) -> None:
        """Load the model's weights, and them alone; see `load_weights`.

        What only training needs, such as averages of a weighting, optimizers and schedulers, comes
        back with ``trainer.fit(ckpt_path=filename)``.

        Args:
            filename: a checkpoint that this class wrote, or a saved state dict.

        Raises:
            ValueError: as `load_weights`; the model is as before.
        """
        self._recall(load_weights(self.model, filename, arguments=self.model_kwargs))

    def configure_optimizers(self) -> Any:
        """As tsl's, which takes ``monitor`` out of the arguments that it was given."""
        kept = self.scheduler_kwargs
        self.scheduler_kwargs = dict(kept)
        try:
            return super().configure_optimizers()  # type: ignore[misc]
        finally:
            self.scheduler_kwargs = kept


class PlainPredictor(PlainCheckpoints, Predictor):
    """tsl's ``Predictor``, whose checkpoints are safe to load: for teachers and for baselines.

    Args: as tsl's ``Predictor``.

    Example:
        >>> import tempfile
        >>> from sdkd_plugin.adapters.tsl import SDKDStudent
        >>> student = SDKDStudent(input_size=1, window=12, horizon=6, n_nodes=3)
        >>> path = Path(tempfile.mkdtemp()) / "student.pt"
        >>> torch.save(student.state_dict(), path)
        >>> PlainPredictor(model=student).load_model(path)
    """


def load_weights(
    model: nn.Module, filename: str | Path, *, arguments: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Load a model's weights from a checkpoint or a state dict, running nothing that it holds.

    Args:
        model: built for the same sizes as the one that was saved.
        filename: written by a `PlainPredictor` or a `DistillationPredictor` under Lightning, or by
            ``torch.save`` of a state dict.
        arguments: which the model was built with, to be compared with those recorded; what it
            says of its own sizes is compared in any case.

    Returns:
        all that the file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds more than weights and plain values, was written
            for another number of sensors, another window or other arguments, or its weights are not
            those of this model. The model is then as before.
    """
    path = Path(filename)
    if not path.is_file():
        raise FileNotFoundError(f"`filename` is {path}, where there is no file.")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"`filename` is {path.name}, which cannot be read as weights and plain values, "
            "expected a checkpoint of PlainPredictor or DistillationPredictor. One of tsl's own "
            "Predictor holds pickled objects, which run code when they are loaded: if you trust "
            "the file, save torch.load(filename, weights_only=False)['state_dict'] to another and "
            "load that."
        ) from error
    if not isinstance(stored, Mapping):
        raise ValueError(
            f"`filename` is {path.name}, which holds a {type(stored).__name__}, expected a "
            "checkpoint or a state dict."
        )
    _check_arguments(path, stored.get(_RECORD, {}), model_arguments(model, arguments), model)
    weights = stored.get("state_dict", stored)
    if any(name.startswith(_MODEL) for name in weights):
        own = (name for name in weights if name.startswith(_MODEL))
        weights = {name.removeprefix(_MODEL): weights[name] for name in own}
    _check_weights(path, weights, model)
    model.load_state_dict(weights)
    return stored


def model_arguments(
    model: nn.Module, arguments: Mapping[str, Any] | None = None
) -> dict[str, object]:
    """What is known of how a model was built, as plain values: its arguments, and its sizes.

    Example:
        >>> from sdkd_plugin.adapters.tsl import SDKDStudent
        >>> model_arguments(SDKDStudent(input_size=1, window=12, horizon=6, n_nodes=3))["n_nodes"]
        3
    """
    known: dict[str, object] = dict(plain(arguments or {}))
    # Our own tsl models wrap the network that knows its sizes.
    for module in (model, getattr(model, "network", None)):
        sizes = {name: getattr(module, name, None) for name in _SIZES}
        known |= {name: size for name, size in sizes.items() if isinstance(size, int)}
    return known


def plain(value: Any) -> Any:
    """A copy of numbers, strings, lists and mappings, without what in them is anything else.

    Example:
        >>> plain({"lr": 0.1, "betas": (0.9, 0.99), "optim_class": torch.optim.Adam})
        {'lr': 0.1, 'betas': [0.9, 0.99]}
    """
    if value is None:
        return None
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        copies = {str(name): plain(each) for name, each in value.items()}
        return {name: copy for name, copy in copies.items() if copy is not _UNKNOWN}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        each = [plain(one) for one in value]
        return _UNKNOWN if any(one is _UNKNOWN for one in each) else each
    return _UNKNOWN


def _check_arguments(
    path: Path, record: Mapping[str, Any], own: Mapping[str, object], model: nn.Module
) -> None:
    name = record.get("class", type(model).__name__)
    if name != type(model).__name__:
        raise ValueError(
            f"`filename` is {path.name}, which holds a {name}, expected a {type(model).__name__}."
        )
    recorded = record.get("arguments", {})
    differ = [key for key in recorded if key in own and recorded[key] != own[key]]
    if differ:
        raise ValueError(
            f"`filename` is {path.name}, whose {name} has "
            + ", ".join(f"{key}={recorded[key]}" for key in differ)
            + ", expected "
            + ", ".join(f"{key}={own[key]}" for key in differ)
            + ": build the model as it was when it was saved, or train one for these sizes."
        )


def _check_weights(path: Path, weights: Mapping[str, Any], model: nn.Module) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"`filename` is {path.name}, which holds no weights of this {type(model).__name__}: "
            f"it lacks {missing[:3]} ({len(missing)} in all) and has {unexpected[:3]} "
            f"({len(unexpected)} in all); expected a checkpoint of the same model."
        )
    shapes = {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in weights.items()
    }
    differ = [name for name in own if shapes[name] != tuple(own[name].shape)]
    if differ:
        raise ValueError(
            f"`filename` is {path.name}, whose {differ[0]!r} has shape {shapes[differ[0]]}, "
            f"expected {tuple(own[differ[0]].shape)} ({len(differ)} weights differ): it was "
            "trained for another number of sensors, another window or other sizes; build the "
            "model with those, or train one for this data."
        )
