"""One training step of distillation: who is trained, who is not, and what the step adds up to."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkd_plugin import (
    Bands,
    FixedWeighting,
    GraphTransform,
    GridTransform,
    LatentPair,
    SDKDDistiller,
    TeacherOutput,
    frequency_aligned_loss,
)
from sdkd_plugin._checks import check_finite
from sdkd_plugin.losses.task import TASK_LOSSES, observed_mean

GRID = (8, 9)
BANDS = Bands.split(0.3)
LATENTS = [LatentPair("0", "0"), LatentPair("0", "3", weight=0.5, bands=Bands.dyadic(3))]


def convolutions(width: int, *, seed: int, regularised: bool = False) -> nn.Sequential:
    """Conv - (BatchNorm, Dropout) or two activations - Conv, with weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm2d(width), nn.Dropout(0.3)] if regularised else [nn.Tanh(), nn.ReLU()]
        return nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            *middle,
            nn.Conv2d(width, width, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(width, 3, 3, padding=1),
        )


def teacher_net() -> nn.Sequential:
    return convolutions(7, seed=1, regularised=True)


def student_net() -> nn.Sequential:
    return convolutions(4, seed=2)


def batch(seed: int = 0, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, *GRID, generator=generator)
    return x, torch.randn(n, 3, *GRID, generator=generator)


def make(**options: object) -> SDKDDistiller:
    settings: dict = {
        "teacher": teacher_net(),
        "student": student_net(),
        "transform": GridTransform(GRID),
        "bands": BANDS,
    }
    return SDKDDistiller(**(settings | options))


def with_latents(**options: object) -> SDKDDistiller:
    return make(latents=LATENTS, example={"x": batch()[0][:2]}, **options)


def train(distiller: SDKDDistiller, steps: int = 5, **options: object) -> list[float]:
    """Several Adam steps; the totals."""
    optimiser = torch.optim.Adam(distiller.parameters(), 1e-2)
    totals = []
    for i in range(steps):
        terms = distiller.step(*batch(i), **options)
        optimiser.zero_grad()
        terms.total.backward()
        optimiser.step()
        totals.append(terms.total.item())
    return totals


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


class Counted(nn.Module):
    """Counts the calls of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x)


# ------------------------------------------------------------------------------------ the teacher


def test_the_teacher_is_bit_identical_after_training():
    distiller = with_latents()
    before = copy.deepcopy(distiller.teachers[0].state_dict())
    x, _ = batch(9)
    forecast = distiller.teachers[0](x)
    train(distiller.train())
    distiller.eval()
    train(distiller.train())
    after = distiller.teachers[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(distiller.teachers[0](x), forecast)
    assert all(p.grad is None for p in distiller.teachers[0].parameters())


def test_the_teacher_stays_in_eval_mode_whatever_is_called():
    distiller = make()
    distiller.train()
    assert not any(module.training for module in distiller.teachers[0].modules())
    assert all(module.training for module in distiller.student.modules())
    x, _ = batch()
    (one,), (two,) = distiller.loss.teacher_outputs(x), distiller.loss.teacher_outputs(x)
    assert torch.equal(one.forecast, two.forecast)  # dropout is off
    distiller.teachers[0].train()  # by a caller's mistake
    (three,) = distiller.loss.teacher_outputs(x)
    assert torch.equal(one.forecast, three.forecast)


def test_the_teacher_is_nobodys_parameter_state_or_child():
    distiller = with_latents()
    theirs = {id(p) for p in distiller.teachers[0].parameters()}
    assert not theirs & {id(p) for p in distiller.parameters()}
    assert not theirs & {id(tensor) for tensor in distiller.state_dict(keep_vars=True).values()}
    assert distiller.teachers[0] not in set(distiller.modules())
    assert not any(p.requires_grad for p in distiller.teachers[0].parameters())
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "latent_losses"}
    trained = {id(p) for p in distiller.parameters() if p.requires_grad}
    expected = [*distiller.student.parameters(), *distiller.latent_losses.parameters()]
    assert trained == {id(p) for p in expected}


def test_the_teacher_moves_along(device: torch.device):
    distiller = with_latents().to(device, torch.float64)
    for parameter in (*distiller.teachers[0].parameters(), *distiller.parameters()):
        assert (parameter.device.type, parameter.dtype) == (device.type, torch.float64)
    x, y = (tensor.to(device, torch.float64) for tensor in batch())
    terms = distiller.step(x, y)
    assert (terms.total.dtype, terms.total.device.type) == (torch.float64, device.type)
    assert terms.frequency.dtype == torch.float64


# -------------------------------------------------------------------------- the sum and its parts


def test_a_step_adds_up_what_it_names(device: torch.device):
    distiller = with_latents(weighting=(0.5, 2.0), kd_weight=0.7).to(device)
    x, y = (tensor.to(device) for tensor in batch())
    terms = distiller.step(x, y)
    forecast = distiller(x)
    (answer,) = distiller.loss.teacher_outputs(x)
    task = F.mse_loss(forecast, y)
    kd = frequency_aligned_loss(
        forecast, answer.forecast, distiller.loss.transform, BANDS, (0.5, 2.0)
    )
    latents = sum(
        pair.weight * value for pair, value in zip(LATENTS, terms.features.values(), strict=True)
    )
    torch.testing.assert_close(terms.task, task.detach())
    torch.testing.assert_close(terms.total, task + 0.7 * (kd + latents))
    assert list(terms.features) == ["0<-0", "0<-3"]
    assert terms.band_weights.tolist() == [0.5, 2.0]
    assert terms.frequency.shape == (2,)
    torch.testing.assert_close(
        terms.frequency.sum(), F.mse_loss(forecast, answer.forecast).detach()
    )
    assert terms.teacher_weights.tolist() == [1]
    assert terms.total.requires_grad
    parts = [terms.task, terms.frequency, terms.band_weights, terms.teacher_weights]
    assert not any(part.requires_grad for part in [*parts, *terms.features.values()])


def test_a_latent_loss_is_relative_to_the_teachers_energy():
    distiller = make(latents=LATENTS[:1], example={"x": batch()[0]})
    x, y = batch()
    terms = distiller.step(x, y)
    mine, theirs = distiller.student[0](x), distiller.teachers[0][0](x)
    expected = F.mse_loss(projector(distiller)(mine), theirs) / theirs.square().mean()
    torch.testing.assert_close(terms.features["0<-0"], expected.detach())


def test_equal_weights_train_like_plain_mse_distillation():
    distiller = make(weighting=(1.0, 1.0), kd_weight=0.5)
    plain, teacher = student_net(), teacher_net().eval()
    optimiser = torch.optim.Adam(plain.parameters(), 1e-2)
    totals = []
    for i in range(6):
        x, y = batch(i)
        forecast = plain(x)
        loss = F.mse_loss(forecast, y) + 0.5 * F.mse_loss(forecast, teacher(x).detach())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        totals.append(loss.item())
    assert train(distiller, 6) == pytest.approx(totals, rel=1e-5)
    for ours, theirs in zip(distiller.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert totals[-1] < totals[0]


def test_unequal_weights_do_not():
    equal, unequal = make(weighting=(1.0, 1.0)), make(weighting=(4.0, 1.0))
    assert train(equal, 3) != pytest.approx(train(unequal, 3), rel=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_without_kd_it_trains_bit_for_bit_like_plain_training(masked: bool):
    teacher = Counted(teacher_net())
    student = convolutions(4, seed=2, regularised=True)
    plain = copy.deepcopy(student)
    distiller = make(teacher=teacher, student=student, kd_weight=0.0)
    mask = torch.ones(5, 3, *GRID, dtype=torch.bool) if masked else None
    torch.manual_seed(5)
    totals = train(distiller, 6, mask=mask) if masked else train(distiller, 6)
    torch.manual_seed(5)  # dropout
    optimiser = torch.optim.Adam(plain.parameters(), 1e-2)
    expected = []
    for i in range(6):
        x, y = batch(i)
        loss = F.mse_loss(plain(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    if masked:  # a masked mean is summed otherwise, so it is equal to rounding only
        assert totals == pytest.approx(expected, rel=1e-5)
    else:
        assert totals == expected
        for ours, theirs in zip(
            student.state_dict().values(), plain.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert teacher.calls == 0


def test_without_kd_no_term_of_a_teacher_is_made_up():
    terms = make(kd_weight=0.0).step(*batch())
    assert terms.frequency is None
    assert terms.band_weights is None
    assert terms.features == {}
    assert torch.equal(terms.total.detach(), terms.task)


def test_unlabelled_only_the_teacher_speaks():
    distiller = make(weighting=(1.0, 2.0))
    x, _ = batch()
    terms = distiller.step(x)
    assert terms.task == 0
    terms.total.backward()
    unlabelled = gradients(distiller.student)
    (answer,) = distiller.loss.teacher_outputs(x)
    distiller.student.zero_grad()
    arguments = distiller.loss.transform, BANDS, (1.0, 2.0)
    frequency_aligned_loss(distiller(x), answer.forecast, *arguments).backward()
    for ours, expected in zip(unlabelled, gradients(distiller.student), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("task_loss", "expected"), [("mse", F.mse_loss), ("mae", F.l1_loss)])
def test_task_losses(task_loss: str, expected: object):
    distiller = make(task_loss=task_loss)
    x, y = batch()
    torch.testing.assert_close(distiller.step(x, y).task, expected(distiller(x), y).detach())


def test_a_task_loss_of_ones_own():
    huber = lambda forecast, y: F.huber_loss(forecast, y, reduction="none")  # noqa: E731
    distiller = make(task_loss=huber)
    x, y = batch()
    torch.testing.assert_close(distiller.step(x, y).task, F.huber_loss(distiller(x), y).detach())


# ---------------------------------------------------------------------------------------- masking


def test_a_mask_touches_the_task_term_only():
    distiller = with_latents()
    x, y = batch()
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    hidden = torch.where(mask, y, torch.nan)
    full, masked = distiller.step(x, y), distiller.step(x, hidden, mask)
    expected = (distiller(x) - y).square()[mask].mean().detach()
    torch.testing.assert_close(masked.task, expected)
    assert torch.equal(masked.frequency, full.frequency)
    assert masked.features == full.features
    torch.testing.assert_close(masked.total - masked.task, full.total - full.task)


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 1e30, 0.0])
def test_what_was_not_observed_may_be_anything(fill: float):
    x, y = batch()
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    results = []
    for hidden in (y, torch.where(mask, y, fill)):
        distiller = make()
        terms = distiller.step(x, hidden, mask)
        terms.total.backward()
        results.append((terms.total, gradients(distiller.student)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert all(gradient.isfinite().all() for gradient in results[0][1])


def test_a_mask_may_be_one_along_an_axis():
    distiller = make()
    x, y = batch()
    rows = torch.arange(5) < 3
    mask = rows.reshape(5, 1, 1, 1)
    expected = F.mse_loss(distiller(x)[:3], y[:3]).detach()
    torch.testing.assert_close(distiller.step(x, y, mask).task, expected)


def test_with_nothing_observed_it_is_the_unlabelled_step():
    x, y = batch()
    masked, unlabelled = make(), make()
    terms = masked.step(x, torch.full_like(y, torch.nan), torch.zeros_like(y, dtype=torch.bool))
    without = unlabelled.step(x)
    assert terms.task == 0
    assert torch.equal(terms.total, without.total)
    terms.total.backward()
    without.total.backward()
    for ours, expected in zip(gradients(masked), gradients(unlabelled), strict=True):
        assert torch.equal(ours, expected)


# --------------------------------------------------------------------------- answers known already


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_precomputed_answers_give_the_terms_of_online_ones(context: type):
    x, y = batch()
    online, offline = with_latents(), with_latents()
    with context():
        answers = offline.loss.teacher_outputs(x)
    assert set(answers[0].latents) == {"0", "3"}
    assert not answers[0].forecast.requires_grad
    one, two = online.step(x, y), offline.step(x, y, outputs=answers)
    assert torch.equal(one.total, two.total)
    assert torch.equal(one.frequency, two.frequency)
    assert one.features == two.features
    one.total.backward()
    two.total.backward()
    for ours, expected in zip(gradients(online), gradients(offline), strict=True):
        assert torch.equal(ours, expected)


def test_precomputed_answers_spare_the_teacher():
    teacher = Counted(teacher_net())
    distiller = make(teacher=teacher)
    x, y = batch()
    answers = distiller.loss.teacher_outputs(x)
    distiller.step(x, y, outputs=answers)
    assert teacher.calls == 1


def test_terms_of_a_forecast_made_already_are_those_of_a_step():
    distiller = make()
    x, y = batch()
    assert torch.equal(distiller.terms(distiller(x), x, y).total, distiller.step(x, y).total)


def test_a_host_may_compute_the_task_term():
    distiller = make(kd_weight=0.5)
    x, y = batch()
    forecast = distiller(x)
    own = 3 * F.l1_loss(forecast, y)
    terms = distiller.terms(forecast, x, task=own)
    torch.testing.assert_close(terms.total, own + distiller.step(x).total)
    assert torch.equal(terms.task, own.detach())
    plain = make(kd_weight=0.0).terms(forecast, x, task=own)
    assert torch.equal(plain.total, own)


# ---------------------------------------------------------------------------------------- latents


def projector(distiller: SDKDDistiller) -> nn.Module:
    return distiller.latent_losses.by_pair[0]["0"].projector


def test_latents_train_the_projectors_and_come_closer():
    distiller = with_latents()
    before = copy.deepcopy(distiller.latent_losses.state_dict())
    first = distiller.step(*batch()).features
    train(distiller, 40)
    last = distiller.step(*batch()).features
    assert all(last[name] < 0.8 * first[name] for name in first)
    for name, weight in distiller.latent_losses.state_dict().items():
        assert not torch.equal(weight, before[name])


def test_learning_the_shapes_of_latents_changes_nothing():
    student = convolutions(4, seed=2, regularised=True).train()
    student[2].eval()  # a part that its owner froze
    modes = [module.training for module in student.modules()]
    state, random_state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    example = {"x": batch()[0]}
    make(student=student, latents=LATENTS, example=example)
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(example) == ["x"]
    assert not any(module._forward_hooks for module in student.modules())


def test_latents_of_a_coarser_grid_have_frequencies_of_their_own():
    down = [nn.Sequential(nn.Conv2d(2, c, 2, 2), nn.ConvTranspose2d(c, 3, 2, 2)) for c in (6, 4)]
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    distiller = SDKDDistiller(
        *down, GridTransform((8, 8), "reflect"), latents=[LatentPair("0", "0")], example={"x": x}
    )
    transform = distiller.latent_losses.by_pair[0]["0"].domain
    assert (transform.domain_shape, transform.boundary) == ((4, 4), "reflect")
    distiller.step(x).total.backward()


class Frames(nn.Module):
    """Keeps its latents as ``(batch, frames, channels, nx, ny)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            self.encode = nn.Conv3d(1, width, 1)
            self.latent = nn.Identity()
            self.decode = nn.Conv3d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        latent = self.latent(self.encode(x[:, None]).movedim(2, 1))
        return self.decode(latent.movedim(1, 2))[:, 0]


def test_frames_that_a_model_keeps_apart_count_as_channels():
    x, _ = batch()
    teacher, student = Frames(6), Frames(4)
    distiller = make(teacher=teacher, student=student, latents=[LatentPair()], example={"x": x})
    assert projector(distiller).linear.weight.shape == (2 * 6, 2 * 4)
    latents = {
        name: model.encode(x[:, None]).movedim(2, 1)
        for name, model in (("mine", student), ("theirs", teacher))
    }
    assert latents["mine"].shape == (5, 2, 4, *GRID)
    target = latents["theirs"].flatten(1, 2)
    error = F.mse_loss(projector(distiller)(latents["mine"].flatten(1, 2)), target)
    (value,) = distiller.step(x).features.values()
    torch.testing.assert_close(value, (error / target.square().mean()).detach())


def test_float64_models_have_float64_projectors():
    distiller = make(
        teacher=teacher_net().double(),
        student=student_net().double(),
        latents=LATENTS,
        example={"x": batch()[0].double()},
    )
    terms = distiller.step(*(tensor.double() for tensor in batch()))
    assert terms.total.dtype == torch.float64


# ----------------------------------------------------------------------------------------- graphs


class GraphLayer(nn.Module):
    """A tiny graph network ``(batch, time, nodes, features)``."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encode = nn.Linear(1, width)
            self.decode = nn.Linear(width, 1)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        latent = self.encode(x)
        messages = latent[..., edge_index[0], :]
        if edge_weight is not None:
            messages = messages * edge_weight[:, None]
        around = torch.zeros_like(latent).index_add(-2, edge_index[1], messages)
        return self.decode(torch.tanh(latent + around))


class NodeWise(nn.Module):
    """A student that knows no graph."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.encode = nn.Linear(1, width)
            self.decode = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


@pytest.fixture
def graph(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, 10, (2, 30), generator=generator).to(device)
    return {"edge_index": edges, "edge_weight": torch.rand(30, generator=generator).to(device)}


def graph_batch(device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 4, 6, 10, 1, generator=generator)
    return x.to(device), y.to(device)


def test_distils_on_a_graph_and_routes_inputs(graph: dict, device: torch.device):
    x, y = graph_batch(device)
    distiller = SDKDDistiller(
        GraphLayer(8, seed=1).to(device),
        NodeWise().to(device),
        GraphTransform.from_edges(**graph, num_nodes=10).to(device),
        Bands.split(0.4),
        latents=[LatentPair("encode", "encode")],
        example={"x": x[:1], **graph},
    )
    optimiser = torch.optim.Adam(distiller.parameters(), 1e-2)
    losses = []
    for i in range(40):
        mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(i)).to(device) < 0.9
        terms = distiller.step(x, torch.where(mask, y, torch.nan), mask, **graph)
        optimiser.zero_grad()
        terms.total.backward()
        optimiser.step()
        losses.append(terms.total.item())
    assert losses[-1] < 0.8 * losses[0]
    assert terms.frequency.shape == (2,)
    # The student takes no graph, the teacher cannot do without.
    assert distiller(x).shape == y.shape
    assert torch.equal(distiller(x, **graph), distiller(x))
    changed = {**graph, "edge_weight": 2 * graph["edge_weight"]}
    assert not torch.equal(distiller.step(x, **changed).frequency, terms.frequency)


def test_an_input_reaches_each_model_that_takes_it(graph: dict, device: torch.device):
    x, _ = graph_batch(device)
    teacher, student = GraphLayer(8, seed=1).to(device), GraphLayer(4, seed=2).to(device)
    expected = student(x, **graph)
    transform = GraphTransform.from_edges(**graph, num_nodes=10).to(device)
    distiller = SDKDDistiller(teacher, student, transform)
    assert torch.equal(distiller(x, **graph), expected)
    (answer,) = distiller.loss.teacher_outputs(x, **graph)
    assert torch.equal(answer.forecast, teacher(x, **graph))


# ----------------------------------------------------------------------------------- housekeeping


def test_pickles_and_copies_with_its_teacher():
    distiller = with_latents()
    x, y = batch()
    expected = distiller.step(x, y).total
    for twin in (
        copy.deepcopy(distiller),
        pickle.loads(pickle.dumps(distiller)),  # noqa: S301
    ):
        assert twin.teachers[0] is not distiller.teachers[0]
        assert torch.equal(twin.step(x, y).total, expected)
        train(twin, 1)
    assert torch.equal(distiller.step(x, y).total, expected)


def test_state_dict_round_trip():
    trained, fresh = with_latents(), with_latents()
    train(trained, 3)
    x, y = batch()
    assert not torch.equal(fresh.step(x, y).total, trained.step(x, y).total)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.step(x, y).total, trained.step(x, y).total)


def test_casting_to_half_and_back_leaves_bands_and_teacher_alone():
    distiller = make(bands=Bands.split(0.3, transition=0.1), weighting=(1.0, 2.0))
    x, y = batch()
    expected = distiller.step(x, y).frequency
    distiller.loss.to(torch.bfloat16).float()
    assert torch.equal(distiller.step(x, y).frequency, expected)


def test_an_autocast_step_is_finite_and_its_frequency_terms_are_float32(device: torch.device):
    distiller = with_latents().to(device)
    x, y = (tensor.to(device) for tensor in batch())
    with torch.autocast(device.type, torch.bfloat16):
        terms = distiller.step(x, y)
        unlabelled = distiller.step(x)
    assert distiller(x).dtype == torch.float32
    assert {terms.frequency.dtype, terms.band_weights.dtype} == {torch.float32}
    assert {terms.total.dtype, unlabelled.total.dtype} == {torch.float32}
    terms.total.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(distiller))
    exact = distiller.step(x, y)
    torch.testing.assert_close(terms.frequency, exact.frequency, rtol=0.05, atol=0)


def test_defaults_are_those_documented():
    distiller = SDKDDistiller(teacher_net(), student_net(), GridTransform(GRID))
    assert distiller.loss.bands == Bands.split(0.25)
    assert distiller.kd_weight == 1
    assert distiller.loss.weighting.weights.tolist() == [1, 2]


# -------------------------------------------------------------------------------------- bad input


@pytest.fixture(autouse=True)
def as_shipped_in_refusals(request: pytest.FixtureRequest) -> None:
    """Our own messages, not those of the type checks that only pytest adds."""
    if "refuses" in request.node.name:
        request.getfixturevalue("as_shipped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_weight": -0.5}, "`kd_weight` is -0.5, expected a finite number at least 0"),
        ({"kd_weight": float("nan")}, "`kd_weight` is nan"),
        ({"task_loss": "mze"}, r"`task_loss` is 'mze', expected one of .*Did you mean 'mse'"),
        ({"weighting": (1.0,)}, "`weights` has 1 values, expected 2"),
        ({"latents": LATENTS}, "`example` is needed with `latents`"),
        ({"latents": LATENTS, "example": {"u": 1}}, "`example` is needed with `latents`"),
        (
            {"latents": [LatentPair("0", "latent")], "example": {"x": batch()[0]}},
            r"`Sequential` has no tap 'latent'; it names \[\], .* such as",
        ),
        (
            {"latents": [LatentPair("latent", "0")], "example": {"x": batch()[0]}},
            r"`Sequential` has no tap 'latent'",
        ),
        (
            {"latents": [LATENTS[0]] * 2, "example": {"x": batch()[0]}},
            r"`latents` has the pairs \['0<-0', '0<-0'\], expected each of them once",
        ),
        (
            {"latents": [LatentPair("0", "0", of=1)], "example": {"x": batch()[0]}},
            "`LatentPair.of` is 1, expected a teacher from 0 to 0",
        ),
        ({"aggregation": "aked"}, r"`aggregation` is 'aked', expected one of .*'aekd'"),
        ({"teacher": []}, "`teacher` is an empty sequence"),
    ],
)
def test_construction_refuses(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "`LatentPair.weight` is -1.0, expected a finite number above 0"),
        ({"loss": "fitnet"}, r"`LatentPair.loss` is 'fitnet', .*Did you mean 'fitnets'"),
    ],
)
def test_a_pair_refuses(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LatentPair(**options)


def test_construction_refuses_a_teacher_that_is_the_student():
    model = teacher_net()
    with pytest.raises(ValueError, match="`teacher` and `student` share weights"):
        make(teacher=model, student=model)
    with pytest.raises(ValueError, match=r"`teacher` and `student` share weights.*deepcopy"):
        make(teacher=Counted(model), student=model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    same = nn.Identity()
    with pytest.raises(ValueError, match="`teacher` and `student` share weights"):
        make(teacher=same, student=same)


def test_construction_refuses_latents_without_a_domain():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 9, 3 * 8 * 9), nn.Unflatten(1, (3, 8, 9)))
    with pytest.raises(ValueError, match=r"activation has shape \(5, 144\), expected a batch axis"):
        make(student=flat, latents=[LatentPair("0", "0")], example={"x": batch()[0]})


def test_construction_refuses_latents_of_another_graph(graph: dict):
    transform = GraphTransform.from_edges(**graph, num_nodes=10)
    pooled = nn.Sequential(nn.Linear(1, 4), nn.AvgPool2d((2, 1)), nn.Upsample(scale_factor=(2, 1)))
    teacher = nn.Sequential(nn.Linear(1, 4))
    with pytest.raises(ValueError, match=r"tap '1' .* do not both lie on the domain: .* \(10,\)"):
        SDKDDistiller(
            teacher,
            pooled,
            transform,
            latents=[LatentPair("1", "0")],
            example={"x": torch.randn(3, 12, 10, 1)},
        )


X, Y = batch()
BAD_X = X.masked_fill(torch.arange(X.numel()).reshape(X.shape) == 7, torch.nan)
BAD_Y = Y.masked_fill(torch.arange(Y.numel()).reshape(Y.shape) == 7, torch.inf)
SEEN = torch.ones_like(Y, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "inputs", "message"),
    [
        ((BAD_X, Y), {}, r"`x` has 1 of 720 values that are NaN or Inf"),
        ((X, BAD_Y), {}, r"`y` has 1 of 1080 values that are NaN or Inf"),
        ((X, BAD_Y, SEEN), {}, r"`y` has 1 of 1080 values that are NaN or Inf"),
        ((X, Y[:, :2]), {}, r"`y` has shape \(5, 2, 8, 9\), expected \(5, 3, 8, 9\)"),
        ((X, Y[:1]), {}, r"`y` has shape \(1, 3, 8, 9\), expected \(5, 3, 8, 9\)"),
        ((X, None, SEEN), {}, "`mask` is given but `y` is None"),
        ((X, Y, SEEN.float()), {}, r"`mask` is of torch.float32, expected torch.bool"),
        ((X, Y, SEEN[:, :2]), {}, r"`mask` has shape \(5, 2, 8, 9\), expected \(5, 3, 8, 9\)"),
        ((X, Y, SEEN[0]), {}, r"`mask` has shape \(3, 8, 9\), expected \(5, 3, 8, 9\)"),
        (
            (X, Y),
            {"edge_index": torch.zeros(2, 1)},
            r"inputs \['edge_index'\] are accepted by neither student nor teacher",
        ),
        ((X, Y), {"answers": ()}, "`answers` has 0 answers, expected 1: one for each teacher"),
        (
            (X, Y),
            {"answers": [TeacherOutput(BAD_Y, {})]},
            r"`forecast of teacher 0 \(Sequential\)` has 1 of 1080 values that are NaN or Inf",
        ),
        (
            (X, Y),
            {"answers": [TeacherOutput(Y[:, :1], {})]},
            r"`forecast of teacher 0 .*` has shape \(5, 1, 8, 9\), expected \(5, 3, 8, 9\)",
        ),
    ],
)
def test_a_step_refuses(arguments: tuple, inputs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make().step(*arguments, **inputs)


def test_a_step_refuses_bad_input_before_it_touches_running_statistics():
    student = convolutions(4, seed=2, regularised=True)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="`x` has 1 of 720"):
        make(student=student).step(BAD_X, Y)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_students_own_nan_is_not_blamed_on_the_labels():
    class Diverged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(torch.nan))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x[:, :1].expand(-1, 3, -1, -1)

    mask = torch.rand(Y.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert make(student=Diverged()).step(X, Y, mask).total.isnan()


def test_a_step_refuses_a_graph_with_a_weight_that_is_not_a_number(
    graph: dict, device: torch.device
):
    transform = GraphTransform.from_edges(**graph, num_nodes=10).to(device)
    distiller = SDKDDistiller(
        GraphLayer(8, seed=1).to(device), GraphLayer(4, seed=2).to(device), transform
    )
    x, y = graph_batch(device)
    graph["edge_weight"][3] = torch.nan
    with pytest.raises(ValueError, match="`edge_weight` has 1 of 30 values that are NaN"):
        distiller.step(x, y, **graph)


def test_a_module_list_is_several_teachers():
    teachers = nn.ModuleList([teacher_net(), nn.Conv2d(2, 3, 1)])
    terms = make(teacher=teachers).step(X, Y)
    assert terms.teacher_weights.tolist() == [0.5, 0.5]


def test_a_masked_task_in_half_precision_does_not_overflow():
    forecast = torch.ones(4, 10, 64, 64, dtype=torch.float16)
    observed = torch.ones_like(forecast, dtype=torch.bool)
    y = torch.zeros_like(forecast)
    assert observed_mean(TASK_LOSSES["mse"], forecast, y, observed) == 1


def test_a_step_refuses_to_learn_from_nothing():
    with pytest.raises(ValueError, match="`mask` is False everywhere and kd_weight is 0"):
        make(kd_weight=0.0).step(X, Y, torch.zeros_like(SEEN))
    with pytest.raises(ValueError, match="`y` is None and kd_weight is 0"):
        make(kd_weight=0.0).step(X)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_that_forecasts_several_tensors_is_refused(role: str):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.map(x), x

    with pytest.raises(ValueError, match="`Pair` forecasts a tuple, expected one tensor"):
        make(**{role: Pair()}).step(X, Y)


def test_large_finite_values_whose_sum_overflows_are_finite():
    x = torch.full((3, 2, *GRID), 3e38)
    assert not x.sum().isfinite()
    check_finite("x", x)
    x[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="`x` has 1 of 432 values that are NaN or Inf"):
        check_finite("x", x)


def test_a_hosts_task_term_stands_beside_labels_that_judge_teachers():
    teachers = [teacher_net(), nn.Conv2d(2, 3, 1)]
    distiller = make(teacher=teachers, aggregation="camkd")
    task = torch.tensor(7.0)
    terms = distiller.terms(distiller(X), X, Y, task=task)
    assert terms.task == task
    torch.testing.assert_close(terms.teacher_weights, distiller.step(X, Y).teacher_weights)
    assert terms.teacher_weights[0] != terms.teacher_weights[1]


def test_a_step_refuses_a_teacher_that_forecasts_another_shape():
    teacher = nn.Conv2d(2, 5, 1)
    with pytest.raises(
        ValueError,
        match=r"teacher 0 \(Conv2d\)` has shape \(5, 5, 8, 9\), expected \(5, 3, 8, 9\)",
    ):
        make(teacher=teacher).step(X, Y)


def test_a_step_refuses_a_forecast_off_the_transforms_domain():
    distiller = make(transform=GridTransform((16, 16)))
    with pytest.raises(ValueError, match=r"a field has shape \(5, 3, 8, 9\), expected \(16, 16\)"):
        distiller.step(X, Y)


def test_a_step_refuses_a_teacher_that_diverges():
    teacher = teacher_net()
    with torch.no_grad():
        teacher[5].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"`forecast of teacher 0 .*` has 360 of 1080 values"):
        make(teacher=teacher).step(X, Y)
    assert make(teacher=teacher, check_finite=False).step(X, Y).total.isnan()


def test_a_step_refuses_answers_without_the_latents_it_needs():
    distiller = with_latents()
    (answer,) = distiller.loss.teacher_outputs(X)
    with pytest.raises(ValueError, match="the latents of '0<-0' are distilled but were not given"):
        distiller.step(X, Y, outputs=[answer._replace(latents={"3": answer.latents["3"]})])
    with pytest.raises(ValueError, match="the latents of '0<-0' are distilled but were not given"):
        distiller.terms(distiller(X), X, Y)
    overflown = {**answer.latents, "3": answer.latents["3"] * torch.inf}
    with pytest.raises(ValueError, match=r"`latent '3' of teacher 0 .*` has .* NaN or Inf"):
        distiller.step(X, Y, outputs=[answer._replace(latents=overflown)])


def test_a_task_loss_that_refuses_to_be_masked():
    distiller = make(task_loss=F.mse_loss, weighting=FixedWeighting((1.0, 1.0)))
    distiller.step(X, Y)
    with pytest.raises(
        ValueError, match=r"`task_loss` has shape \(\), expected .*loss of elements"
    ):
        distiller.step(X, Y, SEEN)


# -------------------------------------------------------------------------------- several teachers


def two_teachers() -> list[nn.Sequential]:
    return [teacher_net(), convolutions(6, seed=4)]


def test_of_several_teachers_the_mean_is_followed():
    distiller = make(teacher=two_teachers(), weighting=(0.5, 2.0))
    x, y = batch()
    terms = distiller.step(x, y)
    mean = torch.stack([teacher(x) for teacher in distiller.teachers]).mean(0)
    arguments = distiller.loss.transform, BANDS, (0.5, 2.0)
    expected = frequency_aligned_loss(distiller(x), mean, *arguments) + F.mse_loss(distiller(x), y)
    torch.testing.assert_close(terms.total, expected)
    assert terms.teacher_weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("aggregation", ["mean", "aekd", "camkd"])
def test_several_teachers_stay_as_they_are_and_their_weights_sum_to_one(aggregation: str):
    pairs = [LatentPair("0", "0"), LatentPair("0", "3", of=1)]
    distiller = make(
        teacher=two_teachers(), aggregation=aggregation, latents=pairs, example={"x": batch()[0]}
    )
    before = [copy.deepcopy(teacher.state_dict()) for teacher in distiller.teachers]
    totals = train(distiller.train(), 20)
    assert totals[-1] < totals[0]
    for teacher, state in zip(distiller.teachers, before, strict=True):
        assert not any(module.training for module in teacher.modules())
        assert all(torch.equal(state[name], value) for name, value in teacher.state_dict().items())
    terms = distiller.step(*batch())
    assert float(terms.teacher_weights.sum()) == pytest.approx(1)
    assert list(terms.features) == ["0<-0", "0<-1.3"]


def test_a_teacher_twice_is_that_teacher_once():
    twice = make(teacher=[teacher_net(), teacher_net()])
    torch.testing.assert_close(train(twice), train(make()), rtol=1e-5, atol=0)


def test_construction_refuses_no_teacher():
    with pytest.raises(ValueError, match="`teacher` is an empty sequence, expected at least one"):
        make(teacher=[])
