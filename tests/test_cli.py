"""The command line as its users type it: runs, files, JSON, exit codes and messages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sdkd_plugin.adapters.neuralop import REGISTERED
from sdkd_plugin.cli import main
from sdkd_plugin.cli.settings import checkpoint_weights, in_task_units
from sdkd_plugin.export import OnnxModel
from sdkd_plugin.model_folder import load_model
from sdkd_plugin.models import UNet
from sdkd_plugin.taps import TapReader

QUICK = ["training.steps=6", "training.validations=2", "training.batch_size=4"]


def run(*words: str, code: int = 0) -> str:
    found = CliRunner().invoke(main, words)
    assert found.exit_code == code, found.output + found.stderr
    return found.output if code == 0 else found.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Simulated traffic, a teacher, and a student that it taught."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cli"))
        found = run("simulate", "traffic", "data", "n_sensors=6", "days=2", "freeways=[1,1]")
        data = found.splitlines()[-1].removeprefix("Use it by ").split()
        graph = ["student.model=GraphMixer", "out=teacher", "teacher=null"]
        run("distill", "traffic", *data, *graph, *QUICK)
        run("distill", "traffic", *data, "teacher=teacher/student", "out=runs", *QUICK)
        yield Path.cwd()


@pytest.fixture(autouse=True)
def there(runs, monkeypatch):
    monkeypatch.chdir(runs)


def test_a_distilled_student_is_a_model_folder():
    model, card = load_model("runs/student")
    assert type(model).__name__ == card.model == "GraphMixer"
    assert card.metrics["mae"] > 0
    assert card.training["teacher"] == "teacher/student"


def test_evaluate_gives_the_scores_of_the_card():
    rows = {row["model"]: row for row in json.loads(run("evaluate", "runs", "--json"))["rows"]}
    assert set(rows) == {"persistence", "teacher/student", "runs/student"}
    for name in ("teacher/student", "runs/student"):
        assert rows[name]["mae"] == pytest.approx(load_model(name)[1].metrics["mae"], rel=1e-5)
    text = run("evaluate", "runs")
    assert re.search(r"\| persistence \| [\d.,]+ \|.* - \|", text)
    assert "nan" not in text
    count = sum(p.numel() for p in load_model("runs/student")[0].parameters())
    assert f" {count:,} |" in text


def test_a_model_of_other_units_forecasts_in_those_of_the_task():
    own = {"input": {"scale": 2.0, "offset": 1.0}, "output": {"scale": [3.0], "offset": [4.0]}}
    task = {"input": {"scale": 5.0, "offset": -1.0}, "output": {"scale": 0.5, "offset": 2.0}}
    model, x = UNet(in_channels=1, out_channels=1, width=2), torch.randn(2, 1, 8, 8)
    inside = in_task_units(model, own, task)
    expected = (3 * model((5 * x - 1 - 1) / 2) + 4 - 2) / 0.5
    torch.testing.assert_close(inside(x, unknown=1), expected)
    with TapReader(inside, ["latent"]) as taps:
        inside(x)
    assert taps.read()["latent"].shape[0] == 2


def test_export_is_in_physical_units():
    found = json.loads(run("export", "runs", "--json"))
    assert found["error"] <= 1e-4
    graph = OnnxModel(found["file"])
    assert set(graph.names) >= {"x", "u"}
    edges = torch.tensor([[0, 1], [1, 2]]), torch.ones(2)
    inputs = {"u": torch.zeros(1, 12, 2), "edge_index": edges[0], "edge_weight": edges[1]}
    forecast = graph(x=torch.full((1, 12, 6, 1), 60.0), **inputs)
    assert 30 < float(forecast.mean()) < 90  # miles an hour


def test_benchmark_times_students_beside_their_teacher():
    options = ["benchmark.batch_sizes=[1,2]", "benchmark.threads=1", "benchmark.seconds=0.01"]
    found = json.loads(run("benchmark", "runs", *options, "benchmark.forms=[onnx]", "--json"))
    rows = {(r["model"], r["form"], r["batch_size"]): r for r in found["rows"]}
    models = ("teacher/student", "runs/student")
    assert set(rows) == {(m, f, b) for m in models for f in ("eager", "onnx") for b in (1, 2)}
    for model in models:
        for form in ("eager", "onnx"):
            expected = load_model(model)[1].metrics["mae"]
            assert rows[model, form, 1]["mae"] == pytest.approx(expected, rel=1e-4)
    assert rows["teacher/student", "eager", 1]["times_faster"] == 1
    assert all(Path(f"runs/benchmark.{suffix}").is_file() for suffix in ("md", "csv", "png"))
    few = [*options, "benchmark.forms=[]", "--teacher", "runs/student"]
    text = run("benchmark", "runs", "teacher", *few, "model=runs/student")
    assert "| runs/student | eager | 1 |" in text
    assert "| teacher/student | eager | 2 |" in text


def test_report_writes_the_page():
    run("report", "runs")
    page = Path("runs/report.html").read_text()
    assert "<table" in page
    assert "Accuracy against latency" in page
    assert Path("runs/latency.png").is_file()


def test_a_study_and_its_resumption():
    words = ["study", "runs", "out=compared", "training.seeds=1"]
    found = json.loads(run(*words, "--json"))
    models = [row["model"] for row in found["rows"]]
    assert models[-3:] == ["student alone", "plain-MSE distillation", "SDKD"]
    assert "holds a run already: go on with --resume" in run(*words, code=2)
    again = json.loads(run(*words, "--resume", "--json"))["rows"]
    assert [row["mae"] for row in again] == [row["mae"] for row in found["rows"]]
    assert "MAE" in Path("compared/table.md").read_text()


def test_an_int8_student_of_a_computed_flow(monkeypatch, tmp_path):
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path))
    small = ["task.sizes=[4,2,2]", "task.frames=[2,2]", "student.arguments.width=16"]
    run("distill", "navier_stokes", "out=ns", *small, *QUICK)
    found = json.loads(run("export", "ns", "export.int8=true", "--json"))
    assert found["int8_bytes"] < found["bytes"]
    assert 0 < found["int8_error"] < 0.5
    assert json.loads(run("export", "ns", "export.format=pt2", "--json"))["error"] <= 1e-4


def test_roll_outs_begin_with_the_forecast(monkeypatch, tmp_path):
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path))
    small = ["task.sizes=[4,2,2]", "task.frames=[2,2]", "student.arguments.width=4"]
    run("distill", "navier_stokes", "out=far", *small, *QUICK)
    found = json.loads(run("evaluate", "far", "--rollout", "3", "--json"))
    (row,) = found["rollouts"]
    assert row["nRMSE_1"] == pytest.approx(found["rows"][-1]["relative_l2"], rel=1e-3)
    assert 1 <= row["correlation_time"] <= 4
    assert {"nRMSE_3", "mean_nRMSE_band_1", "diverged"} < row.keys()
    text = run("evaluate", "far", "--rollout", "2")
    assert "Roll-outs of 2 forecasts" in text
    assert "nan" not in text
    assert "would not move on" in run("evaluate", "runs", "--rollout", "2", code=2)


def test_a_student_ends_at_the_edges_where_the_grid_does(monkeypatch, tmp_path):
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path))
    layer = "resolution: [16, 8], solver_resolution: [16, 12], rayleigh: 10000.0, spin_up: 0.0"
    Path("layer.yaml").write_text(
        f"task: {{name: rayleigh_benard, sizes: [4, 2, 2], frames: [2, 1], {layer}}}\n"
        "student: {model: UNet, arguments: {width: 2, depth: 1}}\n"
    )
    said = "The student has padding=reflect, as the task's grid"
    assert said in run("distill", "layer.yaml", "out=layer", *QUICK)
    assert load_model("layer/student")[1].arguments["padding"] == "reflect"
    # No warning: nothing wraps around. A padding in the settings is used as it is.
    run("distill", "layer.yaml", "out=pair", "teacher=layer/student", *QUICK)
    words = ["distill", "layer.yaml", "out=own", "student.arguments.padding=zeros", *QUICK]
    assert said not in run(*words)
    assert load_model("own/student")[1].arguments["padding"] == "zeros"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill", "nothing"], "SETTINGS is 'nothing', expected a YAML file"),
        (["distill", "traffic", "steps"], "'steps' is no change of settings, expected key=value"),
        (["distill", "traffic", "trainnig.steps=1"], "'trainnig'"),
        (["distill", "traffic", "training.step=1", "out=new"], "'step'"),
        (["distill", "traffic", "student.model=os.system", "out=new"], "'os.system'"),
        (["distill", "runs", "teacher=nowhere", "out=new"], "nowhere"),
        (["distill", "traffic", "task.name=rain"], "'rain'"),
        (["distill", "traffic", "distillation.kd_wieght=1", "out=new"], "'kd_wieght'"),
        (["distill", "traffic", "training.steps=ten", "out=new"], "`steps` is 'ten'"),
        (["distill", "runs", "teacher=teacher/settings.yaml", "out=new"], "is a file, expected"),
        (["distill", "runs", "teacher={path: a.pt, modle: UNet}", "out=new"], "'modle'"),
        (["export", "runs", "export.format=exe"], "'exe'"),
        (["benchmark", "runs", "benchmark.form=[onnx]"], "'form'"),
        (["benchmark", "runs", "benchmark.forms=[fast]"], "'fast'"),
        (["benchmark", "runs", "nowhere"], "nowhere"),
        (["report", "traffic"], "expected the folder of a run"),
        (["simulate", "navier_stokes", "out.npy", "n_samples=1", "colour=1"], "colour"),
        # Before it computes for hours.
        (["simulate", "navier_stokes", "out.txt", "n_samples=100000"], "expected a file .npy"),
        (["simulate", "rayleigh_benard", "/proc/no/a.npy", "n_samples=100000"], "free space"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(words, message):
    error = run(*words, code=2)
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(Path("new").glob("*"))


def test_a_checkpoint_of_a_host_is_a_teacher_and_nothing_in_it_runs(tmp_path):
    model = REGISTERED["sdkd_unet"](in_channels=1, out_channels=1, width=2)
    model.save_checkpoint(tmp_path, "m")
    weights = checkpoint_weights(tmp_path / "m_state_dict.pt")
    assert weights.keys() == {k for k, v in model.state_dict().items() if torch.is_tensor(v)}

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state_dict": {"a": torch.ones(1), "b": Payload()}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="cannot be read as weights") as refused:
        checkpoint_weights(tmp_path / "foreign.pt")
    assert refused.value is not None
    assert not (tmp_path / "touched").exists()


def test_the_command_starts_without_the_hosts_and_every_command_has_an_example():
    code = "import sys; from sdkd_plugin.cli import main; main(['--help'], standalone_mode=False);"
    code += "sys.exit(bool({'torch', 'neuralop', 'tsl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sdkd distill" in done.stdout
    for name in main.commands:
        assert f"sdkd {name} " in run(name, "--help")
