"""What of a batch is distilled: teacher-bounded samples, augmented inputs; options by name."""

import pytest
import torch
from sdkd_plugin.losses.bound import bounded_samples
from torch import Tensor, nn

from sdkd_plugin import (
    AdaptiveWeighting,
    Bands,
    ConfidenceWeighting,
    FixedWeighting,
    GaussianNoise,
    GridTransform,
    LatentPair,
    Mixup,
    RelativeWeighting,
    SDKDDistiller,
    TeacherOutput,
)

GRID = (8, 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = random(6, 2, *GRID), random(6, 3, *GRID, seed=1)


def net(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, 3, 1))


def make(**options: object) -> SDKDDistiller:
    return SDKDDistiller(
        **({"teacher": net(6, 1), "student": net(3, 2), "transform": GridTransform(GRID)} | options)
    )


# Teacher-bounded distillation.


def test_bounded_samples_by_hand():
    y = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, torch.nan], [torch.nan, torch.nan]])
    seen = ~y.isnan()
    student = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.5, 9.0], [9.0, 9.0]])
    teacher = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    # Squared errors: .5 against 1, 2 against 1, .25 against 1, nothing observed.
    for margin, expected in [(0.0, [0, 1, 0, 1]), (0.6, [1, 1, 0, 1]), (0.8, [1, 1, 1, 1])]:
        assert bounded_samples(student, teacher, y, margin, seen).tolist() == expected


def test_only_samples_that_lag_behind_follow_the_teacher():
    student = net(3, 2)
    with torch.no_grad():
        y = student(X) + 0.1
    theirs = y.clone()
    theirs[:2] += 0.05  # better than the student
    theirs[2:] += 0.5  # worse
    terms = make(student=student, teacher_bound=0.0, weighting=(1.0, 1.0)).step(
        X, y, outputs=[TeacherOutput(theirs, {})]
    )
    followed = (student(X) - theirs)[:2].square().sum() / Y.numel()
    torch.testing.assert_close(terms.total - terms.task, followed)
    # What is reported is the distance to the teacher, followed or not.
    torch.testing.assert_close(terms.frequency.sum(), (student(X) - theirs).square().mean())


def test_a_bound_counts_for_nothing_without_labels_or_with_a_wide_margin():
    plain = make().step(X, Y).total
    assert make(teacher_bound=1e6).step(X, Y).total == plain
    assert make(teacher_bound=0.0).step(X).total == make().step(X).total
    unseen = torch.zeros_like(Y, dtype=torch.bool)
    bounded = make(teacher_bound=0.0).step(X, Y, unseen)
    assert bounded.total == make().step(X, Y, unseen).total


def test_a_bound_works_with_every_aggregation_and_weighting():
    for aggregation in ("mean", "aekd", "camkd"):
        for weighting in ("fixed", "relative", "adaptive", "confidence"):
            distiller = make(
                teacher=[net(6, 1), net(5, 3)],
                aggregation=aggregation,
                weighting=weighting,
                teacher_bound=0.1,
            )
            terms = distiller.step(X, Y)
            terms.total.backward()
            assert terms.total.isfinite()


@pytest.mark.usefixtures("as_shipped")
def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="`teacher_bound` is -1, expected a finite number"):
        make(teacher_bound=-1)


# Function matching.


class Recorder(nn.Module):
    """Remembers what a model was shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.model(x)


def test_teacher_and_student_see_the_same_augmented_input_and_labels_the_plain_one():
    teacher, student = Recorder(net(6, 1)), Recorder(net(3, 2))
    shown = []

    def augmentation(x: Tensor) -> Tensor:
        shown.append(x + random(*x.shape, seed=5))
        return shown[-1]

    distiller = make(teacher=teacher, student=student, augmentation=augmentation)
    terms = distiller.step(X, Y)
    assert len(shown) == 1
    assert all(torch.equal(x, shown[0]) for x in teacher.seen)
    assert torch.equal(student.seen[0], X)
    assert torch.equal(student.seen[1], shown[0])
    torch.testing.assert_close(terms.task, (student.model(X) - Y).square().mean())
    expected = make(teacher=teacher.model, student=student.model).step(shown[0])
    torch.testing.assert_close(terms.total - terms.task, expected.total)


def test_without_labels_or_without_a_teacher_there_is_one_forecast():
    for options, batch in [({}, (X,)), ({"kd_weight": 0.0}, (X, Y))]:
        student = Recorder(net(3, 2))
        make(student=student, augmentation="mixup", **options).step(*batch)
        assert len(student.seen) == 1


def test_kd_weight_0_with_an_augmentation_trains_as_without():
    assert make(kd_weight=0.0, augmentation="mixup").step(X, Y).total == (
        make(kd_weight=0.0).step(X, Y).total
    )


def test_mixup_is_between_two_samples_and_follows_its_generator():
    x = torch.eye(5)
    mixed = [Mixup(torch.Generator().manual_seed(3))(x) for _ in range(2)]
    assert torch.equal(*mixed)
    torch.testing.assert_close(mixed[0].sum(1), torch.ones(5))
    assert ((mixed[0] > 0).sum(1) <= 2).all()
    assert not torch.equal(mixed[0], x)
    assert torch.equal(x, torch.eye(5))


def test_noise_has_the_deviation_it_says():
    x = 3 * random(4, 50, 50)
    noise = GaussianNoise(0.2, torch.Generator().manual_seed(0))(x) - x
    assert float(noise.std()) == pytest.approx(0.2 * float(x.std()), rel=0.03)


@pytest.mark.usefixtures("as_shipped")
def test_augmentations_refuse():
    with pytest.raises(ValueError, match=r"`augmentation` is 'mixed', expected one of \['mixup'"):
        make(augmentation="mixed")
    with pytest.raises(ValueError, match="`deviation` is 0, expected a finite number above 0"):
        GaussianNoise(0)
    with pytest.raises(ValueError, match=r"`augmentation\(x\)` has shape \(5, 2, 8, 8\), expected"):
        make(augmentation=lambda x: x[1:]).step(X, Y)
    with pytest.raises(ValueError, match=r"`augmentation\(x\)` has 768 of 768 values that are NaN"):
        make(augmentation=lambda x: x * torch.nan).step(X, Y)
    with pytest.raises(ValueError, match="`answers` is given with an `augmentation`"):
        make(augmentation="noise").step(X, Y, outputs=[TeacherOutput(Y, {})])


# Weightings by name.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fixed", FixedWeighting),
        ("relative", RelativeWeighting),
        ("adaptive", AdaptiveWeighting),
        ("confidence", ConfidenceWeighting),
    ],
)
def test_a_weightings_name_is_the_weighting_with_its_defaults(name: str, kind: type):
    distiller = make(weighting=name, bands=Bands.dyadic(3))
    assert type(distiller.loss.weighting) is kind
    terms = distiller.step(X, Y)
    assert terms.band_weights.shape == (3,)
    assert terms.total.isfinite()


@pytest.mark.usefixtures("as_shipped")
def test_an_unknown_weighting_lists_those_there_are():
    with pytest.raises(
        ValueError,
        match=r"`weighting` is 'adaptative', expected one of \['fixed', 'relative', "
        r"'adaptive', 'confidence'\]. Did you mean 'adaptive'",
    ):
        make(weighting="adaptative")


# Two teachers in a training run.


@pytest.mark.parametrize("bound", [0.6, 0.8])
def test_aekd_in_training_keeps_its_bounds_and_hurts_no_teacher(bound: float):
    """The step against the target's gradient raises neither teacher's loss to first order."""
    from sdkd_plugin import AEKDAggregation

    student = net(4, 2)
    teachers = [net(6, 1), net(6, 3)]
    distiller = make(teacher=teachers, student=student, aggregation=AEKDAggregation(bound=bound))
    optimiser = torch.optim.SGD(student.parameters(), 0.05)
    free = 0
    for step in range(40):
        x = random(6, 2, *GRID, seed=step)
        terms = distiller.step(x)
        weights = terms.teacher_weights
        assert (weights >= 1 - bound - 1e-6).all()
        assert (weights <= bound + 1e-6).all()
        optimiser.zero_grad()
        terms.total.backward()
        optimiser.step()
        # In the space that AEKD works in: the gradients in the student's forecast.
        forecast = student(x).detach().requires_grad_()
        losses = [distiller.loss.total(forecast, teacher(x)) for teacher in teachers]
        gradients = [torch.autograd.grad(loss, forecast)[0].flatten() for loss in losses]
        terms = distiller.terms(forecast, x)
        (update,) = torch.autograd.grad(terms.total, forecast)
        slopes = torch.stack([update.flatten() @ gradient for gradient in gradients])
        if bound > float(terms.teacher_weights.max()) + 1e-4:
            free += 1
            assert (slopes >= -1e-9).all()
    assert free > 5


# What the options cannot do together, and what a teacher lacks.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher_bound": 0.0}, "teacher_bound"),
        ({"aggregation": "camkd"}, "aggregation 'camkd'"),
        ({"weighting": "confidence"}, "weighting 'confidence'"),
    ],
)
def test_an_augmentation_does_not_go_with_what_asks_for_labels(options: dict, named: str):
    with pytest.raises(ValueError, match=f"`augmentation` is given with {named}, expected"):
        make(augmentation="mixup", **options)
    measured = ConfidenceWeighting(2, decay=None)
    assert make(augmentation="mixup", weighting=measured).step(X, Y).total.isfinite()


def test_a_host_that_forecasts_itself_refuses_an_augmentation():
    from sdkd_plugin.adapters.neuralop import TrainerLoss

    with pytest.raises(ValueError, match="`distiller` has an augmentation, but the host's"):
        TrainerLoss(make(augmentation="noise"))


def test_a_teacher_that_is_0_in_a_band_is_named_once():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3), keepdim=True).expand(-1, 3, *GRID)

    distiller = make(teacher=[net(6, 1), Mean()], weighting="relative")
    message = r"the forecast of teacher 1 \(Mean\) is 0 in the bands \[1\] \(0 is the lowest\)"
    with pytest.warns(UserWarning, match=message):
        assert distiller.step(X, Y).total.isfinite()
    distiller.step(X, Y)


@pytest.mark.usefixtures("as_shipped")
def test_a_latent_that_does_not_fit_names_pair_and_teacher():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.head = nn.Flatten(), net(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.flat(x)
            return self.head(x)

    with pytest.raises(ValueError, match="`latents` '0<-flat' of teacher 0: "):
        make(teacher=Flat(), latents=[LatentPair("0", "flat")], example={"x": X})
    pair = LatentPair("0", "0", weighting="confidence")
    with pytest.raises(ValueError, match="asks for labels, but latents have none"):
        make(latents=[pair], example={"x": X})


def test_each_teachers_latent_has_averages_of_its_own():
    weighting = AdaptiveWeighting(2)
    distiller = make(
        teacher=[net(6, 1), net(6, 3)],
        latents=[LatentPair("0", "0", weighting=weighting)],
        example={"x": X},
    )
    distiller.step(X, Y)
    assert not weighting.error.any()
    first, second = (
        loss.loss.loss.weighting for loss in distiller.latent_losses.by_pair[0].values()
    )
    assert not torch.equal(first.error, second.error)


def test_the_bounded_loss_has_the_right_gradient():
    loss = make(weighting=(1.0, 3.0)).loss.double()
    teacher, y = random(4, 3, *GRID, seed=3).double(), random(4, 3, *GRID, seed=4).double()
    student = random(4, 3, *GRID, seed=5).double().requires_grad_()
    counts = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)

    def total(field: Tensor) -> Tensor:
        return loss.terms(field, teacher, y, counts=counts).total

    assert torch.autograd.gradcheck(total, student)
    kept = loss.terms(student[::2], teacher[::2]).total / 2
    torch.testing.assert_close(total(student), kept, atol=1e-10, rtol=0)
