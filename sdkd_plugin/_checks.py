"""Checks on what a caller gives: argument, what it was, what was expected, what to do.

Here live the few checks that more than one room needs; each raises `ValueError`. Nothing here
imports anything of ours.
"""

import cmath
import inspect
import math
import operator
import os
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any, SupportsIndex, cast

import jaxtyping
import torch
from torch import Tensor

MOST_SEED = 2**63 - 1
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shown(value: object) -> str:
    """A value for an error message: short, and a tensor or array by its type and shape."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return _REPR.repr(value)


def check_choice(argument: str, got: object, allowed: Iterable[str]) -> None:
    """Refuse a string option that is not one of ``allowed``; the message has the nearest one."""
    options = list(allowed)
    if isinstance(got, str) and got in options:
        return
    near = get_close_matches(got, options, n=1) if isinstance(got, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{argument}` is {shown(got)}, expected one of {options}.{hint}")


def check_type(argument: str, got: object, kind: type, remedy: str) -> None:
    """Refuse an argument of another type."""
    if not isinstance(got, kind):
        raise ValueError(
            f"`{argument}` is of type {type(got).__name__}, expected {kind.__name__}, {remedy}."
        )


def check_positive_int(argument: str, got: object, minimum: int = 1, most: int = 2**31) -> None:
    """Refuse anything but an integer, of Python or of an array library, within bounds."""
    try:
        number = None if isinstance(got, bool) else operator.index(cast(SupportsIndex, got))
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise ValueError(
            f"`{argument}` is {shown(got)}, expected an integer of at least {minimum}."
        )
    if number > most:
        raise ValueError(f"`{argument}` is {shown(got)}, expected an integer of at most {most}.")


def check_sizes(minimum: int = 1, /, **sizes: object) -> None:
    """`check_positive_int` for several arguments, given by name."""
    for argument, got in sizes.items():
        check_positive_int(argument, got, minimum)


def check_seed(seed: object) -> None:
    """Refuse what is no seed of torch's generators."""
    check_positive_int("seed", seed, 0, MOST_SEED)


def check_positive(argument: str, got: object, *, allow_zero: bool = False) -> None:
    """Refuse a number that is not finite and positive (or zero, where that is allowed)."""
    number = float(got) if isinstance(got, Real) and not isinstance(got, bool) else math.nan
    if not (number > 0 or (allow_zero and number == 0)) or math.isinf(number):
        bound = "at least 0" if allow_zero else "above 0"
        raise ValueError(f"`{argument}` is {shown(got)}, expected a finite number {bound}.")


def check_within(argument: str, got: object, interval: str) -> None:
    """Refuse what is no number in an interval, such as ``(0, 1]``."""
    low, high = map(float, interval[1:-1].split(", "))
    number = float(got) if isinstance(got, Real) and not isinstance(got, bool) else math.nan
    above = number > low or (interval[0] == "[" and number == low)
    if not (above and (number < high or (interval[-1] == "]" and number == high))):
        raise ValueError(f"`{argument}` is {shown(got)}, expected a number in {interval}.")


def warn_caller(message: str) -> None:
    """A warning at the caller's line: the first outside this package, torch and type checks."""
    files = (__file__, str(torch.__file__), str(jaxtyping.__file__))
    ours = tuple(os.path.join(os.path.dirname(file), "") for file in files)
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_finite(
    argument: str, x: Tensor, remedy: str = "drop them, fill them, or mask them out"
) -> None:
    """Refuse NaN and Inf. On a GPU this waits for the device."""
    if x.is_meta:
        raise ValueError(f"`{argument}` is on the meta device, expected a tensor with values.")
    # A finite sum proves all its terms finite, at a small part of the cost; an infinite one may be
    # an overflow.
    if cmath.isfinite(x.sum().item()):
        return
    if bad := int((~torch.isfinite(x)).sum()):
        raise ValueError(
            f"`{argument}` has {bad} of {x.numel()} values that are NaN or Inf; {remedy}."
        )


def check_shape(argument: str, got: Sequence[int], expected: Sequence[int], why: str = "") -> None:
    """Refuse a shape other than ``expected``; ``why`` says of what that is the shape."""
    if tuple(got) != tuple(expected):
        reason = f" ({why})" if why else ""
        raise ValueError(
            f"`{argument}` has shape {tuple(got)}, expected {tuple(expected)}{reason}."
        )


def check_mask(mask: Tensor, labels: Tensor) -> None:
    """Refuse a mask that is not boolean or does not broadcast to the labels axis by axis."""
    check_type("mask", mask, Tensor, "a tensor of torch.bool")
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` is of {mask.dtype}, expected torch.bool, True where observed.")
    if mask.shape != labels.shape and (
        mask.ndim != labels.ndim
        or any(m not in (1, n) for m, n in zip(mask.shape, labels.shape, strict=True))
    ):
        raise ValueError(
            f"`mask` has shape {tuple(mask.shape)}, expected {tuple(labels.shape)} as the labels, "
            "or 1 along an axis where it is the same."
        )


def check_labels(y: Tensor, mask: Tensor | None, argument: str = "y") -> None:
    """Refuse a mask that does not fit the labels, and observed labels that are NaN or Inf."""
    if mask is not None:
        check_mask(mask, y)
        y = y[mask.expand_as(y)]
    check_finite(argument, y)


def check_batch(
    x: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    inputs: Mapping[str, Any],
    finite: bool,
    **forecast: Tensor,
) -> None:
    """Refuse a batch that is empty or not finite, or whose mask does not fit its labels."""
    for name, value in (("x", x), ("y", y), *forecast.items()):
        if not isinstance(value, Tensor) and (name == "forecast" or value is not None):
            check_type(name, value, Tensor, "a batch of samples")
        elif value is not None and value.is_complex():
            raise ValueError(f"`{name}` is of {value.dtype}, expected real numbers.")
    if x is not None and (x.ndim == 0 or len(x) == 0):
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected at least one sample.")
    if mask is not None:
        if y is None:
            raise ValueError("`mask` is given but `y` is None: there are no labels to mask.")
        check_mask(mask, y)
    if not finite:
        return
    remedy = "fill them, since a mask covers labels alone, or drop the samples"
    for name, value in {"x": x, **inputs}.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            check_finite(name, value, remedy)
    if y is not None:
        check_finite("y", y if mask is None else y[mask.expand_as(y)])


def check_not_negative(argument: str, x: Tensor, remedy: str) -> None:
    """Refuse values that are NaN, Inf or below 0."""
    check_finite(argument, x)
    if bool((x < 0).any()):
        raise ValueError(
            f"`{argument}` goes down to {float(x.min()):g}, expected none below 0; {remedy}."
        )


def checked_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator of random numbers, or None for torch's global one."""
    if generator is not None:
        check_type("generator", generator, torch.Generator, "or None")
    return generator
