"""A distillation step in a loop of one's own: student, labels, masks, augmented inputs."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small import (
    LATENTS,
    GraphLayer,
    Recorded,
    X,
    Y,
    batch,
    descend,
    gradients,
    make,
    net,
    random,
    random_graph,
    refusals,
    same,
    teacher_net,
    train,
    with_latents,
)
from torch import Tensor, nn

from sdkd_plugin import (
    Bands,
    GaussianNoise,
    GraphTransform,
    LatentPair,
    Mixup,
    SDKDDistiller,
    TeacherOutput,
)

SEEN = torch.rand(Y.shape, generator=torch.Generator().manual_seed(0)) < 0.6


def plain_training(student: nn.Module, loss: Callable) -> list[float]:
    def of_batch(i: int) -> Tensor:
        x, y = batch(i)
        return loss(student(x), x, y)

    return descend(student.parameters(), of_batch, 6)


def test_a_step_is_the_task_plus_the_distillation_loss():
    distiller = with_latents(kd_weight=0.7)
    terms = distiller.step(X, Y)
    forecast = distiller(X)
    assert torch.equal(forecast, distiller.student(X))
    kd = distiller.loss(forecast, X, latents={"0": distiller.student[0](X)})
    torch.testing.assert_close(terms.task, F.mse_loss(forecast, Y).detach())
    torch.testing.assert_close(terms.total, F.mse_loss(forecast, Y) + kd.total)
    assert torch.equal(terms.frequency, kd.frequency)
    assert terms.features == kd.features
    assert not terms.task.requires_grad


def test_parameters_and_state_are_the_students_and_the_projectors():
    distiller = with_latents()
    expected = [*distiller.student.parameters(), *distiller.loss.latent_losses.parameters()]
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in expected}
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "loss"}
    assert distiller.student.training
    assert not distiller.eval().student.training


def test_a_resumed_run_equals_an_uninterrupted_one():
    whole, first, second = (with_latents(weighting="adaptive") for _ in range(3))

    def steps(distiller: SDKDDistiller, numbers: range) -> None:
        optimiser = torch.optim.SGD(distiller.parameters(), 0.05)  # it has no state
        for i in numbers:
            optimiser.zero_grad()
            distiller.step(*batch(i)).total.backward()
            optimiser.step()

    steps(whole, range(6))
    steps(first, range(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, range(3, 6))
    assert same(whole.state_dict().values(), second.state_dict().values())
    assert not same(first.state_dict().values(), second.state_dict().values())


@pytest.mark.parametrize("augmentation", [None, "mixup"])
def test_kd_weight_0_trains_bit_for_bit_like_plain_training(augmentation: str | None):
    student, teacher = net(regularised=True), Recorded(teacher_net())
    plain = copy.deepcopy(student)
    distiller = make(teacher=teacher, student=student, kd_weight=0.0, augmentation=augmentation)
    torch.manual_seed(5)  # dropout
    totals = train(distiller, 6)
    torch.manual_seed(5)
    assert totals == plain_training(plain, lambda forecast, x, y: F.mse_loss(forecast, y))
    assert same(student.state_dict().values(), plain.state_dict().values())
    assert not distiller.loss.teachers[0].seen


def test_equal_weights_train_like_plain_mse_distillation():
    plain, teacher = net(), teacher_net().eval()
    totals = plain_training(
        plain, lambda s, x, y: F.mse_loss(s, y) + 0.5 * F.mse_loss(s, teacher(x).detach())
    )
    distiller = make(weighting=(1.0, 1.0), kd_weight=0.5)
    assert train(distiller, 6) == pytest.approx(totals, rel=1e-5)
    for ours, theirs in zip(distiller.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    unequal = make(weighting=(4.0, 1.0), kd_weight=0.5)
    assert train(unequal, 6) != pytest.approx(totals, rel=1e-3)


@pytest.mark.parametrize(
    ("task_loss", "expected"),
    [
        ("mse", F.mse_loss),
        ("mae", F.l1_loss),
        ("relative_l2", lambda s, y: (s - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)),
        (lambda s, y: F.huber_loss(s, y, reduction="none"), F.huber_loss),
    ],
)
def test_task_losses(task_loss: object, expected: object):
    distiller = make(task_loss=task_loss)
    torch.testing.assert_close(distiller.step(X, Y).task, expected(distiller(X), Y).mean().detach())


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 1e30])
def test_a_mask_applies_to_the_task_only_and_missing_labels_may_be_anything(fill: float):
    distiller, full = with_latents(), with_latents().step(X, Y)
    masked = distiller.step(X, torch.where(SEEN, Y, fill), SEEN)
    expected = (distiller(X) - Y).square()[SEEN].mean()
    torch.testing.assert_close(masked.task, expected.detach())
    torch.testing.assert_close(masked.total - masked.task, full.total - full.task)
    assert torch.equal(masked.frequency, full.frequency)
    assert masked.features == full.features
    masked.total.backward()
    mine = gradients(distiller.student)
    distiller.zero_grad()
    distiller.step(X, Y, SEEN).total.backward()
    assert same(mine, gradients(distiller.student))
    assert all(gradient.isfinite().all() for gradient in mine)


@pytest.mark.parametrize("labels", [(), (torch.full_like(Y, torch.nan), SEEN & False)])
def test_without_an_observed_label_only_the_teacher_is_distilled(labels: tuple):
    distiller, expected = make(), make()
    terms = distiller.step(X, *labels)
    assert terms.task == 0
    terms.total.backward()
    expected.loss(expected(X), X).total.backward()
    for ours, theirs in zip(gradients(distiller), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_students_own_nan_is_not_blamed_on_the_labels():
    student = net()
    with torch.no_grad():
        student[-1].bias.fill_(torch.nan)
    assert make(student=student).step(X, Y, SEEN).total.isnan()


def test_signatures_are_read_once(monkeypatch: pytest.MonkeyPatch):
    distiller = make()
    # torch's own autograd functions read signatures too.
    monkeypatch.setattr("sdkd_plugin.teachers.named_inputs", None)
    assert torch.equal(distiller.step(X, Y).total, distiller.step(X, Y).total)
    assert torch.equal(distiller(X), distiller.student(X))


def test_models_are_compared_on_the_augmented_inputs_and_labels_on_the_plain_ones():
    shown = []

    def augmentation(x: Tensor) -> Tensor:
        shown.append(x + random(*x.shape, seed=5))
        return shown[-1]

    student = Recorded(net())
    distiller = make(teacher=Recorded(teacher_net()), student=student, augmentation=augmentation)
    terms = distiller.step(X, Y)
    assert same(distiller.loss.teachers[0].seen, shown)
    assert same(student.seen, [X, shown[0]])
    torch.testing.assert_close(terms.task, F.mse_loss(student.model(X), Y).detach())
    torch.testing.assert_close(terms.total - terms.task, make().step(shown[0]).total)
    distiller.step(X)
    assert same(student.seen[2:], shown[1:])  # without labels, one forecast


def test_mixup_is_between_two_samples_and_follows_its_generator():
    x = torch.eye(5)
    mixed, again = (Mixup(torch.Generator().manual_seed(3))(x) for _ in range(2))
    assert torch.equal(mixed, again)
    torch.testing.assert_close(mixed.sum(1), torch.ones(5))
    assert ((mixed > 0).sum(1) <= 2).all()
    assert not torch.equal(mixed, x)
    assert torch.equal(x, torch.eye(5))


def test_noise_has_the_deviation_that_was_given():
    x = 3 * random(4, 50, 50)
    noise = GaussianNoise(0.2, torch.Generator().manual_seed(0))(x) - x
    assert float(noise.std()) == pytest.approx(0.2 * float(x.std()), rel=0.03)


class NodeWise(nn.Sequential):
    """A student without a graph."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            super().__init__(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))


def test_distils_on_a_graph_and_each_model_gets_the_inputs_it_accepts(device: torch.device):
    graph = {name: value.to(device) for name, value in random_graph().items()}
    x, y = (random(4, 6, 10, 1, seed=seed).to(device) for seed in (0, 1))
    teacher = GraphLayer(8, seed=1).to(device)
    distiller = SDKDDistiller(
        teacher,
        NodeWise().to(device),
        GraphTransform.from_edges(**graph, num_nodes=10).to(device),
        Bands.split(0.4),
        latents=[LatentPair("0", "encode")],
        example={"x": x[:1], **graph},
    )

    def loss(i: int) -> Tensor:
        mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(i)).to(device) < 0.9
        return distiller.step(x, torch.where(mask, y, torch.nan), mask, **graph).total

    losses = descend(distiller.parameters(), loss, 40)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(distiller(x, **graph), distiller(x))
    (output,) = distiller.loss.teacher_outputs(x, **graph)
    assert torch.equal(output.forecast, teacher(x, **graph))
    unweighted = distiller.step(x, edge_index=graph["edge_index"])
    assert not torch.equal(unweighted.frequency, distiller.step(x, **graph).frequency)
    both = SDKDDistiller(teacher, GraphLayer(4, seed=2).to(device), distiller.loss.transform)
    assert torch.equal(both(x, **graph), both.student(x, **graph))
    graph["edge_weight"] = graph["edge_weight"].masked_fill(torch.arange(30) == 3, torch.nan)
    with pytest.raises(ValueError, match="`edge_weight` has 1 of 30 values that are NaN or Inf"):
        both.step(x, y, **graph)


JUDGED = "`augmentation` is given with a `teacher_bound`, the aggregation"
test_construction_refuses = refusals(
    ({"student": len}, "`student` is of type builtin.*, expected Module, the model to be trained"),
    ({"task_loss": "mze"}, r"`task_loss` is 'mze', expected one of .* Did you mean 'mse'\?"),
    ({"augmentation": "mixed"}, r"`augmentation` is 'mixed', expected one of \['mixup', 'noi"),
    ({"latents": LATENTS}, "`example` is needed with `latents`, .*: give {'x': x, "),
    ({"latents": LATENTS, "example": {"u": X}}, "`example` is needed with `latents`"),
    ({"latents": LATENTS, "example": X}, "`example` is needed with `latents`"),
    ({"augmentation": "noise", "teacher_bound": 0.0}, JUDGED),
    ({"augmentation": "noise", "aggregation": "camkd"}, JUDGED),
    ({"augmentation": "noise", "weighting": "confidence"}, JUDGED),
    of=make,
)


def step(**given: object) -> None:
    arguments = {
        name: given.pop(name) for name in ("y", "mask", "outputs", "edge") if name in given
    }
    make(**given).step(X, **arguments)


test_a_step_refuses = refusals(
    (
        {"y": Y, "edge": X},
        r"the inputs \['edge'\] are accepted by neither student nor teacher, exp",
    ),
    ({"task_loss": F.mse_loss, "y": Y}, r"`task_loss` returns a tensor of shape \(\), expected"),
    ({"kd_weight": 0.0}, "`kd_weight` is 0 and the batch has no label"),
    ({"kd_weight": 0.0, "y": Y, "mask": SEEN & False}, "`kd_weight` is 0 and the batch has no la"),
    ({"augmentation": lambda x: x[1:]}, r"`augmentation\(x\)` has shape \(4, .*expected \(5, 2, 8"),
    ({"augmentation": lambda x: x * torch.nan}, r"`augmentation\(x\)` has 720 of 720 values that"),
    (
        {"augmentation": "noise", "outputs": [TeacherOutput(Y)]},
        "`outputs` is given with an `augmentation`, but the teachers must run on the",
    ),
    of=step,
)


def test_bad_input_is_refused_before_it_touches_running_statistics():
    student = net(regularised=True)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="`x` has 720 of 720 values that are NaN or Inf"):
        make(student=student).step(X * torch.nan, Y)
    assert same(before.values(), student.state_dict().values())
