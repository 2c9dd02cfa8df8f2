"""What neuraloperator's ``Trainer`` does not save, so that a resumed run is the very same run.

Here lives what rides in the trainer's regularizer slot. Weights, optimizer and scheduler are saved
and loaded by the trainer itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from neuralop import Trainer
from torch import distributed as dist

from sdkd_plugin.adapters.neuralop.training import TrainerLoss

_KEYS = {"epoch", "loss", "random", "cuda", "generators"}


class RunState:
    """Makes ``resume_from_dir`` continue the same run; give it as the trainer's ``regularizer``.

    By itself the host saves the student's weights, the optimizer and the scheduler, and resumes by
    training the saved epoch a second time. This adds the epoch to go on with, what a distillation
    keeps beside the student (projectors, measured band weights), and the state of the random
    generators that shuffling and dropout draw from. It adds 0 to the loss. On one process and a CPU
    the resumed run takes the steps of the uninterrupted one bit for bit; on several, random numbers
    are not restored.

    What the host leaves open: the best value so far is not saved, so the first evaluation of a run
    resumed with ``save_best`` counts as the best; give ``save_every`` and ``save_best`` folders of
    their own. ``n_epochs`` counts from the run's beginning. An interrupted save leaves files of two
    epochs in the folder.

    Args:
        trainer: the one that it is given to.
        loss: the distillation loss, or None where there is none.
        generators: those that the loaders shuffle by; torch's global ones are always included.

    Raises:
        ValueError: on resuming, if the folder's ``regularizer.pt`` was not written by this, or with
            another number of generators, or for another loss.

    Example:
        >>> import torch
        >>> run = RunState(Trainer(model=torch.nn.Conv2d(1, 1, 1), n_epochs=2))
        >>> run.loss
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
        """Nothing: the host calls it before every batch."""

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
        """Go on behind the saved epoch; the host calls it while it resumes."""
        if not isinstance(state, Mapping) or set(state) != _KEYS:
            raise ValueError(
                "`regularizer.pt` of the folder to resume from was not written by `RunState`: give "
                "a folder that was saved with `regularizer=RunState(...)`."
            )
        if len(state["generators"]) != len(self._generators):
            raise ValueError(
                f"`generators` has {len(self._generators)}, expected {len(state['generators'])} as "
                "in the run to resume."
            )
        if (state["loss"] is None) != (self._training_loss is None):
            raise ValueError(
                f"`loss` is {self._training_loss}, but the run to resume was saved "
                f"{'without' if state['loss'] is None else 'with'} a distillation loss: give the "
                "same here."
            )
        if self._training_loss is not None:
            self._training_loss.load_state_dict(state["loss"])
        # The host sets it to the saved epoch, which is done, but only ever upwards.
        self._trainer.start_epoch = state["epoch"] + 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # The first process alone saves: all would draw the same numbers.
            return
        torch.set_rng_state(state["random"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([random.cpu() for random in state["cuda"]])
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved.cpu())
