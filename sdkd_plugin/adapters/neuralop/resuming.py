"""What neuraloperator's ``Trainer`` does not save, so that a resumed run is the very same run."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from neuralop import Trainer
from torch import distributed as dist

from sdkd_plugin._files import atomic_files, check_files
from sdkd_plugin.adapters.neuralop.training import TrainerLoss

_NAME = "training"
_KEYS = {"epoch", "loss", "random", "cuda", "generators"}


class ResumableState:
    """Makes ``resume_from_dir`` continue the same run; give it as the trainer's ``regularizer``.

    The host saves the student's weights, the optimizer and the scheduler, and on resuming trains
    the saved epoch a second time. This adds the number of the next epoch, what a distillation
    keeps beside the student (projectors, measured band weights), and the state of the random
    generators. It adds 0 to the loss. On one process and a CPU the resumed run takes the steps of
    the uninterrupted one bit for bit; on several processes, random numbers are not restored.

    The host writes five files over the old ones, one after another. Here this trainer writes them
    beside the old ones and moves them in as one, with their checksums in ``training.sha256``: a run
    that is killed at any moment resumes from the last whole checkpoint. One that cannot be written
    is a warning, and the training goes on.

    Limits of the host: the best value so far is not saved, so use separate folders for
    ``save_every`` and ``save_best``. ``n_epochs`` counts from the beginning of the first run.

    Args:
        trainer: the one that it is given to; its ``checkpoint`` and ``resume_state_from_dir`` are
            replaced.
        loss: the distillation loss, if there is one.
        generators: of the loaders' shuffling; torch's global ones are always included.

    Raises:
        FileNotFoundError: on resuming, if the folder has no such checkpoint.
        ValueError: on resuming, if a file is damaged or of another checkpoint, the state is of
            other generators or another loss, or the saved epoch was the trainer's last.

    Example:
        >>> ResumableState(Trainer(model=torch.nn.Conv2d(1, 1, 1), n_epochs=2)).loss
        0.0
    """

    # The host adds it to the loss of every batch.
    loss = 0.0

    def __init__(
        self,
        trainer: Trainer,
        loss: TrainerLoss | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._trainer = trainer
        self._training_loss = loss
        self._generators = tuple(generators)
        trainer.checkpoint, trainer.resume_state_from_dir = self._save, self._resume

    def _save(self, save_dir: str | os.PathLike[str]) -> None:
        kind = type(self._trainer)
        try:
            with atomic_files(save_dir, _NAME) as new:
                kind.checkpoint(self._trainer, new)
        except OSError as error:
            warnings.warn(f"the checkpoint of an epoch is not kept: {error}.", stacklevel=3)

    def _resume(self, save_dir: str | os.PathLike[str]) -> None:
        whole, best = check_files(save_dir, _NAME), "best_model_state_dict.pt"
        if best not in whole and Path(save_dir, best).exists():
            # The host would prefer it.
            raise ValueError(
                f"{save_dir} has {best} of another checkpoint beside {sorted(whole)}: move it to a "
                "folder of its own."
            )
        type(self._trainer).resume_state_from_dir(self._trainer, Path(save_dir))

    def reset(self) -> None:
        """Nothing; the host calls it before every batch."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; the host saves them as ``regularizer.pt``."""
        return {
            "epoch": self._trainer.epoch,
            "loss": None if self._training_loss is None else self._training_loss.state_dict(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "generators": [generator.get_state() for generator in self._generators],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the saved epoch; the host calls it while it resumes."""
        if not isinstance(state, Mapping) or set(state) != _KEYS:
            raise ValueError(
                "`regularizer.pt` of the folder to resume from was not written by "
                "`ResumableState`: give a folder saved with `regularizer=ResumableState(...)`."
            )
        saved, given = len(state["generators"]), len(self._generators)
        had_loss = state["loss"] is not None
        if saved != given or had_loss != (self._training_loss is not None):
            raise ValueError(
                f"`generators` has {given}, expected {saved}, and `loss` is {self._training_loss}, "
                f"where the run to resume was saved {'with' if had_loss else 'without'} a "
                "distillation loss: give the same here."
            )
        # The host sets it to the saved epoch, which is done, but only ever upwards.
        next_epoch = state["epoch"] + 1
        if next_epoch >= self._trainer.n_epochs:
            raise ValueError(
                f"the run to resume has finished {next_epoch} epochs, but the trainer's `n_epochs` "
                f"is {self._trainer.n_epochs}: give more, counted from the run's beginning."
            )
        self._trainer.start_epoch = next_epoch
        if self._training_loss is not None:
            self._training_loss.load_state_dict(state["loss"])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # The first process alone saves: all would draw the same numbers.
            return
        torch.set_rng_state(state["random"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([random.cpu() for random in state["cuda"]])
        for generator, random in zip(self._generators, state["generators"], strict=True):
            generator.set_state(random.cpu())
