"""neuraloperator's own operators teach and learn, through its own trainer and checkpoints.

Every model of neuraloperator 2.0 that forecasts on a regular grid is here. Those it has beside
them are not of this kind: GINO and FNOGNO are for point clouds, UQNO gives bounds of an error.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import GridTransform, LatentPair, SDKDDistiller
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss
from sdkd_plugin.adapters.neuralop.data import load_navier_stokes
from sdkd_plugin.data import navier_stokes
from sdkd_plugin.taps import TapReader

from neuralop import LpLoss, Trainer, models  # isort: skip
from neuralop.data.datasets.tensor_dataset import TensorDataset  # isort: skip
from neuralop.models.base_model import BaseModel  # isort: skip

CHANNELS = {"in_channels": 2, "out_channels": 2}


class Case(NamedTuple):
    """A kind of operator, of any width, the grid it is tried on, and two of its taps."""

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    taps: tuple[str, ...]


def fourier(name: str, n_dim: int, **options: object) -> Callable[[int], nn.Module]:
    """FNO and those built like it."""
    return lambda width: getattr(models, name)(
        n_modes=(4,) * n_dim, hidden_channels=width, n_layers=2, **CHANNELS, **options
    )


def uno(width: int) -> nn.Module:
    return models.UNO(
        hidden_channels=width,
        lifting_channels=width,
        projection_channels=width,
        n_layers=3,
        uno_out_channels=[width] * 3,
        uno_n_modes=[[4, 4]] * 3,
        uno_scalings=[[1, 1], [0.5, 0.5], [2, 2]],
        horizontal_skips_map={2: 0},
        channel_mlp_skip="linear",
        **CHANNELS,
    )


def codano(width: int) -> nn.Module:
    return models.CODANO(
        hidden_variable_codimension=width,
        lifting_channels=width,
        projection_channels=width,
        n_layers=2,
        n_modes=[[4, 4]] * 2,
        n_heads=[2, 2],
        per_layer_scaling_factors=[[1, 1]] * 2,
        attention_scaling_factors=[1, 1],
    )


FNO_TAPS = ("fno_blocks", "fno_blocks.convs.0", "lifting")
CASES = {
    "FNO": Case(fourier("FNO", 2), (8, 8), FNO_TAPS),
    "FNO 1D": Case(fourier("FNO", 1), (16,), FNO_TAPS),
    "FNO 3D": Case(fourier("FNO", 3), (8, 8, 8), FNO_TAPS),
    "FNO, padded": Case(fourier("FNO", 2, domain_padding=0.25), (8, 8), FNO_TAPS),
    "TFNO": Case(fourier("TFNO", 2), (8, 8), FNO_TAPS),
    "UNO": Case(uno, (8, 8), ("fno_blocks.1", "fno_blocks.2", "horizontal_skips.0")),
    "CODANO": Case(codano, (8, 8), ("attention_layers.0", "attention_layers.1", "lifting")),
    # These need torch-harmonics, of the very version that neuraloperator names.
    "LocalNO": Case(
        fourier("LocalNO", 2, default_in_shape=(8, 8)), (8, 8), ("local_no_blocks", "lifting")
    ),
    "SFNO": Case(fourier("SFNO", 2), (8, 8), FNO_TAPS),
}


def operators() -> list[object]:
    needed = {"LocalNO": "torch_harmonics 0.7.4", "SFNO": "torch_harmonics 0.7.4"}
    missing = {name for name in needed if not hasattr(models, name)}
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(name in missing, reason=f"no {needed.get(name)}"),
            id=name,
        )
        for name in CASES
    ]


class Lesson(NamedTuple):
    """What is left of a training: the models, and what the loss said at every step."""

    case: Case
    distiller: SDKDDistiller
    taught: dict[str, Tensor]
    losses: list[float]
    features: list[dict[str, float]]
    projectors: dict[str, Tensor]
    x: Tensor


@pytest.fixture(scope="module", params=operators())
def lesson(request: pytest.FixtureRequest) -> Lesson:
    """A wide operator of one kind teaches a narrow one of the same, with the host's trainer."""
    case = CASES[request.param]
    torch.manual_seed(0)
    teacher, student = case.make(8), case.make(4)
    x = torch.randn(8, 2, *case.shape, generator=torch.Generator().manual_seed(0))
    y = x.roll(1, -1).flip(1)
    distiller = SDKDDistiller(
        teacher,
        student,
        GridTransform(case.shape),
        latents=[LatentPair(tap, tap) for tap in case.taps],
        example={"x": x[:2]},
    )
    taught = copy.deepcopy(teacher.state_dict())
    projectors = {
        name: p.detach().clone() for name, p in distiller.latent_losses.named_parameters()
    }
    loss = TrainerLoss(distiller)
    losses, features = [], []

    def recorded(out: Tensor, **sample: object) -> Tensor:
        value = loss(out, **sample)
        losses.append(value.item())
        features.append({name: float(f) for name, f in loss.last_terms.features.items()})
        return value

    optimizer = torch.optim.Adam(distiller.parameters(), 1e-2)
    Trainer(model=student, n_epochs=8).train(
        DataLoader(TensorDataset(x, y), len(x)),
        {},
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        training_loss=recorded,
        eval_losses={},
    )
    return Lesson(case, distiller, taught, losses, features, projectors, x)


def test_the_student_learns_and_all_of_it_does(lesson):
    assert lesson.losses[-1] < 0.9 * lesson.losses[0]
    for name, parameter in lesson.distiller.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_teacher_stays_bit_identical(lesson):
    (teacher,) = lesson.distiller.teachers
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        if isinstance(value, Tensor):  # the host keeps a model's arguments beside its weights
            assert torch.equal(value, lesson.taught[name]), name


def test_its_latents_are_distilled_through_a_projector(lesson):
    assert set(lesson.features[0]) == {f"{tap}<-{tap}" for tap in lesson.case.taps}
    for name, first in lesson.features[0].items():
        assert lesson.features[-1][name] < first, name
    assert lesson.projectors
    for name, parameter in lesson.distiller.latent_losses.named_parameters():
        assert not torch.equal(parameter, lesson.projectors[name]), name


def test_the_students_checkpoint_forecasts_the_same(lesson, tmp_path):
    student = lesson.distiller.student.eval()
    if isinstance(student, BaseModel):
        student.save_checkpoint(tmp_path, "student")
        again = type(student).from_checkpoint(tmp_path, "student")
    else:  # The host's UNO and CODANO have no checkpoints of their own.
        torch.save(student.state_dict(), tmp_path / "student.pt")
        again = lesson.case.make(4)
        again.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again.eval()(lesson.x), student(lesson.x))
        assert torch.equal(lesson.distiller(lesson.x), student(lesson.x))


def test_a_tap_called_in_every_layer_gives_the_last_ones(device):
    """FNO calls its one `fno_blocks` once a layer."""
    torch.manual_seed(0)
    model = CASES["FNO"].make(4).to(device)
    x = torch.randn(2, 2, 8, 8, device=device)
    calls = []
    handle = model.fno_blocks.register_forward_hook(lambda _, __, out: calls.append(out))
    with TapReader(model, ["fno_blocks"]) as reader:
        forecast = model(x)
    handle.remove()
    assert len(calls) == 2
    latent = reader.read()["fno_blocks"]
    assert torch.equal(latent, calls[-1])
    torch.testing.assert_close(model.projection(latent), forecast)


def test_a_tap_that_an_operator_never_calls_is_named():
    model = CASES["FNO"].make(4)
    distiller_of = partial(SDKDDistiller, CASES["FNO"].make(8), model, GridTransform((8, 8)))
    # The list of layers is no layer: each of them is called by itself.
    pair = LatentPair("fno_blocks.convs", "fno_blocks")
    with pytest.raises(ValueError, match=r"the tap 'fno_blocks\.convs' .*was not reached in .*FNO"):
        distiller_of(latents=[pair], example={"x": torch.ones(1, 2, 8, 8)})
    with pytest.raises(ValueError, match=r"`FNO` has no tap 'fno_block'; .*such as \['fno_blocks"):
        distiller_of(
            latents=[LatentPair("fno_block", "fno_blocks")], example={"x": torch.ones(1, 2, 8, 8)}
        )


@pytest.fixture(scope="module")
def fields() -> Tensor:
    return navier_stokes(
        40,
        resolution=16,
        solver_resolution=32,
        viscosity=1e-3,
        duration=4.0,
        cache=False,
        progress=False,
    )


def fno(width: int) -> nn.Module:
    return models.FNO(n_modes=(8, 8), hidden_channels=width, **CHANNELS)


def unet(width: int) -> nn.Module:
    return REGISTERED["sdkd_unet"](width=width, depth=1, **CHANNELS)


def relative_l2(out: Tensor, y: Tensor, **sample: object) -> Tensor:
    # The host's losses warn of the rest of the sample, which the host's trainer gives them.
    return LpLoss(d=2)(out, y)


def nothing_but_x(model: nn.Module, args: tuple, sample: dict) -> tuple[tuple, dict]:
    """Hide the rest of the sample from an operator, which warns of it."""
    return args, {name: value for name, value in sample.items() if name == "x"}


@pytest.mark.parametrize(("student_of", "tap"), [(fno, "fno_blocks"), (unet, "latent")])
def test_a_trained_fno_teaches_without_labels(student_of, tap, fields):
    train, tests, processor = load_navier_stokes(
        fields,
        n_train=32,
        n_tests=[8],
        batch_size=8,
        test_batch_sizes=[8],
        train_resolution=16,
        test_resolutions=[16],
        frames_in=2,
        frames_out=2,
        encode_input=True,
    )

    def fit(
        model: nn.Module, loss: Callable[..., Tensor], epochs: int, trained: nn.Module | None = None
    ) -> float:
        """Train with the host's trainer; the relative error on the test samples."""
        optimizer = torch.optim.Adam((trained or model).parameters(), 5e-3)
        if trained is None:  # A distilled student is given x alone by `TrainerLoss`.
            model.register_forward_pre_hook(nothing_but_x, with_kwargs=True)
        metrics = Trainer(model=model, n_epochs=epochs, data_processor=processor).train(
            train,
            tests,
            optimizer,
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            training_loss=loss,
            eval_losses={"l2": relative_l2},
        )
        return float(metrics["16_l2"])

    torch.manual_seed(0)
    teacher, student = fno(12), student_of(6)
    teachers = fit(teacher, relative_l2, epochs=10)
    untaught = fit(copy.deepcopy(student), lambda out, **_: 0.0 * out.sum(), epochs=1)
    distiller = SDKDDistiller(
        teacher,
        student,
        GridTransform((16, 16)),
        # The U-Net's latent is of half the resolution: compared on the frequencies that both have.
        latents=[LatentPair(tap, "fno_blocks", weight=0.1)],
        example={"x": fields[:1, :2]},
    )
    loss = TrainerLoss(distiller)

    def unlabelled(out: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss(out, x)

    taught = fit(student, unlabelled, epochs=10, trained=distiller)
    assert teachers < taught < 0.6 * untaught
