"""The traffic example: a tsl experiment, small but whole, and what it says to bad input."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from sdkd_plugin.adapters.tsl import (
    DistillationPredictor,
    DistillOptions,
    PlainPredictor,
    TrafficDataset,
    datasets,
    get_dataset,
    get_model_class,
    load_forecaster,
)
from sdkd_plugin.data import simulate_traffic
from sdkd_plugin.report import UserError

# After the adapter.
import pytorch_lightning as pl  # isort: skip
from tsl.data import SpatioTemporalDataModule, SpatioTemporalDataset  # isort: skip
from tsl.data.preprocessing import StandardScaler  # isort: skip
from tsl.metrics import numpy as numpy_metrics  # isort: skip
from tsl.metrics.torch import MaskedMAE, MaskedMAPE  # isort: skip

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    # Lightning's advice, on machines of many cores, about the workers of a loader.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Of a run of a few steps.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

SMALL = [
    "batch_size=16",
    "limit_train_batches=2",
    "epochs=2",
    "teacher.epochs=1",
    "progress=false",
    "model.hparams.hidden_size=8",
    "model.hparams.emb_size=2",
    "model.hparams.n_layers=1",
    "teacher.model.hparams.hidden_size=8",
    "teacher.model.hparams.emb_size=2",
    "teacher.model.hparams.n_layers=1",
    "teacher.model.hparams.n_heads=2",
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metr_la", EXAMPLES / "metr_la.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["metr_la"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_csv_pair(folder: Path, names: str = "abcdef", steps: int = 400) -> Path:
    """A ring of sensors whose speeds follow the time of the day, in the layout of T-GCN."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    day = 10 * np.sin(2 * np.pi * np.arange(steps) / 288)[:, None]
    speed = 55 + day + rng.normal(0, 2, size=(steps, len(names)))
    speed[5:9, 0] = 0  # missing
    pd.DataFrame(speed, columns=list(names)).to_csv(folder / "my_speed.csv", index=False)
    ring = pd.DataFrame(np.roll(np.eye(len(names)), 1, axis=1))
    ring.to_csv(folder / "my_adj.csv", index=False, header=False)
    return folder


def csv_options(folder: Path) -> list[str]:
    options = ["dataset=csv", f"dataset.root={folder}", "dataset.options.missing=zeros"]
    return [*options, "dataset.options.start=2024-01-08", "dataset.options.freq=5min"]


@pytest.fixture
def csv_pair(tmp_path) -> list[str]:
    return csv_options(write_csv_pair(tmp_path / "data"))


def configure(run: Path, *overrides: str) -> DictConfig:
    """The example's configuration, with what tsl's ``Experiment`` adds to it."""
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        cfg = compose("metr_la", [*SMALL, *overrides])
    with open_dict(cfg):
        cfg.run = {"dir": str(run), "name": "test", "seed": cfg.seed}
        cfg.teacher.library = str(run.parent / "teachers")
    return cfg


def test_all_stages_on_a_csv_pair_and_the_teacher_is_found_again(
    example, csv_pair, tmp_path, capsys
):
    rows = example.run_stages(configure(tmp_path / "run", *csv_pair))
    assert list(rows.model) == ["teacher", "student alone", "distilled student"]
    columns = [f"{error}_at_{at}" for error in ("mae", "rmse", "mape") for at in (15, 30, 60)]
    assert rows[[*columns, "mae", "rmse", "mape", "milliseconds"]].gt(0).all(axis=None)
    assert (rows.rmse_at_60 >= rows.mae_at_60).all()
    assert rows.parameters[1] == rows.parameters[2] < rows.parameters[0]
    table = (tmp_path / "run/table.md").read_text()
    assert "MAE 15 min" in table
    assert "distilled student against student alone" in table
    printed = capsys.readouterr().out
    assert "T-GCN csv pair my_speed.csv" in printed
    assert "Training: teacher." in printed
    assert "METR-LA" not in printed
    written = {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()}
    weights = {"forecaster.safetensors", "forecaster.yaml"}
    assert {"results.csv", "table.md", "series.png"} | weights == written

    # The weights forecast as the model that the table is of.
    traffic = example.load_data(cfg := configure(tmp_path / "again", *csv_pair))
    loaded, card = load_forecaster(tmp_path / "run/distilled_student", traffic.card)
    assert example.score(cfg, traffic, loaded)["mae"] == pytest.approx(rows.mae[2])
    assert card.data.node_ids == tuple("abcdef")

    again = example.run_stages(configure(tmp_path / "again", *csv_pair, "stage=distill"))
    printed = capsys.readouterr().out
    assert "Teacher: found in" in printed
    assert "Training: teacher." not in printed
    assert list(again.model) == ["teacher", "distilled student"]
    assert list(again.mae) == pytest.approx([rows.mae[0], rows.mae[2]])
    # Another seed is another teacher.
    example.run_stages(configure(tmp_path / "other", *csv_pair, "stage=teacher", "seed=1"))
    assert "Training: teacher." in capsys.readouterr().out
    assert len(list((tmp_path / "teachers").iterdir())) == 2


@pytest.mark.parametrize("distill", ["plain_mse", "adaptive", "confidence", "latents"])
def test_every_way_to_distil_trains(example, csv_pair, tmp_path, distill):
    overrides = [*csv_pair, "stage=distill", f"sdkd/distill={distill}", "epochs=1"]
    rows = example.run_stages(configure(tmp_path / "run", *overrides, "logger=csv"))
    assert np.isfinite(rows.mae).all()
    logged = pd.concat(pd.read_csv(f) for f in (tmp_path / "run").rglob("metrics.csv"))
    assert logged.train_kd_band_1.dropna().gt(0).all()
    assert ("train_kd_latent<-latent" in logged) == (distill == "latents")


def test_tsls_own_models_are_students_too(example, csv_pair, tmp_path):
    small = [option for option in SMALL if not option.startswith("model.")]
    overrides = [*csv_pair, "model=grugcn", "stage=distill", "model.hparams.hidden_size=8"]
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        cfg = compose("metr_la", [*small, *overrides, "optimizer=adam", "~lr_scheduler"])
    with open_dict(cfg):
        cfg.run = {"dir": str(tmp_path / "run"), "name": "test", "seed": 0}
        cfg.teacher.library = str(tmp_path / "teachers")
    assert np.isfinite(example.run_stages(cfg).mae).all()
    network, card = load_forecaster(tmp_path / "run/distilled_student")
    assert card.model == "grugcn"
    assert type(network).__name__ == "GRUGCNModel"


@pytest.mark.parametrize("name", ["la", "bay", "pems3", "pems4", "pems7", "pems8", "csv"])
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_every_dataset_and_preset_is_a_whole_configuration(example, tmp_path, name, preset):
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        cfg = compose("metr_la", [f"dataset={name}", f"preset={preset}"])
        assert cfg.dataset.name == name
        assert cfg.teacher.lr_scheduler.hparams.T_max == cfg.teacher.epochs > cfg.epochs / 2
        assert cfg.lr_scheduler.hparams.T_max == cfg.epochs
        example.check_config(cfg)


# pandas 2, of what tsl asks it for.
@pytest.mark.filterwarnings("ignore:'T' is deprecated:FutureWarning")
def test_tsls_own_data_set_is_read_from_its_folder(example, tmp_path):
    rng = np.random.default_rng(0)
    flow = rng.uniform(10, 90, size=(400, 5, 1)).astype(np.float32)
    np.savez(tmp_path / "pems08.npz", data=flow)
    distance = np.where(np.eye(5) + np.eye(5, k=1), 1.0, np.inf).astype(np.float32)
    np.save(tmp_path / "distance_matrix.npy", distance)
    overrides = ["dataset=pems8", f"dataset.root={tmp_path}", "stage=student", "epochs=1"]
    cfg = configure(tmp_path / "run", *overrides)
    traffic = example.load_data(cfg)
    assert traffic.windows.edge_index.tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert traffic.at == {15: 2, 30: 5, 60: 11}
    (row,) = example.run_stages(cfg).to_dict("records")
    assert row["model"] == "student alone"
    assert row["mae_at_60"] > 0


def test_a_data_set_that_cannot_be_downloaded_says_what_to_do(monkeypatch):
    def unreachable(root):
        raise OSError("no network")

    monkeypatch.setitem(datasets._TSL, "bay", unreachable)
    with pytest.raises(FileNotFoundError, match=r"bay could not be.*no network.*`dataset.root`"):
        get_dataset("bay")


def test_our_traffic_is_a_data_set_of_tsls():
    traffic = simulate_traffic(n_sensors=12, days=1, seed=3, progress=False)
    dataset = TrafficDataset(traffic)
    edge_index, edge_weight = dataset.get_connectivity(include_self=False)
    order = np.lexsort(traffic.edge_index.numpy())  # by target, then source
    assert np.array_equal(edge_index, traffic.edge_index.numpy()[:, order])
    assert np.array_equal(edge_weight, traffic.edge_weight.numpy()[order])
    assert np.array_equal(dataset.mask[..., 0].astype(bool), traffic.mask.numpy())
    assert np.array_equal(dataset.dataframe().to_numpy(), traffic.filled().numpy())
    assert tuple(dataset.nodes) == traffic.node_ids


@pytest.mark.parametrize("name", ["sdkd_student", "sdkd_teacher", "distilled", "grugcn"])
def test_a_forecasting_experiment_of_tsls_passes_with_our_models(name, tmp_path):
    """What tsl's own test of its forecasting example does, step by step, on a csv pair."""
    options = {"root": str(write_csv_pair(tmp_path / "data")), "start": "2024-01-08"}
    dataset = get_dataset("csv", {**options, "missing": "zeros", "freq": "5min"})
    windows = SpatioTemporalDataset(
        target=dataset.dataframe(),
        mask=dataset.mask,
        connectivity=dataset.get_connectivity(include_self=False, layout="edge_index"),
        covariates={"u": dataset.datetime_encoded("day").values},
        horizon=12,
        window=12,
    )
    dm = SpatioTemporalDataModule(
        dataset=windows,
        scalers={"target": StandardScaler(axis=(0, 1))},
        splitter=dataset.get_splitter(val_len=0.1, test_len=0.2),
        batch_size=64,
    )
    dm.setup()
    sizes = {
        "n_nodes": windows.n_nodes,
        "input_size": windows.n_channels,
        "output_size": windows.n_channels,
        "horizon": windows.horizon,
        "exog_size": windows.input_map.u.shape[-1],
    }
    model_class = get_model_class("sdkd_student" if name == "distilled" else name)
    model_class.filter_model_args_(sizes)
    hparams = {"hidden_size": 8}
    hparams |= {"enc_layers": 1, "gcn_layers": 1} if name == "grugcn" else {"window": 12}
    predictor_class, teaching = PlainPredictor, {}
    if name == "distilled":
        teacher = get_model_class("sdkd_teacher")(**sizes, **hparams)
        teaching = {"teacher": teacher} | DistillOptions().predictor_arguments(
            windows.edge_index, windows.edge_weight, windows.n_nodes
        )
        predictor_class = DistillationPredictor
    predictor = predictor_class(
        model_class=model_class,
        model_kwargs=sizes | hparams,
        optim_class=torch.optim.Adam,
        optim_kwargs={"lr": 0.01, "weight_decay": 0},
        loss_fn=MaskedMAE(),
        metrics={"mae": MaskedMAE(), "mape": MaskedMAPE(), "mae_at_15": MaskedMAE(at=2)},
        **teaching,
    )
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path / "best", monitor="val_mae", mode="min")
    trainer = pl.Trainer(
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=pl.loggers.CSVLogger(tmp_path),
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        gradient_clip_val=5,
        callbacks=[pl.callbacks.EarlyStopping("val_mae", patience=1, mode="min"), checkpoint],
        limit_train_batches=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(predictor, datamodule=dm)
    predictor.load_model(checkpoint.best_model_path)
    predictor.freeze()
    (tested,) = trainer.test(predictor, datamodule=dm, verbose=False)
    (validated,) = trainer.validate(predictor, datamodule=dm, verbose=False)
    for prefix, result, loader in (
        ("test", tested, dm.test_dataloader()),
        ("val", validated, dm.val_dataloader()),
    ):
        outputs = predictor.collate_prediction_outputs(trainer.predict(predictor, loader))
        forecast, truth, mask = (outputs[k].cpu().numpy() for k in ("y_hat", "y", "mask"))
        mae = numpy_metrics.mae(forecast, truth, mask)
        assert np.isclose(result[f"{prefix}_mae"], mae)
        assert np.isclose(result[f"{prefix}_mape"], numpy_metrics.mape(forecast, truth, mask))


@pytest.fixture
def taught(example, csv_pair, tmp_path) -> Path:
    """The folder of a trained teacher."""
    example.run_stages(configure(tmp_path / "run", *csv_pair, "stage=teacher"))
    (folder,) = (tmp_path / "teachers").iterdir()
    return folder


def test_a_teacher_of_other_data_is_refused(example, csv_pair, tmp_path, taught):
    def refuses(message: str, *overrides: str) -> None:
        cfg = configure(tmp_path / "next", *overrides, f"sdkd.distill.teacher={taught}")
        with pytest.raises(UserError, match=message):
            example.run_stages(cfg)

    refuses("has window 12, the data 6", *csv_pair, "window=6")
    refuses("has horizon 12, the data 3", *csv_pair, "horizon=3")
    more = csv_options(write_csv_pair(tmp_path / "more", "abcdefg"))
    refuses("is for 6 sensors, the data have 7", *more)
    others = csv_options(write_csv_pair(tmp_path / "others", "abcxef"))
    refuses("other sensors: 1 of 6 differ, first number 3, 'd' there and 'x'", *others)
    shorter = csv_options(write_csv_pair(tmp_path / "shorter", steps=300))
    refuses("was trained with a scaler_bias of", *shorter)
    assert not (tmp_path / "next").exists()


def test_a_teacher_of_the_library_is_one_of_the_same_settings(example, tmp_path):
    def folder(*overrides: str) -> Path:
        return example.library_folder(configure(tmp_path / "run", *overrides))

    shown = folder()
    for same in ("progress=true", "epochs=7", "sdkd/distill=latents"):
        assert folder(same) == shown
    for other in ("window=6", "teacher.epochs=7", "dataset.options.seed=1", "seed=1"):
        assert folder(other) != shown


def test_a_damaged_teacher_is_refused(taught, tmp_path):
    weights, card = taught / "forecaster.safetensors", taught / "forecaster.yaml"
    data, text = weights.read_bytes(), card.read_text()
    load_forecaster(taught)
    for damaged in (data[:-8], data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"forecaster\.safetensors does not belong to"):
            load_forecaster(taught)
    weights.write_bytes(data)
    wrong = [text[:20], "[1, 2]", "", text.replace("format: 1", "format: 2"), "!!python/name:os"]
    for damaged in wrong:
        card.write_text(damaged)
        with pytest.raises(ValueError, match=r"forecaster\.yaml is damaged or of another version"):
            load_forecaster(taught)
    foreign = yaml.safe_load(text) | {"model": "os.system"}
    card.write_text(yaml.safe_dump(foreign))
    with pytest.raises(ValueError, match=r"`model\.name` is 'os.system', expected one of"):
        load_forecaster(taught)
    with pytest.raises(FileNotFoundError, match="holds no forecaster"):
        load_forecaster(tmp_path)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=teach"], "`stage` is 'teach', expected one of"),
        (["model.name=gwnt"], "`model.name` is 'gwnt', expected one of"),
        (["optimizer.name=Adm"], "`optimizer.name` is 'Adm', expected one of"),
        (["lr_scheduler.name=Cosine"], "`lr_scheduler.name` is 'Cosine', expected one of"),
        (["sdkd.distill.weighting=adaptiv"], "`weighting` is 'adaptiv', expected one of"),
        (["+sdkd.distill.weight=1"], "`an option of sdkd.distill` is 'weight'"),
        (["+model.hparams.width=1"], "`model.hparams of sdkd_student` is 'width'"),
        (["dataset.name=lax"], "`dataset.name` is 'lax', expected one of"),
        (["dataset.options.n_sensors=0"], "`n_sensors` is 0, expected an integer of at least 1"),
        (["+dataset.options.nodes=3"], "`an option of the dataset simulator` is 'nodes'"),
        (["dataset=csv"], "`dataset.root` is missing"),
        (["dataset=csv", "dataset.root=nowhere"], "nowhere is not a folder"),
        (["dataset.connectivity.layout=csr"], "`dataset.connectivity.layout` is 'csr'"),
        (["+optimizer.hparams.momentum=1"], "`optimizer.hparams` is 'momentum', expected one of"),
        (["+lr_scheduler.hparams.gamma=1"], "`lr_scheduler.hparams` is 'gamma', expected one of"),
        (
            ["stage=all", "sdkd.distill.latents=[{student: latnt, teacher: latent}]"],
            "`SDKDStudent` has no tap 'latnt'",
        ),
        (["stage=all", "+model.hparams.width=1"], "`model.hparams of sdkd_student` is 'width'"),
        (["optimizer.hparams.lr=1e30"], "the training of the student alone diverged: lower"),
        (["logger=csv", "logger.backend=csvv"], "`logger.backend` is 'csvv'"),
        (["batch_size=4000"], "there are 288 time steps, expected at least"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(example, tmp_path, capsys, overrides, message):
    tiny = ["stage=student", "dataset.options.n_sensors=12", "dataset.options.days=1"]
    if "dataset=csv" in overrides:
        tiny = tiny[:1]
    cfg = configure(tmp_path / "run", *tiny, *overrides)
    with pytest.raises(SystemExit) as ended:
        example.run_traffic(cfg)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("metr_la.py: error: ")
    assert message in line
    assert not list((tmp_path / "run").rglob("forecaster.*"))
    assert not (tmp_path / "teachers").exists()


def test_nothing_that_a_configuration_names_is_run(example, csv_pair, tmp_path, monkeypatch):
    (tmp_path / "marker.py").write_text(
        "from pathlib import Path\ndef leave(**_):\n    Path('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for where in ("model", "optimizer", "logger", "sdkd.distill", "dataset.options", "teacher"):
        added = "logger=csv" if where == "logger" else "stage=student"
        cfg = configure(tmp_path / "run", *csv_pair, added, f"+{where}._target_=marker.leave")
        with pytest.raises(UserError, match=rf"{where}\._target_` is 'marker.leave', expected"):
            example.run_stages(cfg)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


def test_the_command_line_without_data(tmp_path):
    tiny = ["dataset.options.n_sensors=12", "dataset.options.days=2", "stage=student"]
    command = [sys.executable, str(EXAMPLES / "metr_la.py"), *SMALL, *tiny, "preset=quick"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "Traffic: simulated traffic" in ended.stdout
    assert "| student alone |" in ended.stdout
    (folder,) = (tmp_path / "runs/metr_la/simulator").iterdir()
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["model"]["hparams"]["hidden_size"] == 8
    assert written["model"]["hparams"]["window"] == 12
    assert (folder / "student_alone/forecaster.safetensors").is_file()


@pytest.mark.slow
def test_ctrl_c_in_training_is_not_swallowed(tmp_path):
    write_csv_pair(tmp_path / "data")
    command = [sys.executable, "-u", str(EXAMPLES / "metr_la.py"), "progress=false"]
    process = subprocess.Popen(
        [*command, *csv_options(tmp_path / "data"), "teacher.epochs=5000"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shown = b""
    while b"Training: teacher." not in shown:
        shown += process.stdout.read(1)
        assert process.poll() is None, shown
    time.sleep(3)  # the teacher takes longer
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].endswith(b"interrupted; no half-written file is left.")
    assert not list((tmp_path / "runs").rglob("forecaster.*"))
