"""Teachers trained on data that were normalised otherwise than the student's."""

import copy

import torch
from neuralop.data.transforms.base_transforms import Transform
from neuralop.data.transforms.data_processors import DataProcessor
from torch import Tensor, nn


class Renormalized(nn.Module):
    """A teacher with its own normalisers, for data that have the student's.

    Formula: ``out_given(out_own^-1(teacher(in_own(in_given^-1(x)))))``, each normaliser left out
    where its processor has none.

    Args:
        teacher: called with x alone; its taps keep their names.
        own: the data processor of the teacher's training.
        given: the data processor of the student's training. Both are copied.

    Example:
        >>> from neuralop.data.transforms.data_processors import DefaultDataProcessor
        >>> from neuralop.data.transforms.normalizers import UnitGaussianNormalizer
        >>> scale = UnitGaussianNormalizer(torch.tensor(1.0), torch.tensor(2.0), eps=0.0)
        >>> own, given = DefaultDataProcessor(scale, scale), DefaultDataProcessor()
        >>> teacher = Renormalized(nn.ReLU(), own, given)
        >>> teacher(torch.tensor([0.0, 5.0]))
        tensor([1., 5.])
    """

    def __init__(self, teacher: nn.Module, own: DataProcessor, given: DataProcessor) -> None:
        super().__init__()
        self.teacher = teacher
        taps: dict[str, str] = getattr(teacher, "taps", {})
        self.taps = {name: f"teacher.{path}" for name, path in taps.items()}
        # Copies: teachers and data processors are moved from device to device separately.
        self.own_in, self.own_out, self.given_in, self.given_out = (
            copy.deepcopy(normalizer)
            for processor in (own, given)
            for normalizer in (processor.in_normalizer, processor.out_normalizer)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The teacher's forecast, in the units of the student's training."""
        x = x if self.given_in is None else self.given_in.inverse_transform(x)
        forecast = self.teacher(x if self.own_in is None else self.own_in.transform(x))
        if self.own_out is not None:
            forecast = self.own_out.inverse_transform(forecast)
        return forecast if self.given_out is None else self.given_out.transform(forecast)


def check_same_units(given: DataProcessor, own: DataProcessor) -> None:
    """Refuse a teacher's data processor that normalises otherwise than the student's."""
    for side in ("in_normalizer", "out_normalizer"):
        ours, theirs = getattr(given, side), getattr(own, side)
        if not _same(ours, theirs):
            raise ValueError(
                f"`teacher_processor` has the {side} {_describe(theirs)}, expected the student's, "
                f"{_describe(ours)}: give `DistillationLoss` the teacher `Renormalized(teacher, "
                "teacher_processor, data_processor)`, and leave `teacher_processor` out."
            )


def _same(ours: Transform | None, theirs: Transform | None) -> bool:
    if ours is theirs:
        return True
    if type(ours) is not type(theirs) or not hasattr(ours, "std"):
        return False
    # A transform is x -> (x - mean) / scale: the same where both numbers are, at any shape.
    pairs = zip(_numbers(ours), _numbers(theirs), strict=True)
    try:
        return all(bool(torch.isclose(a, b, rtol=1e-5, atol=1e-12).all()) for a, b in pairs)
    except RuntimeError:  # shapes that do not broadcast
        return False


def _numbers(normalizer: Transform) -> list[Tensor]:
    numbers = (normalizer.mean, normalizer.std + normalizer.eps)
    return [torch.as_tensor(number, dtype=torch.float64, device="cpu") for number in numbers]


def _describe(normalizer: Transform | None) -> str:
    if not hasattr(normalizer, "std"):
        return "None" if normalizer is None else type(normalizer).__name__
    mean, std = (float(numbers.mean()) for numbers in _numbers(normalizer))
    return f"{type(normalizer).__name__} (mean {mean:.6g}, deviation {std:.6g}, averaged)"
