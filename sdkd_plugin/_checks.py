"""Checks on what a caller gives: argument, what it was, what was expected, what to do.

Here live the few checks that more than one room needs. Nothing here imports anything of ours.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor


def check_choice(argument: str, got: object, allowed: Iterable[str]) -> None:
    """Refuse a string option that is not one of ``allowed``.

    Raises:
        ValueError: naming the argument, what it was, what is allowed and the nearest allowed name.
    """
    options = list(allowed)
    if got in options:
        return
    near = get_close_matches(str(got), options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{argument}` is {got!r}, expected one of {options}.{hint}")


def check_positive_int(argument: str, got: object, minimum: int = 1) -> None:
    """Refuse anything but an integer of at least ``minimum``.

    Raises:
        ValueError: naming the argument, what it was and the least value.
    """
    if isinstance(got, bool) or not isinstance(got, int) or got < minimum:
        raise ValueError(f"`{argument}` is {got!r}, expected an integer of at least {minimum}.")


def check_positive(argument: str, got: float, *, allow_zero: bool = False) -> None:
    """Refuse a number that is not finite and positive (or zero, where that is allowed).

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    number = isinstance(got, int | float) and not isinstance(got, bool)
    if not number or not (got > 0 or (allow_zero and got == 0)) or got == float("inf"):
        bound = "at least 0" if allow_zero else "above 0"
        raise ValueError(f"`{argument}` is {got!r}, expected a finite number {bound}.")


def check_finite(argument: str, x: Tensor) -> None:
    """Refuse NaN and Inf. On a GPU this waits for the device.

    Raises:
        ValueError: naming the argument and how many values are not finite.
    """
    # A finite sum proves all its terms finite, at a small part of the cost; an infinite one may be
    # an overflow.
    if bool(torch.isfinite(x.sum())):
        return
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(
            f"`{argument}` has {bad} of {x.numel()} values that are NaN or Inf; "
            "drop them, fill them, or mask them out."
        )


def check_shape(argument: str, got: Sequence[int], expected: Sequence[int], why: str = "") -> None:
    """Refuse a shape other than ``expected``.

    Raises:
        ValueError: naming the argument, both shapes and ``why`` they must agree.
    """
    if tuple(got) != tuple(expected):
        reason = f" ({why})" if why else ""
        raise ValueError(
            f"`{argument}` has shape {tuple(got)}, expected {tuple(expected)}{reason}."
        )


def check_mask(mask: Tensor, labels: Tensor) -> None:
    """Refuse a mask that is not boolean or does not broadcast to the labels axis by axis.

    Raises:
        ValueError: naming dtype or shape, and what was expected.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` is of {mask.dtype}, expected torch.bool, True where observed.")
    if mask.ndim != labels.ndim or any(
        m not in (1, n) for m, n in zip(mask.shape, labels.shape, strict=True)
    ):
        raise ValueError(
            f"`mask` has shape {tuple(mask.shape)}, expected {tuple(labels.shape)} as the labels, "
            "or 1 along an axis where it is the same."
        )


def check_not_negative(argument: str, x: Tensor, remedy: str) -> None:
    """Refuse values that are NaN, Inf or below 0.

    Raises:
        ValueError: naming the argument, the lowest value and the remedy.
    """
    check_finite(argument, x)
    if bool((x < 0).any()):
        raise ValueError(
            f"`{argument}` goes down to {float(x.min()):g}, expected none below 0; {remedy}."
        )
