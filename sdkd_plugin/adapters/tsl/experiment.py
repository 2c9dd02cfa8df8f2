"""tsl's ``Experiment``, importable without the ``NeptuneLogger`` that Lightning 2.6.5 dropped.

Import this module first. It needs Hydra, which the rest of the adapter does not.
"""

import warnings
from typing import Any

from pytorch_lightning import loggers


class _RemovedLogger:
    def __init__(self, *_: Any, **__: Any) -> None:
        expected = "use another logger, or pytorch-lightning below 2.6.5."
        raise ValueError(f"`NeptuneLogger` is not part of this pytorch-lightning; {expected}")


_IS_MISSING = not hasattr(loggers, "NeptuneLogger")
if _IS_MISSING:
    loggers.NeptuneLogger = _RemovedLogger  # type: ignore[attr-defined]
try:
    with warnings.catch_warnings():
        from tsl.experiment import Experiment
finally:
    if _IS_MISSING:  # a later check of what Lightning has must get the true answer
        del loggers.NeptuneLogger  # type: ignore[attr-defined]

__all__ = ["Experiment"]
