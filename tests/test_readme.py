"""The code in the README runs, word by word."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss, distillation_dataset
from sdkd_plugin.adapters.tsl import SDKDTeacher

from neuralop import Trainer  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(block: str, **names: object) -> dict[str, object]:
    namespace = {"torch": torch, **names}
    exec(block, namespace)  # noqa: S102
    return namespace


def block_with(text: str) -> str:
    (block,) = [block for block in BLOCKS if text in block]
    return block


def test_every_block_is_run_below():
    assert len(BLOCKS) == 5


def test_every_file_it_names_is_there():
    named = re.findall(r"(?:benchmarks|examples)/[\w/]+\.\w+", README)
    assert len(set(named)) >= 5
    assert all((Path(__file__).parents[1] / name).is_file() for name in named)


def test_ten_lines():
    names = run(block_with("distiller.step(x, y)"))
    assert names["forecast"].shape == (4, 10, 32, 32)
    assert names["terms"].frequency.shape == (2,)


@pytest.mark.filterwarnings("ignore:.*not.*best:UserWarning")
def test_behind_neuraloperator():
    sizes = {"in_channels": 2, "out_channels": 1}
    teacher = REGISTERED["sdkd_unet"](width=8, **sizes)
    student = REGISTERED["sdkd_unet"](width=4, **sizes)
    before = [p.clone() for p in student.parameters()]
    x, y = torch.randn(8, 2, 32, 32), torch.randn(8, 1, 32, 32)
    run(
        block_with("import TrainerLoss"),
        teacher=teacher,
        student=student,
        trainer=Trainer(model=student, n_epochs=1),
        train_loader=DataLoader(distillation_dataset(x, y), 4),
        test_loaders={},
    )
    assert not all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


@pytest.mark.parametrize("student_kind", ["fno", "unet"])
def test_a_fourier_neural_operator_teaches(student_kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SDKD_CACHE", str(tmp_path))
    block = block_with("load_navier_stokes(").replace("navier_stokes(60, ", "navier_stokes(4, ")
    for size, smaller in (("n_train=40", "n_train=2"), ("n_tests=[20, 20]", "n_tests=[2, 2]")):
        assert size in block
        block = block.replace(size, smaller)  # the solver takes long for sixty
    names = run(block, student_kind=student_kind)
    student = names["student"]
    loss = TrainerLoss(names["loss"], student)
    optimizer = torch.optim.Adam([*student.parameters(), *names["loss"].parameters()])
    trainer = Trainer(model=student, n_epochs=1, data_processor=names["data_processor"])
    metrics = trainer.train(
        names["train_loader"],
        names["test_loaders"],
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer),
        training_loss=loss,
    )
    assert {"16_l2", "32_l2"} <= set(metrics)
    assert loss.last_terms.features


def test_behind_tsl():
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
    names = run(
        block_with("DistillationPredictor"),
        teacher=SDKDTeacher(input_size=1, window=12, horizon=12, n_nodes=3),
        edge_index=edge_index,
        edge_weight=torch.ones(3),
        n_nodes=3,
        loss_fn=MaskedMAE(),
    )
    assert names["predictor"].trainable_parameters > 0


def test_a_study_of_ones_own_data(tmp_path):
    names = run(
        block_with("standard_arms"),
        x=torch.randn(32, 2, 16, 16),
        y=torch.randn(32, 1, 16, 16),
        teacher=REGISTERED["sdkd_unet"](in_channels=2, out_channels=1, width=4),
        seeds=2,
        steps=20,
        folder=tmp_path,
    )
    assert {"student alone", "plain-MSE distillation"} < set(names["result"].rows.model)
