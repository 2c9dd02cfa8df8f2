"""What is measured of models and their files, on models whose costs are known."""

import pandas as pd
import pytest
import torch
from small import random, refusals
from torch import Tensor, nn

from sdkd_plugin.report.figures import accuracy_latency
from sdkd_plugin.report.speed import measure_speed


class Wide(nn.Module):
    """Its activations, ``width`` floats a sample, are its memory; its input ``u`` is optional."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        return self.down(self.up(x) if u is None else self.up(x) + u)


def batch(size: int) -> dict[str, Tensor]:
    return {"x": random(size, 8), "u": random(size, 1), "unused": random(size, 3)}


@pytest.fixture(scope="module")
def speeds():
    models = {"large": Wide(20_000).train(), "small": Wide(20)}
    options = {"batch_sizes": (64, 1), "forms": ["onnx"], "threads": 1, "seconds": 0.01}
    ones = {"ones": random(3, 8), "u": random(3, 1)}
    score = lambda run: {"mean": float(run(x=ones["ones"], u=ones["u"]).mean())}  # noqa: E731
    return measure_speed(models, batch, scores=score, **options)


def test_every_form_of_every_model_at_every_batch_size(speeds):
    keys = [(r.model, r.form, r.batch_size) for r in speeds.rows.itertuples()]
    forms = [(m, f) for m in ("large", "small") for f in ("eager", "onnx")]
    assert keys == [(*form, size) for size in (1, 64) for form in forms]
    assert speeds.left_out == {}
    assert (speeds.rows.threads == 1).all()


def test_costs_are_those_of_the_layers(speeds):
    rows = speeds.rows.drop_duplicates("model").set_index("model")
    for name, width in {"large": 20_000, "small": 20}.items():
        assert rows.parameters[name] == 8 * width + width + width * 8 + 8
        assert rows.flops[name] == 2 * 8 * width * 2


def test_times_and_ratios_are_consistent(speeds):
    rows = speeds.rows
    assert (rows.p50_ms <= rows.p95_ms).all()
    assert (rows.calls >= 30).all()
    torch.testing.assert_close(
        torch.tensor((rows.samples_per_second * rows.p50_ms / 1e3).to_numpy()),
        torch.tensor(rows.batch_size.to_numpy()).double(),
    )
    for _, same in rows.groupby("batch_size"):
        reference = same[(same.model == "large") & (same.form == "eager")].p50_ms.iloc[0]
        assert same.times_faster.tolist() == pytest.approx((reference / same.p50_ms).tolist())
    at_64 = rows[rows.batch_size == 64].set_index(["model", "form"]).p50_ms
    assert at_64["large", "eager"] > 5 * at_64["small", "eager"]


def test_memory_is_that_of_the_activations(speeds):
    rows = speeds.rows.set_index(["model", "form", "batch_size"]).memory_mb
    if rows.isna().all():
        pytest.skip("the system does not tell")
    assert 4 * 20_000 * 64 / 1e6 <= rows["large", "eager", 64] < 60
    assert rows["small", "eager", 64] < 3 < rows["large", "onnx", 64]


def test_files_score_as_their_models(speeds):
    for _, same in speeds.rows.groupby("model"):
        assert same["mean"].nunique() <= 2
        assert same["mean"].max() == pytest.approx(same["mean"].min(), abs=1e-4)


def test_a_report_and_points(speeds):
    text = speeds.report("mean")
    assert "1 thread(s)" in text
    assert "| large | onnx | 64 |" in text
    points = speeds.points("mean", references=["large"])
    assert points.series.tolist() == ["large", "eager", "onnx"]
    (axis,) = accuracy_latency({"panel": points}, "mean").axes
    assert axis.get_xscale() == "log"
    assert axis.get_legend_handles_labels()[1] == ["large", "eager", "onnx"]


def test_a_form_that_cannot_be_made_is_left_out_with_its_reason(monkeypatch):
    def refuse(model: nn.Module) -> nn.Module:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    options = {"batch_sizes": [2], "forms": ["compiled", "int8"], "threads": 1, "seconds": 0.01}
    found = measure_speed({"model": Wide(4)}, batch, **options)
    assert found.rows.form.tolist() == ["eager"]
    assert found.left_out["model, compiled"] == "no C++ compiler"
    assert "ship the float file" in found.left_out["model, int8"]
    assert "Left out: model, compiled: no C++ compiler" in found.report()


@pytest.mark.slow
def test_a_compiled_model():
    options = {"batch_sizes": [2], "forms": ["compiled"], "threads": 1, "seconds": 0.01}
    found = measure_speed({"model": Wide(4)}, batch, **options)
    assert found.rows.form.tolist() == ["eager", "compiled"] or "model, compiled" in found.left_out


def test_the_threads_of_the_caller_are_kept():
    before = torch.get_num_threads()
    options = {"batch_sizes": [1], "forms": [], "threads": before + 1, "seconds": 0.01}
    found = measure_speed({"model": Wide(2)}, batch, **options)
    assert found.rows.threads.tolist() == [before + 1]
    assert torch.get_num_threads() == before


def test_a_series_is_a_line_in_the_order_of_latency():
    points = pd.DataFrame({"milliseconds": [3.0, 1.0, 2.0], "error": [0.1, 0.3, 0.2]})
    points = points.assign(series="students", deviation=0.0, reference=False)
    (axis,) = accuracy_latency({"panel": points}, "MSE").axes
    line = axis.containers[0].lines[0]
    assert line.get_xdata().tolist() == [1.0, 2.0, 3.0]
    assert line.get_ydata().tolist() == [0.3, 0.2, 0.1]


MODEL = {"model": Wide(2)}
test_wrong_options_are_refused = refusals(
    ({"forms": ["fast"]}, "forms.*'fast'"),
    ({"batch_sizes": [0]}, "batch_sizes"),
    ({"threads": -1}, "threads"),
    ({"seconds": 0.0}, "seconds"),
    of=lambda **options: measure_speed(MODEL, batch, **options),
)
