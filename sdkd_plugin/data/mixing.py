"""Batches of labelled and unlabelled samples at a fixed ratio, for both hosts' loaders."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from sdkd_plugin._checks import check_positive, check_positive_int, check_seed, check_type

Sample = Mapping[str, Any]
Readable = Dataset[Sample] | Sequence[Sample]


class MixedSampler(DistributedSampler[int]):
    """The order of samples in which each batch has the same number of unlabelled ones.

    An epoch is a pass over the labelled samples, less the last incomplete batch; the unlabelled
    ones go on where the epoch before stopped. The order follows from seed and epoch. Each iterator
    is of the next epoch, unless ``set_epoch`` says of which.

    Args:
        labelled: which samples have labels.
        batch_size: of the loader; labelled samples come first in a batch.
        ratio: unlabelled samples of a batch over all of its samples; must make a whole number.
        seed: of both orders.
        world: processes, each of which reads a share.
        rank: number of this process.

    Raises:
        ValueError: if the ratio makes no whole number between 0 and the batch size, or there are
            not enough samples for one batch.

    Example:
        >>> sampler = MixedSampler(torch.arange(10) < 4, batch_size=4, ratio=0.5)
        >>> [sum(i < 4 for i in batch) for batch in torch.tensor(list(sampler)).view(-1, 4)]
        [tensor(2), tensor(2)]
    """

    def __init__(
        self,
        labelled: Bool[Tensor, " samples"],
        *,
        batch_size: int,
        ratio: float = 0.5,
        seed: int = 0,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        check_positive_int("batch_size", batch_size, minimum=2)
        check_seed(seed)
        check_positive("ratio", ratio)
        super().__init__(range(len(labelled)), num_replicas=world, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.n_unlabelled = round(ratio * batch_size)
        self.n_labelled = batch_size - self.n_unlabelled
        if abs(self.n_unlabelled - ratio * batch_size) > 1e-6 or ratio >= 1:
            raise ValueError(
                f"`ratio` is {ratio}, expected a number between 0 and 1 that is a multiple of "
                f"1/{batch_size}, since `batch_size` is {batch_size}."
            )
        self._places = {flag: (labelled == flag).nonzero()[:, 0] for flag in (True, False)}
        for flag, needed in ((True, self.n_labelled), (False, self.n_unlabelled)):
            if (n := len(self._places[flag])) < needed * world:
                raise ValueError(
                    f"`labelled` has {n} samples that are {flag}, expected at least "
                    f"{needed * world}, for one batch: choose another `ratio` or `batch_size`."
                )
        self.n_batches = len(self._places[True]) // (self.n_labelled * world)

    def __len__(self) -> int:
        """Samples of an epoch in this process."""
        return self.n_batches * (self.n_labelled + self.n_unlabelled)

    def __iter__(self) -> Iterator[int]:
        """Places of the samples, batch by batch."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        parts = []
        for flag, size in ((True, self.n_labelled), (False, self.n_unlabelled)):
            count, n = self.n_batches * size * self.num_replicas, len(self._places[flag])
            start = epoch * (n if flag else count)
            first, last = start // n, -(-(start + count) // n)
            order = torch.cat([self._pass(flag, number) for number in range(first, last)])
            mine = order[start - first * n :][:count][self.rank :: self.num_replicas]
            parts.append(mine.view(self.n_batches, size))
        return iter(torch.cat(parts, 1).flatten().tolist())

    def _pass(self, flag: bool, number: int) -> Tensor:
        mixed = np.random.SeedSequence([self.seed, number, flag])
        generator = torch.Generator().manual_seed(int(mixed.generate_state(1)[0]))
        places = self._places[flag]
        return places[torch.randperm(len(places), generator=generator)]


class MixedSamples(Dataset[dict[str, Any]]):
    """Labelled samples, then unlabelled ones, as neuraloperator's trainer and `TrainerLoss` read.

    A sample is ``{"x", "y", "mask", "index", ...}``. That of an unlabelled one has a ``y`` of NaN
    and a ``mask`` of False, whatever its own are. ``index`` numbers the samples, for a cache.

    Args:
        labelled: samples with ``x`` and ``y`` at least.
        unlabelled: samples with ``x`` and the further inputs of the labelled ones.

    Raises:
        ValueError: if one is empty, or an input is missing.
    """

    def __init__(self, labelled: Readable, unlabelled: Readable) -> None:
        self.parts = cast(tuple[Any, Any], (labelled, unlabelled))
        for name, samples in zip(("labelled", "unlabelled"), self.parts, strict=True):
            check_positive_int(f"len({name})", len(samples))
        first, other = labelled[0], unlabelled[0]
        check_type("labelled[0]", first, Mapping, "a sample such as {'x': x, 'y': y}")
        check_type("unlabelled[0]", other, Mapping, "a sample such as {'x': x}")
        self._names = first.keys() - {"y", "mask", "index"}
        if "y" not in first:
            raise ValueError(f"`labelled` has samples of {sorted(first)}, expected a 'y' in them.")
        if missing := sorted(self._names - other.keys()):
            raise ValueError(
                f"`unlabelled` has samples without {missing}, expected the inputs of the labelled "
                "ones."
            )
        y = torch.as_tensor(first["y"])
        self._y = torch.full_like(y, torch.nan)
        mask = first.get("mask", torch.ones([1] * y.ndim, dtype=torch.bool))
        self._seen, self._hidden = torch.ones_like(mask), torch.zeros_like(mask)

    @property
    def labelled(self) -> Bool[Tensor, " samples"]:
        """Which samples have labels."""
        return torch.arange(len(self)) < len(self.parts[0])

    def __len__(self) -> int:
        """Samples of both kinds."""
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample."""
        n = len(self.parts[0])
        if index < n:
            return {"mask": self._seen, **self.parts[0][index], "index": index}
        sample = self.parts[1][index - n]
        inputs = {name: sample[name] for name in self._names}
        return {**inputs, "y": self._y, "mask": self._hidden, "index": index}


def mix(
    labelled: Readable,
    unlabelled: Readable,
    *,
    batch_size: int,
    ratio: float = 0.5,
    seed: int = 0,
    **loader: Any,
) -> DataLoader[dict[str, Any]]:
    """A loader of labelled and unlabelled samples for neuraloperator's trainer.

    Behind tsl give `SeededDataModule` the ``unlabelled`` windows. To ask the teachers ahead, give
    `sdkd_plugin.precompute` the batches of ``DataLoader(MixedSamples(...), batch_size)``.

    Args:
        labelled: see `MixedSamples`.
        unlabelled: likewise.
        batch_size: of all samples; see `MixedSampler`.
        ratio: unlabelled samples of a batch over all.
        seed: of the order.
        **loader: of torch's ``DataLoader``.

    Raises:
        ValueError: as `MixedSamples` and `MixedSampler`.

    Example:
        >>> from torch.utils.data import StackDataset
        >>> x, y = torch.randn(2, 20, 1, 4, 4)
        >>> batches = mix(StackDataset(x=x, y=y), StackDataset(x=x + 1), batch_size=8, ratio=0.75)
        >>> next(iter(batches))["mask"].flatten().tolist()
        [True, True, False, False, False, False, False, False]
    """
    samples = MixedSamples(labelled, unlabelled)
    sampler = MixedSampler(samples.labelled, batch_size=batch_size, ratio=ratio, seed=seed)
    return DataLoader(samples, batch_size, sampler=sampler, **loader)


def windows_apart(
    starts: Int[Tensor, " windows"], others: Int[Tensor, " others"], *, span: int
) -> Bool[Tensor, " windows"]:
    """Which windows share no frame with any of the others.

    A frame that is a label of one window is an input of another that begins a little later. Where
    the labels of unlabelled windows are to be unknown, take those apart from the labelled ones; and
    take none that share frames with windows for validation or test.

    Args:
        starts: first frames, numbered through; leave ``span`` numbers free between trajectories.
        others: likewise.
        span: frames of a window, read and forecast.

    Example:
        >>> windows_apart(torch.tensor([0, 3, 6]), torch.tensor([2]), span=4)
        tensor([False, False,  True])
    """
    check_positive_int("span", span)
    others = others.sort().values
    # Windows overlap where one begins less than a span before or after the other.
    return torch.searchsorted(others, starts + span) == torch.searchsorted(
        others, starts - span, right=True
    )
