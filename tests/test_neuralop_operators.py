"""neuraloperator's own operators teach and learn, through its own trainer and checkpoints.

Every model of neuraloperator 2.0 that forecasts on a regular grid is here. Those it has beside
them are not of this kind: GINO and FNOGNO are for point clouds, UQNO gives bounds of an error.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from neuralop_parts import fno, train, unet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import DistillationLoss, GridTransform, LatentPair
from sdkd_plugin.adapters.neuralop import TrainerLoss
from sdkd_plugin.adapters.neuralop.data import load_navier_stokes
from sdkd_plugin.data import navier_stokes
from sdkd_plugin.taps import TapReader

from neuralop import LpLoss, models  # isort: skip
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
    widths = {"hidden_channels": width, "lifting_channels": width, "projection_channels": width}
    layers = {"uno_out_channels": [width] * 3, "uno_n_modes": [[4, 4]] * 3, "n_layers": 3}
    scalings = {"uno_scalings": [[1, 1], [0.5, 0.5], [2, 2]], "horizontal_skips_map": {2: 0}}
    return models.UNO(**widths, **layers, **scalings, channel_mlp_skip="linear", **CHANNELS)


def codano(width: int) -> nn.Module:
    widths = ("hidden_variable_codimension", "lifting_channels", "projection_channels")
    layers = {"n_layers": 2, "n_modes": [[4, 4]] * 2, "n_heads": [2, 2]}
    scalings = {"per_layer_scaling_factors": [[1, 1]] * 2, "attention_scaling_factors": [1, 1]}
    return models.CODANO(**dict.fromkeys(widths, width), **layers, **scalings)


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


@pytest.fixture(scope="module", params=CASES)
def lesson(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A wide operator of one kind teaches a narrow one of the same, with the host's trainer."""
    if request.param in ("LocalNO", "SFNO") and not hasattr(models, request.param):
        pytest.skip("no torch_harmonics 0.7.4")
    case, terms = CASES[request.param], []
    torch.manual_seed(0)
    teacher, student = case.make(8), case.make(4)
    x = torch.randn(8, 2, *case.shape, generator=torch.Generator().manual_seed(0))
    pairs = [LatentPair(tap, tap) for tap in case.taps]
    distillation = DistillationLoss(teacher, GridTransform(case.shape), latents=pairs)
    loss = TrainerLoss(distillation.fit_latents(student, x[:2]), student, on_step=terms.append)
    before = copy.deepcopy((teacher.state_dict(), loss.state_dict()))
    data = DataLoader(TensorDataset(x, x.roll(1, -1).flip(1)), len(x))
    train(student, loss, data, n_epochs=8, eval_losses={})
    parts = {"teacher": teacher, "student": student, "loss": loss}
    return SimpleNamespace(**parts, case=case, before=before, terms=terms, x=x)


def test_all_of_the_student_learns_and_nothing_of_the_teacher(lesson):
    assert lesson.terms[-1].total < 0.9 * lesson.terms[0].total
    for name, parameter in lesson.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    (copied,) = lesson.loss.loss.teachers
    assert not copied.training
    for name, value in lesson.before[0].items():
        if isinstance(value, Tensor):  # the host keeps a model's arguments beside its weights
            assert torch.equal(lesson.teacher.state_dict()[name], value), name
            assert torch.equal(copied.state_dict()[name], value), name


def test_its_latents_are_distilled_through_a_projector(lesson):
    first, last = lesson.terms[0].features, lesson.terms[-1].features
    assert set(first) == {f"{tap}<-{tap}" for tap in lesson.case.taps}
    assert all(last[name] < value for name, value in first.items())
    projectors = dict(lesson.loss.loss.named_parameters())
    assert projectors
    for name, parameter in projectors.items():
        assert not torch.equal(parameter, lesson.before[1][name]), name


def test_the_students_checkpoint_forecasts_the_same(lesson, tmp_path):
    student = lesson.student.eval()
    if isinstance(student, BaseModel):
        student.save_checkpoint(tmp_path, "student")
        again = type(student).from_checkpoint(tmp_path, "student")
    else:  # The host's UNO and CODANO have no checkpoints of their own.
        torch.save(student.state_dict(), tmp_path / "student.pt")
        again = lesson.case.make(4)
        again.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again.eval()(lesson.x), student(lesson.x))


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
    x, student = torch.ones(1, 2, 8, 8), CASES["FNO"].make(4)
    messages = {
        # The list of layers is no layer: each of them is called by itself.
        "fno_blocks.convs": r"the tap 'fno_blocks\.convs' .*was not reached in .*FNO",
        "fno_block": r"`FNO` has no tap 'fno_block'; .*such as \['fno_blocks",
    }
    for tap, message in messages.items():
        pairs = [LatentPair(tap, "fno_blocks")]
        loss = DistillationLoss(CASES["FNO"].make(8), GridTransform((8, 8)), latents=pairs)
        with pytest.raises(ValueError, match=message):
            loss.fit_latents(student, x)


FLOW = {"resolution": 16, "solver_resolution": 32, "viscosity": 1e-3, "duration": 5.0}
SPLIT = {"n_train": 32, "n_tests": [8], "batch_size": 8, "test_batch_sizes": [8]}
GRID = {"train_resolution": 16, "test_resolutions": [16], "frames_in": 2, "frames_out": 3}


def relative_l2(out: Tensor, y: Tensor, **sample: Tensor) -> Tensor:
    # The host's losses warn of the rest of the sample.
    return LpLoss(d=2)(out, y)


def nothing_but_x(model: nn.Module, args: tuple, sample: dict) -> tuple[tuple, dict]:
    """Hide the rest of the sample from an operator, which warns of it."""
    return args, {"x": sample["x"]} if sample else {}


@pytest.mark.parametrize(("student_of", "tap"), [(fno, "fno_blocks"), (unet, "latent")])
def test_a_trained_fno_teaches_without_labels(student_of, tap):
    fields = navier_stokes(40, **FLOW, cache=False, progress=False)
    data, tests, units = load_navier_stokes(fields, **SPLIT, **GRID, encode_input=True)
    teacher, student = fno(width=12), student_of(width=6)
    untrained = copy.deepcopy(student)
    for model in (teacher, untrained):  # `TrainerLoss` gives a student x alone
        model.register_forward_pre_hook(nothing_but_x, with_kwargs=True)

    def error_of(model: nn.Module, loss: Callable[..., Tensor], n_epochs: int) -> float:
        options = {"data_processor": units, "eval_losses": {"l2": relative_l2}}
        return float(train(model, loss, data, tests=tests, n_epochs=n_epochs, **options)["16_l2"])

    of_teacher = error_of(teacher, relative_l2, 10)
    of_untrained = error_of(untrained, lambda out, **_: 0.0 * out.sum(), 1)
    # The U-Net's latent is of half the resolution: compared on the frequencies that both have.
    pairs = [LatentPair(tap, "fno_blocks", weight=0.1)]
    distillation = DistillationLoss(teacher, GridTransform((16, 16)), latents=pairs)
    distillation.fit_latents(student, fields[:1, :2])

    class Unlabelled(TrainerLoss):
        def __call__(self, out: Tensor, x: Tensor, y: Tensor) -> Tensor:
            unseen = torch.zeros_like(y, dtype=torch.bool)
            return super().__call__(out, x, y * torch.nan, unseen)

    of_student = error_of(student, Unlabelled(distillation, student, LpLoss(d=2)), 10)
    assert of_teacher < of_student < 0.6 * of_untrained
