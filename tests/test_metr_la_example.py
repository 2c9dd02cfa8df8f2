"""The traffic example: stages, its kept teacher, and bad options."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from sdkd_plugin.model_folder import load_model
from sdkd_plugin.report import parameter_count

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["model.hparams.hidden_size=8", "teacher.model.hparams.hidden_size=8", "epochs=2"]
SMALL += ["teacher.epochs=1", "batch_size=64", "+trainer.limit_train_batches=2"]
SMALL += ["+trainer.enable_progress_bar=false"]
ALONE, PLAIN, SDKD = "student alone", "plain-MSE distillation", "SDKD"

pytestmark = [
    # Lightning's advice about the workers of a loader, and of a run of a few steps.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs the example in a folder: what it printed, and the errors by model's name."""
    spec = importlib.util.spec_from_file_location("metr_la", EXAMPLES / "metr_la.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)

    def run_example(*overrides):
        with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
            cfg = compose("metr_la", [*SMALL, *overrides])
        with open_dict(cfg):  # what tsl's Experiment adds
            cfg.run = {"dir": "run"}
        shutil.rmtree("run", ignore_errors=True)
        example.run_traffic(cfg)
        printed = capsys.readouterr().out
        rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:2] == "| "]
        return printed, {row[0]: tuple(map(float, row[1:5])) for row in rows[1:]}

    return run_example


@pytest.fixture
def csv(tmp_path):
    """Makes a ring of sensors whose speeds follow the time of the day, in the layout of T-GCN."""

    def write(names="abcdef", steps=400):
        folder = tmp_path / names
        folder.mkdir()
        day = 10 * np.sin(2 * np.pi * np.arange(steps) / 288)[:, None]
        speed = 55 + day + np.random.default_rng(0).normal(0, 2, size=(steps, len(names)))
        pd.DataFrame(speed, columns=list(names)).to_csv(folder / "my_speed.csv", index=False)
        ring = pd.DataFrame(np.roll(np.eye(len(names)), 1, axis=1))
        ring.to_csv(folder / "my_adj.csv", index=False, header=False)
        known = ["start=2024-01-08", "freq=5min", "missing=none"]
        options = [f"dataset.options.{option}" for option in known]
        return ["dataset=csv", f"dataset.root={folder}", *options]

    return write


def test_a_teacher_is_kept_found_and_used_again(run, csv):
    data = csv()
    printed, first = run(*data)
    assert "Traffic: T-GCN csv pair my_speed.csv" in printed
    (folder,) = Path("runs/metr_la/teachers").iterdir()
    assert f"Teacher: trained and kept in {folder.relative_to('.')}" in printed
    assert list(first) == ["teacher", ALONE, PLAIN, SDKD]
    assert len(set(first.values())) == 4
    assert np.isfinite(list(first.values())).all()
    printed, again = run(*data, "stage=distill")
    assert f"Teacher: found in {folder}" in printed
    assert again == {name: first[name] for name in ("teacher", PLAIN, SDKD)}
    student, card = load_model("run/SDKD")
    assert card.data["node_ids"] == list("abcdef")
    assert parameter_count(student) < parameter_count(load_model(folder)[0])
    # Other settings of the teacher are another teacher, unless its folder is given.
    other = [*data, "seed=1", "stage=teacher"]
    assert run(*other)[1]["teacher"] != first["teacher"]
    assert run(*other, f"sdkd.distill.teacher={folder}")[1]["teacher"] == first["teacher"]
    assert len(list(folder.parent.iterdir())) == 2


def test_a_teacher_of_other_data_is_refused_in_one_line(run, csv, capsys):
    data = csv()
    run(*data, "stage=teacher")
    (folder,) = Path("runs/metr_la/teachers").iterdir()
    for overrides, message in (
        (csv("abcxef"), r"has data.node_ids[3] 'd', the data 'x': train one for these data"),
        ([*data, "window=6"], r"has data.window 12, the data 6: train one for these data"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*overrides, f"sdkd.distill.teacher={folder}")
        assert end.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"metr_la.py: error: the model in {folder}")
        assert message in line
    # A student alone needs none.
    assert list(run(*csv("abcyef"), "stage=student")[1]) == [ALONE]


@pytest.mark.parametrize("distill", ["plain_mse", "adaptive", "confidence", "latents"])
def test_each_way_to_distil_trains_and_is_logged(distill, run, csv):
    _, rows = run(*csv(), "stage=distill", f"sdkd/distill={distill}")
    assert (rows[SDKD] == rows[PLAIN]) == (distill == "plain_mse")
    logged = pd.read_csv(next(Path("run/SDKD").rglob("metrics.csv")))
    assert logged.train_kd_band_1.dropna().gt(0).all()
    assert ("train_kd_latent<-latent" in logged) == (distill == "latents")


def test_tsls_own_models_are_students_too(run, csv):
    small = ["model=grugcn", "optimizer=adam", "stage=distill"]
    assert np.isfinite(run(*csv(), *small)[1][SDKD]).all()
    network, _ = load_model("run/SDKD")
    assert type(network).__name__ == "GRUGCNModel"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=teach"], "`stage` is 'teach', expected one of ['teacher', 'student',"),
        (["dataset.name=lax"], "`dataset.name` is 'lax', expected one of"),
        (["dataset.options.n_sensors=0"], "`n_sensors` is 0, expected an integer of at least 1"),
        (["dataset=csv"], "`dataset.root` is missing"),
        (["model.name=gwnt"], "`model.name` is 'gwnt', expected one of"),
        (["+model.hparams.width=1"], "`model.hparams of sdkd_student` is 'width'"),
        (["optimizer.name=Adm"], "`optimizer.name` is 'Adm', expected one of"),
        (["teacher.lr_scheduler.name=Cosine"], "`lr_scheduler.name` is 'Cosine', expected one of"),
        (["sdkd.distill.weighting=adaptiv"], "`weighting` is 'adaptiv', expected one of"),
        (["+sdkd.distill.weight=1"], "`an option of sdkd.distill` is 'weight'"),
        (["sdkd.distill.teacher=nowhere"], "nowhere holds no card.yaml"),
        (["+model._target_=marker.leave"], "`config.model._target_` is 'marker.leave', expected"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_a_bad_option_is_named_before_anything_is_trained(overrides, message, run, capsys):
    tiny = ["dataset.options.n_sensors=12", "dataset.options.days=1"]
    with pytest.raises(SystemExit) as end:
        run(*(tiny if "dataset=csv" not in overrides else []), *overrides)
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("metr_la.py: error: ")
    assert message in line
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", ["la", "bay", "pems3", "pems4", "pems7", "pems8", "csv"])
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_every_dataset_and_preset_is_a_whole_configuration(name, preset):
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        cfg = compose("metr_la", [f"dataset={name}", f"preset={preset}"])
    assert cfg.dataset.name == name
    assert cfg.teacher.lr_scheduler.hparams.T_max == cfg.teacher.epochs > cfg.epochs / 2
    assert cfg.lr_scheduler.hparams.T_max == cfg.epochs


# pandas 2, of what tsl asks it for.
@pytest.mark.filterwarnings("ignore:'T' is deprecated:FutureWarning")
def test_tsls_own_data_set_is_read_from_its_folder(run, tmp_path):
    flow = np.random.default_rng(0).uniform(10, 90, size=(400, 5, 1)).astype(np.float32)
    np.savez(tmp_path / "pems08.npz", data=flow)
    distance = np.where(np.eye(5) + np.eye(5, k=1), 1.0, np.inf).astype(np.float32)
    np.save(tmp_path / "distance_matrix.npy", distance)
    _, rows = run("dataset=pems8", f"dataset.root={tmp_path}", "stage=student")
    assert 10 < rows[ALONE][0] < 50


def test_the_command_line_without_data(tmp_path):
    tiny = ["dataset.options.n_sensors=12", "dataset.options.days=2", "stage=student"]
    command = [sys.executable, str(EXAMPLES / "metr_la.py"), *SMALL, *tiny]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Traffic: simulated traffic" in ended.stdout
    assert "| student alone |" in ended.stdout
    (folder,) = (tmp_path / "runs/metr_la/simulator").iterdir()
    assert (folder / "student_alone/card.yaml").is_file()
