"""What neuraloperator's ``Trainer`` does not save, so that a resumed run is the very same run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from neuralop import Trainer
from torch import distributed as dist

from sdkd_plugin.adapters.neuralop.training import TrainerLoss

_KEYS = {"epoch", "loss", "random", "cuda", "generators"}


class ResumableState:
    """Makes ``resume_from_dir`` continue the same run; give it as the trainer's ``regularizer``.

    The host saves the student's weights, the optimizer and the scheduler, and on resuming trains
    the saved epoch a second time. This adds the number of the next epoch, what a distillation
    keeps beside the student (projectors, measured band weights), and the state of the random
    generators. It adds 0 to the loss. On one process and a CPU the resumed run takes the steps of
    the uninterrupted one bit for bit; on several processes, random numbers are not restored.

    Limits of the host: the best value so far is not saved, so use separate folders for
    ``save_every`` and ``save_best``. ``n_epochs`` counts from the beginning of the first run. An
    interrupted save leaves files of two epochs.

    Args:
        trainer: the one that it is given to.
        loss: the distillation loss, if there is one.
        generators: of the loaders' shuffling; torch's global ones are always included.

    Raises:
        ValueError: on resuming, if the folder's ``regularizer.pt`` is not of this class, or of
            other generators or another loss; or if the saved epoch was the trainer's last.

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
