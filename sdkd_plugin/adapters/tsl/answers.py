"""What frozen teachers say of all windows of a data set, asked once instead of at every step.

Here live the numbering of windows and the answers by their numbers. Asking a teacher about a batch:
`SDKDDistiller.teach`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tsl.data import BatchMapItem, SpatioTemporalDataset

from sdkd_plugin.answers import TeacherAnswer, accepted_inputs
from sdkd_plugin.distiller import SDKDDistiller

STEP = "first_step"


def number_windows(dataset: SpatioTemporalDataset) -> None:
    """Give each window of a data set the number of its first step, for `WindowAnswers`.

    It comes as ``batch.first_step``, outside the inputs: no model sees it.

    Raises:
        ValueError: if the data set reads no window, or has a covariate of that name already.
    """
    if dataset.window < 1:
        raise ValueError(f"`dataset.window` is {dataset.window}, expected at least one step.")
    if STEP in dataset.keys:
        raise ValueError(f"`dataset` has {STEP!r} already, expected it to be free.")
    dataset.add_covariate(
        STEP,
        torch.arange(dataset.n_steps)[:, None],
        pattern="t f",
        add_to_input_map=False,
        convert_precision=False,
    )
    dataset.update_auxiliary_map(
        **{STEP: BatchMapItem(STEP, synch_mode="window", preprocess=False)}
    )


def first_steps(batch: Any) -> Int[Tensor, " batch"]:
    """The numbers of a batch's windows.

    Raises:
        ValueError: if its data set has not numbered them.
    """
    if STEP not in batch:
        raise ValueError(
            f"the batch has no {STEP!r}: number the data set's windows with `number_windows` "
            "before it is split and loaded."
        )
    return batch[STEP][:, 0, 0]


class WindowAnswers:
    """The teachers' answers to windows, by the number of their first step.

    They are kept on the CPU, as large as the forecasts (and tapped latents) of all windows: windows
    x horizon x nodes x features numbers for each teacher. Looking a batch up waits for a GPU,
    once a step.

    Args:
        distiller: with the teachers, which never change.
        batches: of windows that were numbered, as the models read them (scaled).

    Raises:
        ValueError: if windows were not numbered, or there are none.
    """

    def __init__(self, distiller: SDKDDistiller, batches: Iterable[Any]) -> None:
        steps: list[Tensor] = []
        sums: list[Tensor] = []
        answers: list[tuple[TeacherAnswer, ...]] = []
        for batch in batches:
            inputs = dict(batch.input.items())
            steps.append(first_steps(batch).cpu())
            sums.append(_sums(inputs["x"]).cpu())
            told = distiller.teach(**known_inputs(distiller, inputs))
            answers.append(tuple(_to(answer, torch.device("cpu")) for answer in told))
        if not steps:
            raise ValueError("`batches` is empty, expected at least one window.")
        numbers = torch.cat(steps)
        self._sums = torch.cat(sums)
        self._row = torch.full((int(numbers.max()) + 1,), -1)
        self._row[numbers] = torch.arange(len(numbers))
        self._answers = [_joined(told) for told in zip(*answers, strict=True)]

    def __call__(
        self, steps: Int[Tensor, " batch"], x: Float[Tensor, "batch ..."]
    ) -> list[TeacherAnswer]:
        """The answers to a batch, on the device of ``x``.

        Args:
            steps: numbers of the windows.
            x: what the models read of them, to notice other data under the same numbers.

        Raises:
            ValueError: if the teachers were not asked about a window, or it reads otherwise now.
        """
        steps = steps.cpu()
        known = steps < len(self._row)
        rows = self._row[steps.clamp_max(len(self._row) - 1)]
        if not bool((known & (rows >= 0)).all()):
            raise ValueError(
                f"the teachers were not asked about the window that begins at step "
                f"{int(steps[~(known & (rows >= 0))][0])}: ask about all windows of training."
            )
        if not torch.allclose(self._sums[rows], _sums(x).cpu(), rtol=1e-5, atol=1e-3):
            raise ValueError(
                "the readings of a window are not those that the teachers were asked about: the "
                "data, their scaling or an augmentation changed; ask the teachers again."
            )
        return [
            _to(
                TeacherAnswer(
                    answer.forecast[rows],
                    {tap: latent[rows] for tap, latent in answer.latents.items()},
                ),
                x.device,
            )
            for answer in self._answers
        ]


def known_inputs(distiller: SDKDDistiller, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What student or teachers take of a batch's inputs."""
    models = (distiller.student, *distiller.teachers)
    taken = {name for model in models for name in accepted_inputs(model, inputs)}
    return {name: value for name, value in inputs.items() if name in taken}


def _joined(answers: Sequence[TeacherAnswer]) -> TeacherAnswer:
    """One teacher's answers to several batches as one."""
    return TeacherAnswer(
        torch.cat([answer.forecast for answer in answers]),
        {tap: torch.cat([answer.latents[tap] for answer in answers]) for tap in answers[0].latents},
    )


def _sums(x: Tensor) -> Float[Tensor, " batch"]:
    """A number that tells windows apart."""
    flat = x.flatten(1).double()
    # Unequal weights notice reordered sensors too.
    return flat @ torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)


def _to(answer: TeacherAnswer, device: torch.device) -> TeacherAnswer:
    return TeacherAnswer(
        answer.forecast.to(device),
        {tap: latent.to(device) for tap, latent in answer.latents.items()},
    )
