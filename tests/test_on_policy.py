"""On-policy states: the student's own, never diverged ones, in loops of one's own and a host's."""

from pathlib import Path

import pytest
import torch
from small import BANDS, random, random_graph, refusals
from torch import Tensor, nn

from sdkd_plugin import (
    DistillationLoss,
    GraphTransform,
    GridTransform,
    OnPolicy,
    SDKDDistiller,
    precompute,
)
from sdkd_plugin.adapters.neuralop import TrainerLoss
from sdkd_plugin.data import mix
from sdkd_plugin.losses import frequency_aligned_loss
from sdkd_plugin.rollouts import Unrolled, rollout

from neuralop import Trainer  # isort: skip

LINE = GridTransform((8,))


def conv(seed: int, scale: float = 1.0, *, normalised: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular", bias=False)
    layer.weight.data *= scale
    return nn.Sequential(layer, nn.BatchNorm1d(2)) if normalised else layer


class Recorded(nn.Module):
    """A teacher that keeps what it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        return x.tanh()


class Hosted(nn.Module):
    """With the name that the host calls an input by."""

    def __init__(self) -> None:
        super().__init__()
        self.model = conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def drawn(seed: int, top: int) -> int:
    return int(torch.randint(top + 1, (), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", range(4))
def test_states_are_those_of_the_students_roll_out(seed: int):
    student, x = conv(0, normalised=True), random(5, 2, 8)
    student[1].running_mean += 0.1
    before = {name: value.clone() for name, value in student.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    states = OnPolicy(student, 3, bound=100.0, generator=generator)(x)
    assert student.training
    assert not states.requires_grad
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])  # running statistics too
    n = drawn(seed, 3)
    expected = torch.cat([x[:, None], rollout(student.eval(), x, 3)], 1)[:, n]
    torch.testing.assert_close(states, expected.detach())
    assert {drawn(seed, 3) for seed in range(20)} == {0, 1, 2, 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0, -3.0])
def test_a_teacher_is_not_asked_about_a_diverged_state(value: float):
    class Student(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # The second sample leaves the bound at its third step, and would come back.
            moved = x + 0.1
            return torch.where((x > 0.15) & (x[:, :1] < 0.9) & (marks == 1), value, moved)

    marks = torch.tensor([0, 1]).reshape(2, 1, 1)
    x = torch.zeros(2, 1, 4)
    policy = OnPolicy(Student(), 6, states=torch.ones(3, 1, 4), bound=2.0)
    for seed in range(10):
        policy.generator = torch.Generator().manual_seed(seed)
        seen, lost, n = policy.seen, int(policy.diverged), drawn(seed, 6)
        states = policy(x)
        torch.testing.assert_close(states[0], torch.full((1, 4), 0.1 * n))
        torch.testing.assert_close(states[1], torch.full((1, 4), 0.1 * min(n, 2)))
        assert policy.seen == seen + 2
        assert int(policy.diverged) == lost + (n > 2)


def test_a_teachers_roll_outs_are_inputs_that_nobody_labelled():
    """From ten frames of two channels each: the newest of a state are the teacher's forecasts."""
    torch.manual_seed(0)
    teacher, x = nn.Conv1d(10, 2, 3, padding=1, padding_mode="circular"), random(4, 10, 8)
    fresh = OnPolicy(teacher, 6, states=x, bound=100.0).states(x)
    assert fresh.shape == (24, 10, 8)
    assert not fresh.requires_grad
    forecasts = rollout(teacher, x, 6).detach()
    torch.testing.assert_close(fresh.unflatten(0, (6, 4))[:, :, -2:].transpose(0, 1), forecasts)
    torch.testing.assert_close(fresh[-4:], forecasts[:, 1:].flatten(1, 2))
    # One that diverges at once leaves nothing but the inputs.
    nn.init.constant_(teacher.weight, torch.inf)
    assert torch.equal(OnPolicy(teacher, 2).states(x), torch.cat([x, x]))
    # Beside labelled samples, in the loader of neuraloperator's trainer.
    data = torch.utils.data.StackDataset
    batches = mix(data(x=x, y=x[:, :2]), data(x=fresh), batch_size=4, ratio=0.5)
    batch = next(iter(batches))
    assert batch["mask"].flatten(1)[:, 0].tolist() == [True, True, False, False]


def test_the_bound_is_for_the_norm_too():
    """Each value stays in range, but all are large at once."""
    states = torch.zeros(1, 1, 100)
    states[..., 0] = 1.0
    policy = OnPolicy(nn.Conv1d(1, 1, 100, padding="same", padding_mode="circular"), states=states)
    nn.init.constant_(policy.model.weight, 1.0)
    nn.init.zeros_(policy.model.bias)
    policy.generator = torch.Generator().manual_seed(next(s for s in range(9) if drawn(s, 4)))
    assert torch.equal(policy(states), states)
    assert int(policy.diverged) == 1


def test_a_step_compares_on_the_state_and_labels_on_the_input():
    teacher, student = Recorded(), conv(1)
    x, y = random(2, 4, 2, 8)
    policy = OnPolicy(student, 3, bound=50.0, generator=torch.Generator().manual_seed(1))
    given = {"weighting": (1.0, 3.0), "augmentation": policy}
    terms = SDKDDistiller(teacher, student, LINE, BANDS, **given).step(x, y)
    states = torch.cat([x[:, None], rollout(student, x, 3)], 1)[:, drawn(1, 3)].detach()
    expected = frequency_aligned_loss(student(states), states.tanh(), LINE, BANDS, (1.0, 3.0))
    task = (student(x) - y).square().mean()
    torch.testing.assert_close(terms.total, expected + task)
    terms.total.backward()
    got = student.weight.grad.clone()
    student.zero_grad()
    (expected + task).backward()
    torch.testing.assert_close(got, student.weight.grad)
    unlabelled = SDKDDistiller(teacher, student, LINE, BANDS, augmentation="on-policy").step(x)
    assert unlabelled.task == 0


def test_further_inputs_reach_the_student_on_a_graph():
    class Diffusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: Tensor, edge_weight: Tensor) -> Tensor:
            return x[:, -1:] + self.rate * edge_weight

    graph = random_graph()
    transform = GraphTransform.from_edges(**graph, num_nodes=10)
    teacher, student = Diffusion(), Diffusion()
    student.rate.data += 0.1
    distiller = SDKDDistiller(
        teacher, student, transform, weighting=(1.0, 1.0), augmentation="on-policy"
    )
    terms = distiller.step(random(3, 4, 10, 1), edge_weight=torch.tensor(2.0))
    assert float(terms.total.detach()) == pytest.approx((0.1 * 2) ** 2, rel=1e-4)


def test_a_teachers_own_roll_out_is_a_target():
    teacher, student = conv(0, 0.5), conv(1, 0.5)
    x = random(4, 2, 8)
    distiller = SDKDDistiller(
        Unrolled(teacher, 3), Unrolled(student, 3), LINE, weighting=(1.0, 1.0)
    )
    expected = (rollout(student, x, 3) - rollout(teacher, x, 3)).square().mean()
    torch.testing.assert_close(distiller.step(x).total, expected)


@pytest.mark.filterwarnings("ignore:the forecast of teacher 0")  # one point has one frequency
def test_states_off_the_data_are_learned_on_policy_alone():
    """The data lie on x = 1 only; the student's roll-outs leave it, and the teacher answers."""

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)
            nn.init.constant_(self.linear.weight, 0.9)
            nn.init.constant_(self.linear.bias, -0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mT).mT

    def teacher(x: Tensor) -> Tensor:
        return 0.5 * x

    wrong = {}
    for name in (None, "on-policy"):
        student = Student()
        distiller = SDKDDistiller(
            teacher, student, GridTransform((1,)), weighting=(1.0, 1.0), augmentation=name
        )
        optimizer = torch.optim.SGD(student.parameters(), 0.2)
        torch.manual_seed(0)
        for _ in range(300):
            optimizer.zero_grad()
            distiller.step(torch.ones(2, 1, 1)).total.backward()
            optimizer.step()
        states = torch.tensor([0.5, 0.25]).reshape(2, 1, 1)
        wrong[name] = float((student(states) - teacher(states)).abs().max().detach())
    assert wrong[None] > 0.1
    assert wrong["on-policy"] < 0.02


@pytest.mark.parametrize("augmentation", ["on-policy", "noise"])
def test_the_hosts_trainer_trains_on_policy(augmentation: str):
    teacher, student = Recorded(), Hosted()
    x, y = random(2, 6, 2, 8)
    loss = TrainerLoss(DistillationLoss(teacher, LINE, BANDS), student, augmentation=augmentation)
    asked = loss.loss.teachers[0].asked
    torch.manual_seed(0)
    data = torch.utils.data.StackDataset(x=x, y=y)
    trainer = Trainer(model=student, n_epochs=6)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loader = torch.utils.data.DataLoader(data, batch_size=6)
    options = {"optimizer": optimizer, "scheduler": scheduler, "training_loss": loss}
    trainer.train(train_loader=loader, test_loaders={}, **options)
    assert len(asked) == 6
    assert sum(not torch.equal(each, x) for each in asked) >= 3
    # One step by hand.
    torch.manual_seed(3)
    total = loss(student(x), x=x, y=y)
    torch.manual_seed(3)
    by_hand = SDKDDistiller(teacher, student, LINE, BANDS, augmentation=augmentation).step(x, y)
    torch.testing.assert_close(total, 6 * by_hand.total)


def test_without_weight_it_trains_bit_for_bit_like_plain_training():
    x, y = random(2, 4, 2, 8)
    gradients = []
    for option in ({}, {"augmentation": "on-policy"}):
        student = conv(1)
        SDKDDistiller(conv(2), student, LINE, kd_weight=0.0, **option).step(x, y).total.backward()
        gradients.append(student.weight.grad)
    assert torch.equal(*gradients)


def test_stored_answers_are_refused(tmp_path: Path):
    batches = [{"x": random(3, 2, 8)}]
    stored = precompute(DistillationLoss(conv(2), LINE), batches, tmp_path)
    with pytest.raises(ValueError, match="`augmentation` is given with stored outputs"):
        SDKDDistiller(stored, conv(0), LINE, augmentation="on-policy")
    with pytest.raises(ValueError, match="`augmentation` is given, but the teachers' outputs are"):
        TrainerLoss(DistillationLoss(stored, LINE), conv(0), augmentation="on-policy")


test_refusals = refusals(
    (lambda: OnPolicy(conv(0), 0), "`max_steps` is 0"),
    (lambda: OnPolicy(conv(0), bound=1.0), r"`bound` is 1.0, expected a number in \(1, inf\)"),
    (
        lambda: TrainerLoss(DistillationLoss(conv(2), LINE), conv(0), augmentation="noise")(
            random(3, 2, 8), x=random(3, 2, 8), y=random(3, 2, 8), teacher=random(3, 2, 8)
        ),
        "the teachers must run on the augmented inputs",
    ),
)
