"""What makes a resumed run equal the uninterrupted one: order and randomness by epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tsl.data import SpatioTemporalDataModule, SpatioTemporalDataset
from tsl.data.loader import StaticGraphLoader

from sdkd_plugin._checks import check_positive_int, check_seed
from sdkd_plugin.data.mixing import MixedSampler


class SeededDataModule(SpatioTemporalDataModule):
    """tsl's data module, with an order of training windows that follows from seed and epoch alone.

    (tsl's follows torch's global generator.) Several processes read a share each, as with
    Lightning's own sampler. The other arguments are tsl's.

    Args:
        seed: of the order.
        unlabelled: windows of the data set, by number, on which only the teacher speaks: their
            targets are NaN and their mask False. They are outside the splitter's parts and fit no
            scaler. See `windows_apart` for those whose targets are in no other window.
        ratio: unlabelled windows of a training batch over all; see `MixedSampler`.

    Raises:
        ValueError: if the seed is not an integer of at least 0, or ``unlabelled`` is empty; from
            ``setup``, if a window is unlabelled and in another part, or ``train_dataloader``, if
            the ratio does not fit.
    """

    def __init__(
        self,
        *args: Any,
        seed: int = 0,
        unlabelled: Sequence[int] | Int[Tensor, " windows"] | None = None,
        ratio: float = 0.5,
        **module: Any,
    ) -> None:
        super().__init__(*args, **module)
        check_seed(seed)
        self.seed = seed
        self.ratio = ratio
        if unlabelled is not None:
            check_positive_int("len(unlabelled)", len(unlabelled))
        self.unlabelled = None if unlabelled is None else torch.as_tensor(unlabelled)

    def setup(self, stage: Any = None) -> None:
        """As tsl's; a ValueError if an unlabelled window is in another part or does not exist."""
        super().setup(stage)
        if self.unlabelled is None:
            return
        first, last = (int(each) for each in self.unlabelled.aminmax())
        if not 0 <= first <= last < (n := len(self.torch_dataset)):
            raise ValueError(
                f"`unlabelled` has windows from {first} to {last}, expected 0 to {n - 1}."
            )
        for name, part in (("train", self.trainset), ("val", self.valset), ("test", self.testset)):
            used = torch.empty(0) if part is None else torch.as_tensor(np.asarray(part.indices))
            if both := self.unlabelled[torch.isin(self.unlabelled, used)].tolist():
                raise ValueError(
                    f"`unlabelled` has windows of {name} too, such as {both[:3]}, expected others: "
                    "leave them out in the splitter."
                )

    @property
    def training_windows(self) -> Any:
        """The windows that a teacher forecasts, those of training and the unlabelled ones."""
        if self.unlabelled is None:
            return self.trainset
        return MixedWindows(self.torch_dataset, self.trainset.indices, self.unlabelled)

    def train_dataloader(self, shuffle: bool = True, batch_size: int | None = None) -> DataLoader:
        """The training windows; without ``shuffle`` in tsl's order."""
        if not shuffle:
            return super().train_dataloader(shuffle=False, batch_size=batch_size)
        trainer = self.trainer
        world, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        size, windows = batch_size or self.batch_size, self.training_windows
        if isinstance(windows, MixedWindows):
            mixture: dict[str, Any] = {"batch_size": size, "ratio": self.ratio, "seed": self.seed}
            labelled = torch.arange(len(windows)) < len(self.trainset)
            sampler: DistributedSampler = MixedSampler(labelled, **mixture, world=world, rank=rank)
        else:
            sampler = DistributedSampler(windows, world, rank, seed=self.seed)
        if trainer is not None:
            # Lightning sets the epoch too, but workers of a resumed run fetch before that.
            sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
        options = {"num_workers": self.workers, "pin_memory": self.pin_memory, "drop_last": True}
        return StaticGraphLoader(windows, batch_size=size, sampler=sampler, **options)


class MixedWindows(Dataset[Any]):
    """Labelled windows of a data set, then unlabelled ones, whose targets are hidden."""

    def __init__(self, dataset: SpatioTemporalDataset, labelled: Any, unlabelled: Tensor) -> None:
        self.dataset = dataset
        self.n_labelled = len(labelled)
        self.indices = torch.cat([torch.as_tensor(np.asarray(labelled)), unlabelled])

    def __len__(self) -> int:
        """Windows of both kinds."""
        return len(self.indices)

    def __getitem__(self, places: list[int]) -> Any:
        """A batch of windows, as tsl's loader asks for it."""
        where = torch.as_tensor(places)
        batch = self.dataset[self.indices[where]]
        seen = torch.ones_like(batch.y, dtype=torch.bool) if batch.mask is None else batch.mask
        labelled = (where < self.n_labelled).view(-1, *[1] * (batch.y.ndim - 1))
        batch.mask = seen & labelled
        batch.pattern["mask"] = batch.pattern["y"]
        batch.target.y = torch.where(labelled, batch.y, torch.nan)
        return batch


class SeededEpochs(pl.Callback):
    """Seeds torch at the start of every training epoch, so that dropout follows from the epoch.

    With a `SeededDataModule` a run that is resumed from a checkpoint of an epoch's end takes the
    same steps as the uninterrupted one, bit for bit on a CPU. Each process has its own stream.

    Raises:
        ValueError: if the seed is not an integer of at least 0.
    """

    def __init__(self, seed: int = 0) -> None:
        check_seed(seed)
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed after the epoch's first batch is loaded: making its loader draws numbers too."""
        if batch_idx == 0:
            step = trainer.current_epoch * trainer.world_size + trainer.global_rank
            # Mixed, lest the second epoch of one seed be the first of the next; torch's generator
            # on CPUs takes 32 bits.
            mixed = np.random.SeedSequence([self.seed, step]).generate_state(1)
            torch.manual_seed(int(mixed[0]))
