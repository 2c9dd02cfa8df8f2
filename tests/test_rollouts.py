"""Roll-outs: forecasts from forecasts, their errors by step, and divergence that counts."""

import pytest
import torch
from torch import nn

from sdkd_plugin import Bands, GraphTransform, GridTransform
from sdkd_plugin.report import rollout_curves, rollout_scores, rollout_spectrum
from sdkd_plugin.rollouts import Unrolled, rollout

BANDS = Bands.split(0.5)


def test_an_input_of_several_frames_drops_the_oldest():
    seen = []

    def model(x: torch.Tensor, shift: float) -> torch.Tensor:
        seen.append(x)
        return x[:, -1:] + shift

    found = rollout(model, torch.tensor([[1.0, 2.0, 3.0]]), 3, shift=1.0)
    assert found.shape == (1, 3, 1)
    assert found.flatten().tolist() == [4, 5, 6]
    assert seen[-1].tolist() == [[3, 4, 5]]
    with pytest.raises(ValueError, match=r"`steps` is 0"):
        rollout(model, torch.zeros(1, 1), 0, shift=1.0)


@pytest.mark.parametrize("through_time", [True, False])
def test_gradients_pass_from_step_to_step_only_if_asked(through_time: bool):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    forecast = Unrolled(model, 2, through_time=through_time)(torch.ones(1, 1))
    assert forecast.tolist() == [[2, 4]]
    forecast[:, 1].sum().backward()
    # The second forecast is w^2 x: its derivative in w is 2 w x, and w x with the state fixed.
    assert float(model.weight.grad) == (4.0 if through_time else 2.0)


def test_errors_of_a_step_are_those_of_apebench():
    truth, forecast = torch.randn(2, 3, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    transform = GridTransform((16,))
    curves = rollout_curves(forecast, truth, transform, BANDS)
    t, f = truth[1, 1, 0].double(), forecast[1, 1, 0].double()
    assert float(curves["nRMSE"][1, 1]) == pytest.approx(float((f - t).norm() / t.norm()))
    assert float(curves["VRMSE"][1, 1]) == pytest.approx(
        float((f - t).norm() / (t - t.mean()).norm())
    )
    pearson = torch.corrcoef(torch.stack([f, t]))[0, 1]
    assert float(curves["correlation"][1, 1]) == pytest.approx(float(pearson))
    keep = (transform.frequencies < 0.5).double()
    low = transform.filter(f - t, keep).norm() / transform.filter(t, keep).norm()
    assert float(curves["nRMSE_band_0"][1, 1]) == pytest.approx(float(low))


def test_the_correlation_time_is_the_first_step_below_the_threshold():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2, 6, 1, 64, generator=generator)
    forecast = truth.clone()
    forecast[0, 3] = -truth[0, 3]  # wrong at the fourth step only: later agreement does not count
    scores = rollout_scores(forecast, truth, GridTransform((64,)), BANDS)
    assert scores["correlation_time"] == (4 + 7) / 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4, 3e38])
def test_a_diverged_rollout_counts_in_every_number(value: float):
    truth = torch.randn(4, 5, 1, 32, generator=torch.Generator().manual_seed(0))
    forecast = truth.clone()
    forecast[1, 2:] = value * torch.sign(truth[1, 2:])
    transform = GridTransform((32,))
    scores = rollout_scores(forecast, truth, transform, BANDS)
    assert scores["diverged"] == 1
    assert scores["correlation_time"] == (6 + 3 + 6 + 6) / 4
    assert not scores["mean_nRMSE"] < 100  # large, or not a finite number
    assert not scores["log_spectrum_error"] < 1
    curves = rollout_curves(forecast, truth, transform, BANDS)
    assert curves["diverged"].sum(1).tolist() == [0, 3, 0, 0]
    assert curves["correlation"][1].tolist()[2:] == [0, 0, 0]


def test_spectra_keep_the_energy_and_their_errors_have_known_answers():
    truth = torch.randn(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    transform = GridTransform((16, 16))
    spectrum = rollout_spectrum(truth, transform)
    assert float(spectrum.energy.sum()) == pytest.approx(float(truth.square().mean()), rel=1e-5)
    scores = rollout_scores(10**0.5 * truth, truth, transform, BANDS)
    assert scores["log_spectrum_error"] == pytest.approx(1.0, rel=1e-4)
    assert scores["relative_spectrum_error"] == pytest.approx(9.0, rel=1e-4)


def test_a_field_on_a_graph_is_scored_too():
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    transform = GraphTransform.from_edges(edges, None, 4)
    truth = torch.randn(3, 2, 1, 4, 1)
    assert rollout_scores(truth, truth, transform, BANDS)["relative_spectrum_error"] == 0
