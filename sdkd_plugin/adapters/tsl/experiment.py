"""tsl's ``Experiment``, importable whatever Lightning's loggers are.

``tsl.experiment`` imports ``NeptuneLogger`` from ``pytorch_lightning.loggers``, which has none from
2.6.5 on. Here it is given one for the moment of the import, where it is missing, and what a
configuration may ask of an experiment's logger. Import this module before ``tsl.experiment``; it
needs Hydra, which the rest of the adapter does not.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytorch_lightning import loggers

from sdkd_plugin._checks import check_choice


class _RemovedLogger:
    """Stands where Lightning had its logger; making one says so."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"`NeptuneLogger` is not part of pytorch-lightning {version('pytorch-lightning')}; use "
            "another logger, or pytorch-lightning below 2.6.5."
        )


@contextmanager
def _neptune_logger() -> Iterator[None]:
    """Lets ``from pytorch_lightning.loggers import NeptuneLogger`` succeed, inside the context."""
    if hasattr(loggers, "NeptuneLogger"):
        yield
        return
    loggers.NeptuneLogger = _RemovedLogger  # type: ignore[attr-defined]
    try:
        yield
    finally:
        # Whoever asks Lightning what it has gets the true answer.
        del loggers.NeptuneLogger  # type: ignore[attr-defined]


with warnings.catch_warnings(), _neptune_logger():
    from tsl.experiment import Experiment, NeptuneLogger

LOGGERS = ("csv", "tensorboard", "wandb", "neptune")


def make_logger(
    config: Mapping[str, Any] | None,
    *,
    name: str,
    folder: str | Path,
    tags: list[str],
    settings: Mapping[str, Any],
) -> "loggers.Logger | None":
    """The logger that a configuration asks for by its ``backend``, as tsl's example does.

    Args:
        config: ``backend`` and, for ``wandb`` and ``neptune``, ``project`` and ``offline``; None
            for no logger.
        name: of the run.
        folder: of the run.
        tags: of the run.
        settings: the whole configuration, for backends that record it.

    Raises:
        ValueError: if the backend is unknown or its package is missing.

    Example:
        >>> make_logger(None, name="a", folder=".", tags=[], settings={}) is None
        True
    """
    if config is None:
        return None
    backend = config.get("backend")
    check_choice("logger.backend", backend, LOGGERS)
    try:
        if backend == "csv":
            return loggers.CSVLogger(save_dir=folder, name="logs")
        if backend == "tensorboard":
            return loggers.TensorBoardLogger(save_dir=folder, name="_".join([name, *tags]))
        if backend == "wandb":
            return loggers.WandbLogger(
                name=name,
                save_dir=folder,
                offline=config.get("offline", False),
                project=config.get("project"),
                config=dict(settings),
                tags=tags,
            )
        return NeptuneLogger(
            project_name=config.get("project"),
            experiment_name=name,
            save_dir=str(folder),
            tags=tags,
            params=dict(settings),
            debug=config.get("offline", False),
        )
    except ImportError as error:
        raise ValueError(f"`logger.backend` {backend!r} needs a package: {error}") from error


__all__ = ["LOGGERS", "Experiment", "NeptuneLogger", "make_logger"]
