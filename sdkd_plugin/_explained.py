"""Errors that come from deep inside of a call, told in terms of its arguments."""

import errno
import functools
import inspect
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar, cast, get_type_hints

from sdkd_plugin._checks import shown

_T = TypeVar("_T", bound=Callable[..., Any])
_DEEP = (AttributeError, LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError)


def explained(function: _T) -> _T:
    """A function or class that, where it fails, names the argument that has a wrong type.

    What works costs one call more: types are looked at after an error, and only after one that
    names no argument. The error becomes a ValueError if a type is not the annotated one.
    """
    if isinstance(function, type):
        function.__init__ = explained(function.__init__)  # type: ignore[misc]
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except _DEEP as error:
            if wrong := _wrong_type(function, args, kwargs, error):
                raise ValueError(wrong) from error
            raise

    return cast(_T, call)


def _wrong_type(function: Any, args: Any, kwargs: Any, error: Exception) -> str | None:
    """What is wrong with the type of an argument, unless an error says that already."""
    if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
        return None
    from beartype import BeartypeConf, FrozenDict
    from beartype.door import is_bearable

    overrides: Any = FrozenDict
    numbers = BeartypeConf(hint_overrides=overrides({int: Integral, float: Real}))
    try:
        signature, hints = inspect.signature(function), get_type_hints(function)
        given = signature.bind(*args, **kwargs).arguments
    except (NameError, TypeError):
        return None
    if any(f"{before}{name}`" in str(error) for name in given for before in "`."):
        return None
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        if isinstance(error, OverflowError) and isinstance(value, int):
            return f"`{name}` is {shown(value)}, expected a number that a float holds."
        if (
            isinstance(error, OSError)
            and isinstance(value, str | os.PathLike)
            and len(str(value)) > 255
        ):
            return f"`{name}` is {shown(str(value))}, expected a shorter path."
        try:
            fits = is_bearable(value, hints.get(name, object), conf=numbers)
        except (TypeError, RuntimeError):  # a tensor of no axes has no length
            fits = False
        if not fits:
            expected = str(hints[name]).removeprefix("<class '").removesuffix("'>")
            return f"`{name}` is {shown(value)}, expected {expected[:200]}."
    return None
