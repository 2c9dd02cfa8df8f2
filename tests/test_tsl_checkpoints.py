"""Checkpoints of tsl predictors: weights and plain values, read without running anything."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tsl_parts import (
    FIT,
    NODES,
    SIZES,
    loss_of,
    predictor,
    same,
    student,
    teacher,
    trainer,
    windows,
)

from sdkd_plugin import AdaptiveWeighting
from sdkd_plugin.adapters.tsl import (
    DistillationPredictor,
    PlainPredictor,
    SDKDStudent,
    load_weights,
)

from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint  # isort: skip
from tsl.engines import Predictor  # isort: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DistillationPredictor]:
    """A checkpoint by Lightning's callback, and what it was made of."""
    folder = tmp_path_factory.mktemp("saved")
    made = predictor(
        student(),
        loss_of(weighting=AdaptiveWeighting(2)),
        scheduler_class=torch.optim.lr_scheduler.ReduceLROnPlateau,
        scheduler_kwargs={"monitor": "val_mae"},
    )
    keep = ModelCheckpoint(folder, filename="best", monitor="val_mae", save_top_k=1)
    stop = EarlyStopping("val_mae")
    trainer(1, (keep, stop)).fit(made, datamodule=windows())
    return folder / "best.ckpt", made


def test_a_checkpoint_holds_weights_and_plain_values(saved):
    path, made = saved
    stored = torch.load(path, weights_only=True)
    roots = {name.split(".")[0] for name in stored["state_dict"]}
    assert roots == {"model", "distillation"}
    assert stored["hyper_parameters"]["optim_kwargs"] == {"lr": 1e-2}
    assert stored["hyper_parameters"]["scheduler_kwargs"] == {"monitor": "val_mae"}
    assert not {"optim_class", "scheduler_class", "loss"} & stored["hyper_parameters"].keys()
    assert stored["hyper_parameters"]["metrics"] == {}
    assert stored["sdkd_model"]["arguments"]["n_nodes"] == NODES
    fresh = predictor(student(), loss_of(weighting=AdaptiveWeighting(2)))
    assert not same(fresh.model, made.model)
    fresh.load_model(path)
    assert same(fresh.model, made.model)


def test_a_student_serves_without_the_predictor_that_trained_it(saved):
    path, made = saved
    bare = student()
    load_weights(bare, path)
    assert same(bare, made.model)
    plain = PlainPredictor(model=student(), **FIT)
    plain.load_model(path)
    assert same(plain.model, made.model)


def test_lightning_loads_it_with_weights_only(saved):
    path, made = saved
    again = DistillationPredictor.load_from_checkpoint(
        path,
        weights_only=True,
        loss=loss_of(weighting=AdaptiveWeighting(2)),
        model=student(),
    )
    assert same(again.model, made.model)
    assert same(again.distillation, made.distillation)


def test_model_class_and_arguments_are_compared(tmp_path):
    kwargs = {**SIZES, "hidden_size": 8, "dropout": 0.0}
    made = PlainPredictor(model_class=SDKDStudent, model_kwargs=kwargs, **FIT)
    keep = ModelCheckpoint(tmp_path, filename="m")
    trainer(1, (keep,)).fit(made, datamodule=windows())
    again = PlainPredictor(model_class=SDKDStudent, model_kwargs=kwargs, **FIT)
    again.load_model(tmp_path / "m.ckpt")
    assert same(again.model, made.model)
    other = PlainPredictor(model_class=SDKDStudent, model_kwargs={**kwargs, "dropout": 0.5}, **FIT)
    with pytest.raises(ValueError, match=r"has dropout=0.0, expected dropout=0.5"):
        other.load_model(tmp_path / "m.ckpt")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: student(n_nodes=7), r"SDKDStudent has n_nodes=5, expected n_nodes=7"),
        (lambda: student(window=12), r"has window=6, expected window=12: build the model"),
        (teacher, r"holds a SDKDStudent, expected a SDKDTeacher"),
    ],
)
def test_a_checkpoint_for_other_data_is_refused(saved, other, message):
    model = other()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PlainPredictor(model=model).load_model(saved[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_dict_for_other_data_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(student(n_nodes=7).state_dict(), path)
    with pytest.raises(ValueError, match=r"size mismatch for network.embedding.weight: .*\[7, 4\]"):
        load_weights(student(), path)
    torch.save(teacher().state_dict(), path)
    with pytest.raises(ValueError, match=r"not those of this SDKDStudent .*Missing key"):
        load_weights(student(), path)
    torch.save({**student().state_dict(), "network.head.bias": "none"}, path)
    with pytest.raises(
        ValueError, match=r"\"network.head.bias\", expected torch.Tensor .* received <class 'str'>"
    ):
        load_weights(student(), path)


class _Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.folder,))


def test_a_pickle_is_refused_and_not_run(tmp_path):
    evil = _Evil()
    evil.folder = str(tmp_path / "run")
    for path, save in ((tmp_path / "a.pt", torch.save), (tmp_path / "b.pt", None)):
        if save is None:
            path.write_bytes(pickle.dumps(evil, protocol=2))
        else:
            save({"state_dict": student().state_dict(), "hyper_parameters": evil}, path)
        with pytest.raises(ValueError, match=f"{path.name} cannot be read as weights"):
            load_weights(student(), path)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_tsls_own_predictor_is_refused_with_the_way_out(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="own")
    made = Predictor(model=student(), **FIT)
    trainer(1, (keep,)).fit(made, datamodule=windows())
    with pytest.raises(ValueError, match=r"weights_only=False\)\['state_dict'\]"):
        load_weights(student(), tmp_path / "own.ckpt")
    trusted = torch.load(tmp_path / "own.ckpt", weights_only=False)["state_dict"]
    torch.save(trusted, tmp_path / "plain.pt")
    again = student()
    load_weights(again, tmp_path / "plain.pt")
    assert same(again, made.model)


def test_damaged_and_missing_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="where there is no file"):
        load_weights(student(), tmp_path / "none.ckpt")
    for content in (b"", b"weights", saved[0].read_bytes()[:2000]):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.ckpt cannot be read"):
            load_weights(student(), tmp_path / "bad.ckpt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"holds a list, expected a checkpoint"):
        load_weights(student(), tmp_path / "list.pt")


@pytest.mark.parametrize("kind", [PlainPredictor, DistillationPredictor])
def test_covariates_missing_at_test_time_are_missed(kind, tmp_path):
    # A model to which covariates are optional: nothing else would complain.
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
            return x[:, -3:] * self.scale if u is None else x[:, -3:] * self.scale + u.mean()

    def make() -> Predictor:
        if kind is PlainPredictor:
            return PlainPredictor(model=Optional(), **FIT)
        return predictor(Optional())

    made = make()
    keep = ModelCheckpoint(tmp_path, filename="m")
    trainer(1, (keep,)).fit(made, datamodule=windows())
    loaded = make()
    loaded.load_model(tmp_path / "m.ckpt")
    for each in (made, loaded):
        with pytest.raises(ValueError, match=r"`batch.input` lacks \['u'\], which the model was"):
            trainer().test(each, datamodule=windows(covariates=False), verbose=False)


def test_a_damaged_checkpoint_is_not_resumed_from(saved, tmp_path):
    content = bytearray(saved[0].read_bytes())
    path = tmp_path / "flipped.ckpt"
    at = content.index(saved[1].model.state_dict()["network.embedding.weight"].numpy().tobytes())
    content[at + 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not notice
    with pytest.raises(ValueError, match=r"flipped\.ckpt cannot be read .* another checksum"):
        trainer(2).fit(predictor(), datamodule=windows(), ckpt_path=path)
