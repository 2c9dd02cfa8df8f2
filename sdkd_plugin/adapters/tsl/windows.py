"""The teachers' outputs for all windows of a data set, by the number of a window's first step.

Here live the numbering of windows and the look-up. Computing the outputs is `precompute`'s.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tsl.data import BatchMapItem, SpatioTemporalDataset

from sdkd_plugin.cache import precompute
from sdkd_plugin.cache.chunks import input_sums, same_inputs
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.teachers import TeacherOutput

STEP = "first_step"


def number_windows(dataset: SpatioTemporalDataset) -> None:
    """Give each window of a data set the number of its first step, ``batch.first_step``.

    It is outside the inputs: no model receives it.

    Raises:
        ValueError: if the data set reads no window, or has a covariate of that name.
    """
    if dataset.window < 1:
        raise ValueError(f"`dataset.window` is {dataset.window}, expected at least one step.")
    if STEP in dataset.keys:
        raise ValueError(f"`dataset` has {STEP!r} already, expected it to be free.")
    steps = torch.arange(dataset.n_steps)[:, None]
    dataset.add_covariate(STEP, steps, "t f", add_to_input_map=False, convert_precision=False)
    item = BatchMapItem(STEP, synch_mode="window", preprocess=False)
    dataset.update_auxiliary_map(**{STEP: item})


def first_steps(batch: Any) -> Int[Tensor, " batch"]:
    """The numbers of a batch's windows; a ValueError if its data set has none."""
    if STEP not in batch:
        raise ValueError(
            f"the batch has no {STEP!r}: call `number_windows` on the data set before it is split."
        )
    return batch[STEP][:, 0, 0]


def window_inputs(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The inputs of numbered windows as `sdkd_plugin.precompute` takes them for a cache.

    Args:
        batches: of numbered windows, such as ``StaticGraphLoader(data.trainset, batch_size=64)``,
            in a fixed order.

    Raises:
        ValueError: if windows have no numbers.
    """
    for batch in batches:
        yield {**dict(batch.input.items()), "index": first_steps(batch)}


class WindowOutputs:
    """Outputs of the teachers of ``loss`` on the CPU, one row a window of ``batches``.

    They take windows x horizon x nodes x features numbers for each teacher, and more for latents.
    A look-up waits for a GPU, once a step.
    """

    def __init__(self, loss: DistillationLoss, batches: Iterable[Any]) -> None:
        steps: list[Tensor] = []
        sums: list[Tensor] = []

        def inputs() -> Iterator[dict[str, Any]]:
            for each in window_inputs(batches):
                steps.append(each["index"])
                sums.append(input_sums(each["x"]).cpu())
                yield each

        self._outputs = precompute(loss, inputs())
        numbers = torch.cat(steps)
        self._sums = torch.cat(sums).numpy()
        self._row = torch.full((int(numbers.max()) + 2,), -1)  # the last for all later steps
        self._row[numbers] = torch.arange(len(numbers))

    def __call__(
        self, steps: Int[Tensor, " batch"], x: Float[Tensor, "batch ..."]
    ) -> list[TeacherOutput]:
        """The outputs for numbered windows ``x``, on their device.

        Raises:
            ValueError: if a window is missing, or its readings have changed.
        """
        steps = steps.cpu()
        rows = self._row[steps.clamp_max(len(self._row) - 1)]
        if int(rows.min()) < 0:
            raise ValueError(
                f"there is no teacher output for the window that begins at step "
                f"{int(steps[rows < 0][0])}: precompute all windows of training."
            )
        if not same_inputs(x, self._sums[rows]).all():
            raise ValueError(
                "the readings of a window are not those that the teachers' outputs were computed "
                "from: the data, their scaling or an augmentation changed; precompute again."
            )
        return [output.select(rows).to(x.device) for output in self._outputs]
