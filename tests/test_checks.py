"""Checks of arguments: numbers of any library pass, messages stay short."""

import numpy as np
import pytest
import torch

from sdkd_plugin._checks import (
    check_choice,
    check_finite,
    check_positive,
    check_positive_int,
    check_within,
)


def test_numbers_of_numpy_are_numbers():
    check_positive_int("n", np.int64(2))
    check_positive_int("n", np.uint8(0), minimum=0)
    check_positive("weight", np.float32(0.5))
    check_positive("weight", np.int64(0), allow_zero=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64], ids=str)
def test_finite_numbers_of_any_kind(dtype: torch.dtype):
    x = torch.full((70_000,), 2, dtype=dtype)  # the sum overflows in half precision
    check_finite("x", x)
    with pytest.raises(ValueError, match="1 of 70000 values that are NaN or Inf"):
        check_finite("x", x.index_fill(0, torch.tensor([3]), float("nan")))


@pytest.mark.parametrize("value", [True, np.True_, 2.5, "2", None, np.ones(3), torch.ones(10**6)])
def test_others_are_refused_without_printing_them(value):
    with pytest.raises(ValueError, match=r"^`n` is .{1,40}, expected an integer of at least 1\.$"):
        check_positive_int("n", value)


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, True, "1", torch.ones(10**6)])
def test_a_number_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match=r"^`n` is .{1,40}, expected a finite number above 0\.$"):
        check_positive("n", value)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1]", [1e-9, 1], [0, 1.1]),
        ("[0, 1)", [0, np.float32(0.5)], [-1e-9, 1]),
        ("(1, inf)", [1.1, 1e300], [1, np.inf]),
        ("[1e-6, 1e3]", [1e-6, 1e3], [0, 1001]),
    ],
)
def test_an_interval_has_open_and_closed_ends(interval, inside, outside):
    for value in inside:
        check_within("n", value, interval)
    for value in [*outside, np.nan, True, "1", None, torch.ones(10**6)]:
        with pytest.raises(ValueError, match=r"^`n` is .{1,40}, expected a number in ") as refused:
            check_within("n", value, interval)
        assert str(refused.value).endswith(f"{interval}.")


@pytest.mark.parametrize("value", ["x" * 10**5, torch.ones(10**6), ["fixed"], None])
def test_an_option_is_one_of_the_names(value):
    with pytest.raises(ValueError, match=r"^`way` is .{1,90}, expected one of \['fixed'\]\.$"):
        check_choice("way", value, ["fixed"])
