"""A student FNO whose first weights are cut out of a larger FNO."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from neuralop.models import FNO
from torch import Tensor

from sdkd_plugin._checks import check_shape, check_type, shown
from sdkd_plugin.models.registry import tensors

_MAY_DIFFER = (
    *("n_modes", "hidden_channels", "lifting_channel_ratio", "projection_channel_ratio"),
    *("channel_mlp_expansion", "channel_mlp_dropout", "args"),
)
# Which channels the first two axes of a weight are; all others are hidden ones on both.
_AXES = {
    r"lifting\..*fcs\.0\.": ("lifting", ""),
    r"lifting\..*fcs\.1\.": ("hidden", "lifting"),
    r"projection\..*fcs\.0\.": ("projection", "hidden"),
    r"projection\..*fcs\.1\.": ("", "projection"),
    r"channel_mlp\.(\d+)\..*fcs\.0\.": (r"mlp \1", "hidden"),
    r"channel_mlp\.(\d+)\..*fcs\.1\.": ("hidden", r"mlp \1"),
}


def inherit(teacher: FNO, student: FNO) -> FNO:
    """A copy of the student with the teacher's lowest modes and its channels of most energy.

    A channel is scored by its share of the squares of each weight that reads or writes it, and the
    best are kept, the same in all layers. For sizes equal to the teacher's this is the teacher.
    Distil the student afterwards: it is a start, not a compression.

    Args:
        teacher: a trained FNO, without factorization.
        student: an FNO of at most its modes and channels, and else the same arguments.

    Raises:
        ValueError: if an argument other than a size differs, a size is above the teacher's, or a
            model is no FNO with dense weights.

    Example:
        >>> sizes = {"in_channels": 1, "out_channels": 1, "n_layers": 2}
        >>> teacher = FNO(n_modes=(8, 8), hidden_channels=16, **sizes)
        >>> student = inherit(teacher, FNO(n_modes=(4, 4), hidden_channels=8, **sizes))
        >>> student(torch.randn(2, 1, 16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """
    arguments: list[dict[str, Any]] = []
    for name, model in (("teacher", teacher), ("student", student)):
        check_type(name, model, FNO, "neuralop.models.FNO(...)")
        given = model._init_kwargs.items()
        arguments.append({key: shown(each) for key, each in given if key not in _MAY_DIFFER})
        if model.factorization is not None:
            raise ValueError(
                f"`{name}` has factorization={model.factorization!r}, expected None: only dense "
                "weights can be cut."
            )
    mine, theirs = arguments
    if differ := sorted(key for key in mine if mine[key] != theirs.get(key)):
        got = {key: (mine[key], theirs.get(key)) for key in differ}
        raise ValueError(f"`teacher` and `student` differ in {got}, expected sizes alone to.")
    source, made = tensors(teacher), copy.deepcopy(student)
    target = tensors(made)
    kept = _channels(source, target, teacher.separable)
    with torch.no_grad():
        for name, weight in source.items():
            for axis, channels in _channel_axes(name, weight, source, teacher.separable):
                weight = weight.index_select(axis, kept[channels].to(weight.device))
            for axis in range(_first_mode(name, weight, teacher.separable), weight.ndim):
                n, m = weight.shape[axis], target[name].shape[axis]
                if m > n:
                    raise ValueError(
                        f"`student` has {m} modes along an axis, expected at most the teacher's "
                        f"{n}."
                    )
                # Frequency 0 is in the middle, but first on the last axis of real fields.
                halved = axis == weight.ndim - 1 and not teacher.complex_data
                weight = weight.narrow(axis, 0 if halved else n // 2 - m // 2, m)
            check_shape(f"student.{name}", target[name].shape, weight.shape, "the cut weight")
            target[name].copy_(weight)
    return made


def _first_mode(name: str, weight: Tensor, separable: bool) -> int:
    """The first axis of modes; that behind the last where a weight has none."""
    spectral = re.search(r"convs\.\d+\.weight", name)
    return (1 if separable else 2) if spectral else weight.ndim


def _channel_axes(
    name: str, weight: Tensor, source: dict[str, Tensor], separable: bool
) -> Iterator[tuple[int, str]]:
    """The axes of channels of a weight, and which channels they are."""
    axes = ("hidden", "hidden")
    for pattern, each in _AXES.items():
        if found := re.search(pattern, name):
            axes = (found.expand(each[0]), found.expand(each[1]))
    if axes[0] == "lifting" and not any(re.search(r"lifting\..*fcs\.1\.", each) for each in source):
        axes = ("hidden", "")
    for axis, channels in enumerate(axes[: _first_mode(name, weight, separable)]):
        # Biases and gates have axes of length 1.
        if channels and weight.ndim > axis and weight.shape[axis] > 1:
            yield axis, channels


def _channels(
    source: dict[str, Tensor], target: dict[str, Tensor], separable: bool
) -> dict[str, Tensor]:
    """The places of the channels that are kept, in order."""
    scores: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    sizes: dict[str, int] = {}
    for name, weight in source.items():
        for axis, channels in _channel_axes(name, weight, source, separable):
            others = [i for i in range(weight.ndim) if i != axis]
            energy = weight.abs().square().float().cpu()
            energy = energy.sum(others) if others else energy
            scores[channels] = scores[channels] + energy / energy.sum().clamp_min(1e-30)
            sizes[channels] = target[name].shape[axis]
    for channels, n in sizes.items():
        if n > len(scores[channels]):
            raise ValueError(
                f"`student` has {n} {channels.split()[0]} channels, expected at most the teacher's "
                f"{len(scores[channels])}."
            )
    return {name: score.topk(sizes[name]).indices.sort().values for name, score in scores.items()}
