"""Behind neuraloperator: its registry, its trainer, its checkpoints."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import DistillationLoss, GridTransform
from sdkd_plugin.adapters.neuralop import (
    REGISTERED,
    ResumableState,
    TrainerLoss,
    distillation_dataset,
)
from sdkd_plugin.adapters.neuralop.models import register
from sdkd_plugin.models import UNet

from neuralop import Trainer, get_model  # isort: skip
from neuralop.models.base_model import BaseModel, available_models  # isort: skip
from zencfg.bunch import Bunch  # isort: skip

SMALL = {
    "sdkd_unet": {"width": 4, "depth": 1},
    "sdkd_stalternet": {"width": 4, "depth": 1, "heads": 1, "n_downsampling": 1},
    "sdkd_simvp": {"width": 4, "latent_width": 8, "depth": 1, "n_downsampling": 1},
    "sdkd_resnet": {"width": 4, "depth": 1},
    "sdkd_mlp_mixer": {"width": 4, "depth": 1, "shape": (8, 8)},
}


def make(arch: str, seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    options = {**SMALL[arch], **options}
    return get_model(
        Bunch({"model": {"model_arch": arch, "data_channels": 2, "out_channels": 3, **options}})
    )


def fields(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 8, 8, generator=generator)
    return x, x.sum(1, keepdim=True).roll(1, -1).expand(-1, 3, -1, -1).contiguous()


def plain(out: Tensor, y: Tensor, **sample: object) -> Tensor:
    return F.mse_loss(out, y) * len(y)


def test_all_grid_models_are_in_the_hosts_registry():
    assert set(SMALL) == set(REGISTERED) <= set(available_models())


@pytest.mark.parametrize("arch", SMALL)
def test_the_hosts_factory_and_checkpoints(arch, tmp_path):
    model = make(arch).eval()
    size = 8 if arch == "sdkd_mlp_mixer" else 16
    x = torch.randn(2, 2, size, size, generator=torch.Generator().manual_seed(0))
    forecast = model(x, y=None, mask=None)
    assert forecast.shape == (2, 3, size, size)
    model.save_checkpoint(tmp_path, "model")
    again = REGISTERED[arch].from_checkpoint(tmp_path, "model").eval()
    assert torch.equal(again(x), forecast)
    for path in model.taps.values():
        model.get_submodule(path)


def test_a_wrong_option_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"`sdkd_unet option` is 'widht'.*Did you mean 'width'"):
        make("sdkd_unet", widht=4)


def test_a_taken_name_is_refused_and_left_alone():
    before = BaseModel._models["fno"]
    with pytest.raises(ValueError, match=r"'FNO', which neuraloperator has registered for .*FNO"):
        register("FNO", UNet)
    assert BaseModel._models["fno"] is before


def test_the_loss_is_the_batch_sum_of_the_task_and_the_distillation():
    x, y = fields(4)
    student = make("sdkd_unet")
    teacher = DistillationLoss(make("sdkd_stalternet", seed=9), GridTransform((8, 8)))
    loss, out = TrainerLoss(teacher, student), student(x)
    total = (loss.loss(out, x, y).total + F.mse_loss(out, y)).item()
    assert loss(out, x=x, y=y).item() == pytest.approx(4 * total)
    assert loss.last_terms.frequency.shape == (2,)


def test_unlabelled_samples_have_no_labels_at_all():
    x, y = fields()
    labelled = torch.arange(12) < 3
    samples = distillation_dataset(x, y, labelled)
    assert [bool(samples[i]["y"].isnan().all()) for i in (0, 2, 3, 11)] == [0, 0, 1, 1]
    assert [bool(samples[i]["mask"]) for i in (0, 2, 3, 11)] == [1, 1, 0, 0]


class Scaled(nn.Module):
    """A teacher that reads more of the sample than x."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale.reshape(-1, 1, 1, 1) * x.sum(1, keepdim=True).expand(-1, 3, -1, -1)


def test_a_teacher_gets_what_it_takes_of_the_sample():
    x, y = fields(4)
    student = make("sdkd_unet")
    loss = TrainerLoss(DistillationLoss(Scaled(), GridTransform((8, 8))), student)
    out, scale = student(x), torch.arange(4.0)
    loss(out, x=x, y=y, scale=scale, other=1)
    difference = out - Scaled()(x, scale)
    torch.testing.assert_close(loss.last_terms.frequency.sum(), difference.square().mean().detach())


def test_a_finished_run_is_not_resumed(tmp_path):
    student, (x, y) = make("sdkd_unet"), fields()

    def run(epochs: int, **options: object) -> None:
        trainer = Trainer(model=student, n_epochs=epochs)
        optimizer = torch.optim.Adam(student.parameters())
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        loader = DataLoader(distillation_dataset(x, y), 4)
        options |= {"regularizer": ResumableState(trainer), "training_loss": plain}
        trainer.train(loader, {}, optimizer, scheduler, eval_losses={}, **options)

    run(2, save_every=1, save_dir=tmp_path)
    with pytest.raises(ValueError, match=r"finished 2 epochs, but the trainer's `n_epochs` is 2"):
        run(2, resume_from_dir=tmp_path)
    run(3, resume_from_dir=tmp_path)


def test_parts_of_different_length_are_refused(as_shipped):
    x, y = fields()
    with pytest.raises(ValueError, match=r"`y` has shape \(11,\), expected \(12,\)"):
        distillation_dataset(x, y[1:])


def test_importing_keeps_the_hosts_blanket_filter_out():
    code = (
        "import warnings, sdkd_plugin.adapters.neuralop; "
        "assert not [f for f in warnings.filters if f[1] is None and f[2] is UserWarning]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
