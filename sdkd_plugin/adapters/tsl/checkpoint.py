"""Checkpoints of tsl predictors that hold weights and plain values, and nothing that runs.

Resuming bit for bit also needs `resuming`: a repeatable order of windows and repeatable dropout.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn
from tsl.engines import Predictor

from sdkd_plugin._plain import check_archive, load_plain

_SIZES = ("input_size", "output_size", "exog_size", "n_nodes", "window", "horizon")
_RECORD = "sdkd_model"
_PREFIX = "model."


class CheckedIO(TorchCheckpointIO):
    """Lightning's reader of checkpoints, which compares the checksums in a local file first."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> Any:
        """As Lightning's; a ValueError if the file is damaged."""
        if Path(path).is_file():
            check_archive(path)
        return super().load_checkpoint(path, *args, **options)


class PlainPredictor(Predictor):
    """tsl's ``Predictor`` with checkpoints that are safe to load: for teachers and baselines.

    tsl records classes and metrics: such a file can only be read by running what it names. Here
    only plain values are recorded, so that ``torch.load(file, weights_only=True)`` and
    ``trainer.fit(ckpt_path=...)`` read it. The file also has the model's class, its sizes, and the
    inputs it was trained with: one that is missing later is an error.

    Example:
        >>> import tempfile
        >>> import torch
        >>> path = Path(tempfile.mkdtemp()) / "student.pt"
        >>> torch.save(nn.Linear(2, 1).state_dict(), path)
        >>> PlainPredictor(model=nn.Linear(2, 1)).load_model(path)
    """

    scheduler_kwargs: Any
    inputs_trained_with: tuple[str, ...] = ()

    def predict_batch(self, batch: Any, *args: Any, **options: Any) -> Any:
        """As tsl's; a ValueError if the batch lacks an input that the model was trained with."""
        forward = self._model_fwd_signature  # tsl's own record of the model's forward
        any_name, names = forward["has_kwargs"], forward["signature"]
        given = [name for name in batch.input.keys() if any_name or name in names]  # noqa: SIM118
        if self.training:
            self.inputs_trained_with = tuple(sorted(given))
        elif missing := [name for name in self.inputs_trained_with if name not in given]:
            raise ValueError(
                f"`batch.input` lacks {missing}, which the model was trained with; it has "
                f"{sorted(given)}: give the data set the same covariates as in training."
            )
        return super().predict_batch(batch, *args, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the plain hyperparameters only, and record which model this is."""
        super().on_save_checkpoint(checkpoint)
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = plain(checkpoint["hyper_parameters"])
        checkpoint[_RECORD] = {
            "class": type(self.model).__name__,
            "arguments": _arguments(self.model, self.model_kwargs),
            "inputs": list(self.inputs_trained_with),
        }

    def setup(self, stage: str | None = None) -> None:
        """Compare the checksums of a checkpoint before it is resumed from."""
        super().setup(stage)
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckedIO()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the inputs that the model was trained with from the record."""
        self.inputs_trained_with = tuple(checkpoint.get(_RECORD, {}).get("inputs", ()))

    def load_model(self, filename: str | Path) -> None:
        """Load the model's weights alone; ``trainer.fit(ckpt_path=...)`` loads the whole state."""
        self.on_load_checkpoint(load_weights(self.model, filename, arguments=self.model_kwargs))

    def configure_optimizers(self) -> Any:
        """As tsl's, which takes ``monitor`` out of the arguments that it was given."""
        kept, self.scheduler_kwargs = self.scheduler_kwargs, dict(self.scheduler_kwargs)
        configured = super().configure_optimizers()
        self.scheduler_kwargs = kept
        return configured


def load_weights(
    model: nn.Module, filename: str | Path, *, arguments: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Load a model's weights from a checkpoint or a state dict; nothing in the file is run.

    Args:
        model: built for the same sizes as the one that was saved.
        filename: written by a `PlainPredictor` or a `DistillationPredictor`, or a saved state dict.
        arguments: that the model was built with, compared with those recorded. Its sizes, such as
            ``n_nodes``, are compared in any case.

    Returns:
        All that the file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds more than weights and plain values, or does not
            fit the model, which is then as before.
    """
    path, named = Path(filename), f"`filename` is {Path(filename).name}"
    if not path.is_file():
        raise FileNotFoundError(f"`filename` is {path}, where there is no file.")
    try:
        stored = load_plain(path, "cpu")
    except ValueError as error:
        raise ValueError(
            f"{error} A checkpoint of tsl's own Predictor runs code when it is loaded: if you "
            "trust the file, save torch.load(filename, weights_only=False)['state_dict'] to another"
            " and load that."
        ) from error
    if not isinstance(stored, Mapping):
        kind = type(stored).__name__
        raise ValueError(f"{named}, which holds a {kind}, expected a checkpoint or a state dict.")
    weights = stored.get("state_dict", stored)
    if own := {name: each for name, each in weights.items() if name.startswith(_PREFIX)}:
        weights = {name.removeprefix(_PREFIX): each for name, each in own.items()}
    name, record = type(model).__name__, stored.get(_RECORD, {})
    if record.get("class", name) != name:
        raise ValueError(f"{named}, which holds a {record['class']}, expected a {name}.")
    remedy = "build the model as it was when it was saved, or train one for these data."
    saved, mine = record.get("arguments", {}), _arguments(model, arguments)
    if differ := [key for key in saved if key in mine and saved[key] != mine[key]]:
        got, wanted = (", ".join(f"{key}={each[key]}" for key in differ) for each in (saved, mine))
        raise ValueError(f"{named}, whose {name} has {got}, expected {wanted}: {remedy}")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        model.load_state_dict(before)  # torch has loaded the weights that do fit
        raise ValueError(
            f"{named}, whose weights are not those of this {name} ({shorten(str(error), 300)}): "
            + remedy
        ) from error
    return stored


def _arguments(model: nn.Module, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The plain arguments that a model was built with, and the sizes it has as attributes."""
    known = plain(arguments or {})
    ours = getattr(getattr(model, "network", None), "sizes", None)
    for part in (model, ours):
        sizes = {name: getattr(part, name, None) for name in _SIZES}
        known |= {name: size for name, size in sizes.items() if isinstance(size, int)}
    return known


def plain(values: Mapping[Any, Any]) -> dict[str, Any]:
    """A copy of a mapping's numbers, strings, lists and mappings; all else is left out."""
    copies: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            copies[str(name)] = plain(value)
            continue
        with suppress(TypeError, ValueError):  # as for a class, or a list with one
            copies[str(name)] = json.loads(json.dumps(value))
    return copies
