"""Teachers that were trained on data normalised otherwise than the student's.

Here live refusing such a teacher and converting for it. Normalising itself is the host's.
"""

import copy

import torch
from neuralop.data.transforms.base_transforms import Transform
from neuralop.data.transforms.data_processors import DataProcessor
from torch import Tensor, nn


class Renormalized(nn.Module):
    """A teacher behind its own normalisers, for data that have the student's.

    Formula: ``out_given(out_own^-1(teacher(in_own(in_given^-1(x)))))``, each normaliser left out
    where its processor has none.

    Args:
        teacher: called with x alone; its taps keep their names.
        own: the data processor that the teacher was trained behind.
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
        self.own_in, self.own_out = _normalizers_of(own)
        self.given_in, self.given_out = _normalizers_of(given)

    @property
    def taps(self) -> dict[str, str]:
        """Tap names and module paths, the teacher's own."""
        taps: dict[str, str] = dict(getattr(self.teacher, "taps", {}))
        return {name: f"teacher.{path}" for name, path in taps.items()}

    def forward(self, x: Tensor) -> Tensor:
        """The teacher's forecast, in the units of the student's training."""
        physical = _physical(self.given_in, x)
        forecast = self.teacher(_normalized(self.own_in, physical))
        return _normalized(self.given_out, _physical(self.own_out, forecast))


def check_same_units(given: DataProcessor, own: DataProcessor) -> None:
    """Refuse a teacher that was trained behind other normalisers than the student is.

    Args:
        given: the student's data processor.
        own: the teacher's.

    Raises:
        ValueError: naming the normaliser that differs.
    """
    for side in ("in_normalizer", "out_normalizer"):
        ours, theirs = getattr(given, side), getattr(own, side)
        if not _same(ours, theirs):
            raise ValueError(
                f"`teacher_processor` has the {side} {_describe(theirs)}, expected the student's, "
                f"{_describe(ours)}: a teacher reads and writes the student's units here; give "
                "`SDKDDistiller` the teacher as `Renormalized(teacher, teacher_processor, "
                "data_processor)`, and leave `teacher_processor` out."
            )


def _normalizers_of(processor: DataProcessor) -> tuple[Transform | None, Transform | None]:
    # Copies: a distiller moves its teachers from device to device, a trainer its data processor.
    return copy.deepcopy(processor.in_normalizer), copy.deepcopy(processor.out_normalizer)


def _normalized(normalizer: Transform | None, field: Tensor) -> Tensor:
    return field if normalizer is None else normalizer.transform(field)


def _physical(normalizer: Transform | None, field: Tensor) -> Tensor:
    return field if normalizer is None else normalizer.inverse_transform(field)


def _same(ours: Transform | None, theirs: Transform | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    if ours is theirs:
        return True
    if type(ours) is not type(theirs) or not hasattr(ours, "std"):
        return False
    # A transform is x -> (x - mean) / scale: the same where both numbers are, at any shape.
    for a, b in zip(_numbers(ours), _numbers(theirs), strict=True):
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            return False
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-12):
            return False
    return True


def _numbers(normalizer: Transform) -> tuple[Tensor, Tensor]:
    return (
        torch.as_tensor(normalizer.mean, dtype=torch.float64, device="cpu"),
        torch.as_tensor(normalizer.std + normalizer.eps, dtype=torch.float64, device="cpu"),
    )


def _describe(normalizer: Transform | None) -> str:
    if normalizer is None:
        return "None"
    if not hasattr(normalizer, "std"):
        return type(normalizer).__name__
    mean, std = (float(numbers.mean()) for numbers in _numbers(normalizer))
    return f"{type(normalizer).__name__} (mean {mean:.6g}, deviation {std:.6g}, averaged)"
