"""Distillation by neuraloperator's trainer: resuming, logging, evaluation, units, processes."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import AdaptiveWeighting, Bands, GridTransform, LatentPair, SDKDDistiller
from sdkd_plugin.adapters.neuralop import (
    REGISTERED,
    Renormalized,
    RunState,
    TrainerLoss,
    distillation_dataset,
)

from neuralop import LpLoss, Trainer  # isort: skip
from neuralop.data.transforms.data_processors import DefaultDataProcessor  # isort: skip
from neuralop.data.transforms.normalizers import UnitGaussianNormalizer  # isort: skip
from neuralop.layers.spectral_convolution import SpectralConv  # isort: skip
from neuralop.models import FNO  # isort: skip

CHANNELS = {"in_channels": 2, "out_channels": 3}


def unet(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return REGISTERED["sdkd_unet"](width=width, depth=1, **CHANNELS)


def fno(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return FNO(n_modes=(4, 4), hidden_channels=width, n_layers=1, **CHANNELS)


def fields(n: int = 12, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, size, size, generator=generator)
    return x, x.sum(1, keepdim=True).roll(1, -1).expand(-1, 3, -1, -1).contiguous()


def distiller_of(student: nn.Module, *, latents: bool = True, **options: object) -> SDKDDistiller:
    """With a projector and measured weights: what the host would not save."""
    if latents:
        options |= {"latents": [LatentPair("latent", "latent")], "example": {"x": fields(1)[0]}}
    options = {"weighting": AdaptiveWeighting(2, decay=0.9), **options}
    teacher = unet(seed=9, width=6)
    return SDKDDistiller(teacher, student, GridTransform((8, 8)), Bands.split(0.4), **options)


class Noisy(nn.Module):
    """A student whose forecast draws random numbers while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = unet()
        self.taps = {name: f"network.{path}" for name, path in self.network.taps.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(F.dropout(x, 0.1, self.training))

    def save_checkpoint(self, folder: str, name: str) -> None:
        torch.save(self.state_dict(), Path(folder) / f"{name}_state_dict.pt")


class Run:
    """A run of the host's trainer that is always made alike, with the losses of its steps."""

    def __init__(self, epochs: int, *, with_state: bool = True) -> None:
        self.student = Noisy()
        self.distiller = distiller_of(self.student)
        self.losses: list[float] = []
        self.loss = TrainerLoss(
            self.distiller, on_step=lambda terms: self.losses.append(terms.total.item())
        )
        self.shuffling = torch.Generator().manual_seed(3)
        self.trainer = Trainer(model=self.student, n_epochs=epochs)
        self.state = RunState(self.trainer, self.loss, [self.shuffling]) if with_state else None

    def train(self, **options: object) -> "Run":
        samples = distillation_dataset(*fields())
        optimizer = torch.optim.AdamW(self.distiller.parameters(), 1e-2)
        self.trainer.train(
            DataLoader(samples, 4, shuffle=True, generator=self.shuffling),
            {},
            optimizer,
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
            regularizer=self.state,
            training_loss=self.loss,
            **options,
        )
        return self


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = Run(epochs=5).train()
    first = Run(epochs=3).train(save_every=1, save_dir=tmp_path)
    torch.manual_seed(100)  # what another process would not have drawn either
    second = Run(epochs=5).train(resume_from_dir=tmp_path)
    assert len(whole.losses) == 15
    assert first.losses + second.losses == whole.losses
    expected, got = whole.distiller.state_dict(), second.distiller.state_dict()
    assert {"loss.weighting.error", "loss.weighting.energy"} < expected.keys()
    assert any(name.startswith("latent_losses.") for name in expected)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_without_it_the_host_trains_the_saved_epoch_again(tmp_path):
    Run(epochs=3, with_state=False).train(save_every=1, save_dir=tmp_path)
    second = Run(epochs=5, with_state=False).train(resume_from_dir=tmp_path)
    assert len(second.losses) == 9


def test_plain_training_resumes_too(tmp_path):
    def run(epochs: int, **options: object) -> nn.Module:
        student, shuffling = unet(), torch.Generator().manual_seed(3)
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        trainer = Trainer(model=student, n_epochs=epochs)
        trainer.train(
            DataLoader(distillation_dataset(*fields()), 4, shuffle=True, generator=shuffling),
            {},
            optimizer,
            torch.optim.lr_scheduler.StepLR(optimizer, 2),
            regularizer=RunState(trainer, generators=[shuffling]),
            training_loss=lambda out, y, **sample: F.mse_loss(out, y) * len(y),
            **options,
        )
        return student

    whole = run(4)
    run(2, save_every=1, save_dir=tmp_path)
    resumed = run(4, resume_from_dir=tmp_path)
    for name, value in whole.named_parameters():
        assert torch.equal(value, resumed.get_parameter(name)), name


def test_a_student_of_the_host_resumes_where_its_options_are_allowed(tmp_path):
    def run(epochs: int, **options: object) -> nn.Module:
        distiller = distiller_of(fno(), latents=False)
        loss = TrainerLoss(distiller)
        trainer = Trainer(model=distiller.student, n_epochs=epochs)
        optimizer = torch.optim.Adam(distiller.parameters(), 1e-2)
        trainer.train(
            DataLoader(distillation_dataset(*fields()), 4),
            {},
            optimizer,
            torch.optim.lr_scheduler.StepLR(optimizer, 2),
            regularizer=RunState(trainer, loss),
            training_loss=loss,
            **options,
        )
        return distiller.student

    whole = run(3)
    run(1, save_every=1, save_dir=tmp_path)
    # The host writes its options, a function and a class among them, into the weights' file.
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run(3, resume_from_dir=tmp_path)
    with torch.serialization.safe_globals([F.gelu, SpectralConv]):
        resumed = run(3, resume_from_dir=tmp_path)
    for name, value in whole.named_parameters():
        assert torch.equal(value, resumed.get_parameter(name)), name


def test_what_a_run_cannot_resume_is_refused(tmp_path):
    run = Run(epochs=1).train(save_every=1, save_dir=tmp_path)
    with pytest.raises(ValueError, match=r"`generators` has 0, expected 1"):
        RunState(run.trainer, run.loss).load_state_dict(run.state.state_dict())
    with pytest.raises(ValueError, match="saved with a distillation loss"):
        RunState(run.trainer, None, [run.shuffling]).load_state_dict(run.state.state_dict())
    with pytest.raises(ValueError, match=r"regularizer\.pt` .* was not written by `RunState`"):
        run.state.load_state_dict({"weight": torch.zeros(1)})
    other = TrainerLoss(distiller_of(unet(), latents=False, weighting=(1.0, 1.0)))
    with pytest.raises(ValueError, match=r"`state` has \['latent_losses.* expected \[\]"):
        other.load_state_dict(run.loss.state_dict())


def test_what_is_saved_is_read_without_unpickling_objects(tmp_path):
    Run(epochs=1).train(save_every=1, save_dir=tmp_path)
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names > {"regularizer.pt", "optimizer.pt", "scheduler.pt", "manifest.pt"}
    for name in names:
        torch.load(tmp_path / name, weights_only=True)


# Terms, evaluation, warnings


def train(distiller: SDKDDistiller, loss: TrainerLoss | None = None, **options: object) -> dict:
    """Two epochs by the host's trainer; its metrics."""
    student = distiller.student
    made = {"device": options.pop("device", "cpu")}
    for name in ("data_processor", "mixed_precision"):
        if name in options:
            made[name] = options.pop(name)
    distiller.to(made["device"])
    optimizer = torch.optim.Adam(distiller.parameters(), 1e-2)
    trainer = Trainer(model=student, n_epochs=2, **made)
    return trainer.train(
        DataLoader(distillation_dataset(*fields()), 4),
        options.pop("test_loaders", {}),
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 1),
        training_loss=loss or TrainerLoss(distiller),
        **options,
    )


def loader(size: int, seed: int = 1) -> DataLoader:
    return DataLoader(distillation_dataset(*fields(6, size, seed)), 4)


def test_the_terms_of_every_step_are_reported():
    steps = []
    distiller = distiller_of(unet())
    loss = TrainerLoss(distiller, on_step=steps.append)
    train(distiller, loss, test_loaders={"test": loader(8)})
    assert len(steps) == 6
    assert steps[-1] is loss.last_terms
    assert all(set(terms.features) == {"latent<-latent"} for terms in steps)


@pytest.mark.parametrize("make", [unet, fno])
@pytest.mark.parametrize("given", [True, False])
def test_a_normal_run_warns_of_nothing(make, given, tmp_path, recwarn):
    processor = DefaultDataProcessor(
        *(UnitGaussianNormalizer(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)) for _ in "xy")
    )
    relative = LpLoss(d=2)
    losses = {"l2": lambda out, y, **sample: relative(out, y)} if given else None
    distiller = distiller_of(make(), latents=False)
    metrics = train(
        distiller,
        data_processor=processor,
        test_loaders={8: loader(8), 16: loader(16)},
        eval_losses=losses,
        save_best="16_l2",
        save_dir=tmp_path,
    )
    assert 0 < metrics["8_l2"] < 1e3
    assert (tmp_path / "best_model_state_dict.pt").exists()
    assert [str(warning.message) for warning in recwarn] == []


def test_evaluation_is_the_task_loss_in_physical_units_and_moves_nothing():
    student = unet()
    normalizers = [
        UnitGaussianNormalizer(torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 3.0))
        for _ in "xy"
    ]
    processor = DefaultDataProcessor(*normalizers)
    distiller = distiller_of(student)
    loss = TrainerLoss(distiller)
    before = copy.deepcopy(loss.state_dict())
    trainer = Trainer(model=student, n_epochs=1, data_processor=processor)
    metrics = trainer.evaluate({"mse": loss}, loader(16), "fine")
    x, y = fields(6, 16, seed=1)
    with torch.no_grad():
        forecast = normalizers[1].inverse_transform(student(normalizers[0].transform(x)))
    assert metrics["fine_mse"].item() == pytest.approx(F.mse_loss(forecast, y).item(), rel=1e-5)
    assert loss.last_terms is None
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_evaluation_needs_labels():
    loss = TrainerLoss(distiller_of(unet()))
    x, y = fields(2)
    with torch.no_grad(), pytest.raises(ValueError, match="`y` is None in evaluation"):
        loss(y, x=x)


class Rollout(DefaultDataProcessor):
    """Each step reads the forecast before it; the labels are all steps, one after another."""

    def preprocess(self, sample, batched=True, step=None):
        if step is None:
            return super().preprocess(sample, batched)
        if step == 0:
            self.x, self.y = sample["x"], sample["y"]
        elif step == self.y.shape[1] // 3:
            return None
        return {"x": self.x, "y": self.y[:, 3 * step : 3 * step + 3]}

    def postprocess(self, out, sample, step=None):
        if step is not None:
            self.x = out[:, -2:]
        return out, sample


def test_autoregressive_evaluation():
    student = unet()
    distiller = distiller_of(student)
    loss = TrainerLoss(distiller)
    x, y = fields(6, 16)
    y = torch.cat([y, y.roll(1, -1)], 1)
    metrics = train(
        distiller,
        loss,
        data_processor=Rollout(),
        test_loaders={"rollout": DataLoader(distillation_dataset(x, y), 6)},
        eval_modes={"rollout": "autoregression"},
    )
    with torch.no_grad():
        first = student(x)
        second = student(first[:, -2:])
    # The mean over the steps, of each the mean over the elements: that of all elements.
    expected = F.mse_loss(torch.cat([first, second], 1), y)
    assert metrics["rollout_l2"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("make", [unet, fno])
def test_mixed_precision(make, device):
    distiller = distiller_of(make(), latents=make is unet)
    steps = []
    loss = TrainerLoss(distiller, on_step=steps.append)
    train(distiller, loss, device=str(device), mixed_precision=True)
    assert all(terms.total.isfinite() for terms in steps)
    assert {terms.frequency.dtype for terms in steps} == {torch.float32}
    assert all(p.isfinite().all() for p in distiller.student.parameters())


# Units


def processor(mean: float, deviation: float, *, out: bool = True) -> DefaultDataProcessor:
    numbers = torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1, 1), deviation)
    return DefaultDataProcessor(
        UnitGaussianNormalizer(*numbers), UnitGaussianNormalizer(*numbers) if out else None
    )


def test_a_teacher_of_other_units_is_refused():
    distiller = distiller_of(unet())
    theirs = processor(1.0, 2.0)
    with pytest.raises(
        ValueError, match=r"in_normalizer .*mean 1, deviation 2.*mean 0, .*Renormalized\(teacher"
    ):
        TrainerLoss(distiller, data_processor=processor(0.0, 2.0), teacher_processor=theirs)
    with pytest.raises(ValueError, match=r"out_normalizer UnitGaussian.*, expected .* None"):
        TrainerLoss(
            distiller, data_processor=processor(1.0, 2.0, out=False), teacher_processor=theirs
        )
    with pytest.raises(ValueError, match="`data_processor` is None"):
        TrainerLoss(distiller, teacher_processor=theirs)
    other = DefaultDataProcessor(
        UnitGaussianNormalizer(torch.ones(1, 2, 1, 1), torch.full((1, 2, 1, 1), 2.0)),
        UnitGaussianNormalizer(torch.ones(()), torch.full((), 2.0)),
    )
    TrainerLoss(distiller, data_processor=other, teacher_processor=theirs)


def test_a_renormalized_teacher_answers_in_the_students_units():
    teacher, own, given = unet(seed=4), processor(1.0, 2.0), processor(-3.0, 0.5)
    wrapped = Renormalized(teacher, own, given)
    x, _ = fields(2)
    answer = wrapped(given.in_normalizer.transform(x))
    expected = own.out_normalizer.inverse_transform(teacher(own.in_normalizer.transform(x)))
    torch.testing.assert_close(given.out_normalizer.inverse_transform(answer), expected)
    distiller = SDKDDistiller(
        wrapped,
        unet(),
        GridTransform((8, 8)),
        latents=[LatentPair("latent", "latent")],
        example={"x": x},
    )
    assert TrainerLoss(distiller)(distiller.student(x), x=x, y=fields(2)[1]) > 0
