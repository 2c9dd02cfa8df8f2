"""What a step of distillation gives: its loss, and the parts of it.

Here live the terms alone; they come from `SDKDDistiller`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DistillationTerms:
    """A step's loss and its parts; all but the total are without gradient.

    Attributes:
        total: ``task + kd_weight * (frequency-aligned loss + weighted latent losses)``.
        task: the loss against the labels, 0 where nothing is labelled.
        frequency: mean squared difference from the teacher in each band, unweighted, of shape
            ``(n_bands,)``; None where ``kd_weight`` is 0 and no teacher was asked.
        features: the loss of each latent pair, unweighted, by ``"student<-teacher"``.
        band_weights: what each band counted for, or None as ``frequency``.
        teacher_weights: what each teacher counted for, of shape ``(n_teachers,)``, a mean over the
            batch where they differ by sample; or None as ``frequency``.
    """

    total: Tensor
    task: Tensor
    frequency: Tensor | None
    features: Mapping[str, Tensor]
    band_weights: Tensor | None
    teacher_weights: Tensor | None

    def scalars(self) -> dict[str, Tensor]:
        """One number a name, without gradient, for a logger.

        Example:
            >>> import torch
            >>> zero = torch.tensor(0.0)
            >>> terms = DistillationTerms(zero, zero, torch.zeros(2), {}, torch.ones(2), None)
            >>> list(terms.scalars())
            ['total', 'task', 'kd_band_0', 'kd_band_1', 'weight_0', 'weight_1']
        """
        scalars = {"total": self.total.detach(), "task": self.task}
        for name, values in {
            "kd_band": self.frequency,
            "weight": self.band_weights,
            "teacher_weight": self.teacher_weights,
        }.items():
            for i, value in enumerate(() if values is None else values):
                scalars[f"{name}_{i}"] = value
        return scalars | {f"kd_{name}": value for name, value in self.features.items()}
