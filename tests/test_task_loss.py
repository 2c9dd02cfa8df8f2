"""The task term: means over observed labels, known answers and refusals."""

import pytest
import torch
import torch.nn.functional as F
from small import random, refusals
from torch import Tensor

from sdkd_plugin._checks import check_finite
from sdkd_plugin.losses.task import masked_error, relative_l2, sample_errors

FORECAST, Y = random(4, 2, 5), random(4, 2, 5, seed=1)
MASK = random(4, 1, 5, seed=2) > 0
MASK[2] = False
HOLES = torch.where(MASK, Y, torch.nan)


def loop(forecast: Tensor, y: Tensor, mask: Tensor) -> list[list[float]]:
    """The squared errors of each sample's observed labels."""
    observed = mask.expand_as(y)
    return [
        (s - t)[seen].square().tolist() for s, t, seen in zip(forecast, y, observed, strict=True)
    ]


def test_sample_errors_equal_a_loop():
    errors, labelled = sample_errors(FORECAST.clone().requires_grad_(), HOLES, MASK)
    assert labelled.tolist() == [True, True, False, True]
    assert not errors.requires_grad
    expected = [sum(sample) / max(len(sample), 1) for sample in loop(FORECAST, Y, MASK)]
    assert errors.tolist() == pytest.approx(expected)


def test_masked_error_is_a_mean_over_observed_labels():
    observed = [square for sample in loop(FORECAST, Y, MASK) for square in sample]
    error = masked_error(FORECAST, HOLES, MASK)
    assert float(error) == pytest.approx(sum(observed) / len(observed))
    assert masked_error(FORECAST, HOLES, MASK & False) == 0
    everything = torch.ones_like(Y, dtype=torch.bool)
    torch.testing.assert_close(masked_error(FORECAST, Y, everything), masked_error(FORECAST, Y))
    torch.testing.assert_close(masked_error(FORECAST, Y, loss="mae"), F.l1_loss(FORECAST, Y))


@pytest.mark.parametrize("loss", ["mse", "mae", "relative_l2"])
def test_missing_labels_have_no_gradient(loss: str):
    forecast = FORECAST.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(masked_error(forecast, HOLES, MASK, loss), forecast)
    assert torch.equal(gradient != 0, MASK.expand_as(Y))


def test_relative_l2_by_hand_and_over_labelled_samples():
    forecast = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert relative_l2(forecast, y).tolist() == [1.25, 0]
    # Observed: 3 against 0 and 0 against 4 (5 / 4); then nothing, which is left out of the mean.
    mask = torch.tensor([[True, True], [False, False]])
    assert masked_error(forecast, y, mask, "relative_l2") == 1.25


def test_half_precision_sums_do_not_overflow():
    forecast = torch.ones(4, 10, 64, 64, dtype=torch.float16)
    everything = torch.ones_like(forecast, dtype=torch.bool)
    assert masked_error(forecast, torch.zeros_like(forecast), everything) == 1
    large = torch.full((2, 3), 300.0, dtype=torch.float16)
    assert sample_errors(large, torch.zeros_like(large))[0].tolist() == [9e4, 9e4]


test_refusals = refusals(
    (
        {"y": Y[:, :1]},
        r"`y` has shape \(4, 1, 5\), expected \(4, 2, 5\) \(the student's forecast\)",
    ),
    ({"loss": "mze"}, r"`task_loss` is 'mze', expected one of \['mse', 'mae', 'relative_l2'\]"),
    ({"loss": F.mse_loss}, r"`task_loss` returns a tensor of shape \(\), expected \(4, 2, 5\)"),
    (
        {"loss": lambda s, y: (s - y).mean(-1)},
        r"`task_loss` returns a tensor of shape \(4, 2\), ex",
    ),
    of=lambda y=Y, loss="mse": masked_error(FORECAST, y, None, loss),
)


def test_large_finite_values_whose_sum_overflows_are_finite():
    x = torch.full((3, 400), 3e38)
    assert not x.sum().isfinite()
    check_finite("x", x)
    x[1, 0] = torch.inf
    with pytest.raises(ValueError, match="`x` has 1 of 1200 values that are NaN or Inf"):
        check_finite("x", x)
