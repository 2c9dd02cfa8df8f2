"""What makes a resumed run equal the uninterrupted one: order and randomness by epoch."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler
from tsl.data import SpatioTemporalDataModule
from tsl.data.loader import StaticGraphLoader

from sdkd_plugin._checks import MOST_SEED, check_positive_int


class SeededDataModule(SpatioTemporalDataModule):
    """tsl's data module, with an order of training windows that follows from seed and epoch alone.

    (tsl's follows torch's global generator.) Several processes read a share each, as with
    Lightning's own sampler. The other arguments are tsl's.

    Raises:
        ValueError: if the seed is not an integer of at least 0.
    """

    def __init__(self, *args: Any, seed: int = 0, **module: Any) -> None:
        super().__init__(*args, **module)
        check_positive_int("seed", seed, 0, MOST_SEED)
        self.seed = seed

    def train_dataloader(self, shuffle: bool = True, batch_size: int | None = None) -> DataLoader:
        """The training windows; without ``shuffle`` in tsl's order."""
        if not shuffle:
            return super().train_dataloader(shuffle=False, batch_size=batch_size)
        trainer = self.trainer
        world, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        sampler: DistributedSampler = DistributedSampler(self.trainset, world, rank, seed=self.seed)
        if trainer is not None:
            # Lightning sets the epoch too, but workers of a resumed run fetch before that.
            sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
        options = {"num_workers": self.workers, "pin_memory": self.pin_memory, "drop_last": True}
        size = batch_size or self.batch_size
        return StaticGraphLoader(self.trainset, batch_size=size, sampler=sampler, **options)


class SeededEpochs(pl.Callback):
    """Seeds torch at the start of every training epoch, so that dropout follows from the epoch.

    With a `SeededDataModule` a run that is resumed from a checkpoint of an epoch's end takes the
    same steps as the uninterrupted one, bit for bit on a CPU. Each process has its own stream.

    Raises:
        ValueError: if the seed is not an integer of at least 0.
    """

    def __init__(self, seed: int = 0) -> None:
        check_positive_int("seed", seed, 0, MOST_SEED)
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed after the epoch's first batch is loaded: making its loader draws numbers too."""
        if batch_idx == 0:
            step = trainer.current_epoch * trainer.world_size + trainer.global_rank
            # Far apart, lest the second epoch of one seed be the first of the next.
            torch.manual_seed((self.seed << 32) + step)
