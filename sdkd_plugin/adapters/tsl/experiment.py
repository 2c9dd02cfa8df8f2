"""tsl's ``Experiment``, importable whatever loggers Lightning has.

``tsl.experiment`` imports ``NeptuneLogger`` from ``pytorch_lightning.loggers``, which has none from
2.6.5 on. Import this module first. It needs Hydra, which the rest of the adapter does not.
"""

import warnings
from typing import Any

from pytorch_lightning import loggers


class _RemovedLogger:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "`NeptuneLogger` is not part of this pytorch-lightning; use another logger, or "
            "pytorch-lightning below 2.6.5."
        )


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
