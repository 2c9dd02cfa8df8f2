"""Losses between latents: one contract for all four, known answers, projectors, resolutions."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import (
    GRID,
    LATENTS,
    GraphLayer,
    X,
    batch,
    make,
    make_loss,
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

from sdkd_plugin import AdaptiveWeighting, Bands, GraphTransform, GridTransform, LatentPair
from sdkd_plugin.losses.features import (
    AbstractFeatureLoss,
    AttentionLoss,
    BoundaryLoss,
    FitNetsLoss,
    FrequencyFeatureLoss,
)
from sdkd_plugin.losses.frequency import FrequencyAlignedLoss
from sdkd_plugin.losses.latents import ChannelProjector, LatentLoss

ATTENTION = LatentPair("0", "0", loss="attention")


def fields(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(random(3, 4, 5, 2, seed=seed, dtype=dtype) for seed in (0, 1))


class FeatureLossContract:
    """What each loss of ``(batch, 4, 5, 2)`` latents promises."""

    make: type[AbstractFeatureLoss]

    @pytest.fixture
    def loss(self) -> AbstractFeatureLoss:
        return self.make()

    def met(self) -> tuple[Tensor, Tensor]:
        """A student and a teacher whose loss is 0."""
        return fields()[1], fields()[1]

    def test_a_number_of_at_least_0_and_0_where_it_must_be(self, loss):
        value = loss.double()(*fields())
        assert value.shape == ()
        assert value > 0.01
        assert loss(*self.met()).item() == pytest.approx(0, abs=1e-9)

    def test_gradcheck_for_the_student(self, loss):
        student, teacher = fields()
        # The boundary loss has no second derivative at +-1: step away from there.
        student = torch.where((student.abs() - 1).abs() < 0.01, 0.5, student).requires_grad_()
        assert torch.autograd.gradcheck(lambda s: loss.double()(s, teacher), student)

    @pytest.mark.parametrize("zero", [(0, 1), (1, 0), (0, 0)])
    def test_latents_of_zeros_give_finite_values_and_gradients(self, loss, zero):
        student, teacher = (z * x for z, x in zip(zero, fields(torch.float32), strict=True))
        value = loss(student.requires_grad_(), teacher)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()

    def test_half_precision_is_compared_in_float32(self, loss):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(*[x.bfloat16() for x in fields()])
        assert value.dtype == torch.float32
        exact = loss(*[x.bfloat16().float() for x in fields()])
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=0)

    def test_every_sample_has_the_same_share(self, loss):
        if loss.train().needs_projector and list(loss.parameters()):
            loss.eval()  # a batch norm's statistics are the batch's
        student, teacher = (torch.cat([x, x.flip(0)]) for x in fields(torch.float32))
        torch.testing.assert_close(loss(student, teacher), loss(*fields(torch.float32)))

    def test_another_shape_is_refused(self, loss):
        with pytest.raises(ValueError, match=r"`student` has shape \(3, 4, 5, 1\), expected"):
            loss(fields(torch.float32)[0][..., :1], fields(torch.float32)[1])


class TestFrequency(FeatureLossContract):
    def make(self):
        inner = FrequencyAlignedLoss(GridTransform((5, 2)), Bands.split(0.4), (0.5, 2.0))
        return FrequencyFeatureLoss(inner)

    def test_is_in_units_of_the_teacher(self, loss):
        student, teacher = fields()
        expected = loss.loss(student, teacher) / teacher.square().mean()
        torch.testing.assert_close(loss(student, teacher), expected)
        torch.testing.assert_close(loss(100 * student, 100 * teacher), expected)


class TestFitNets(FeatureLossContract):
    make = staticmethod(partial(FitNetsLoss, 4, -3))

    def met(self):
        student = fields()[0]
        return student, F.batch_norm(student, None, None, training=True)

    def test_equals_a_loop_over_channels(self, loss):
        student, teacher = (x.numpy() for x in fields())
        with torch.no_grad():
            loss.double().norm.weight.copy_(random(4, seed=2))
            loss.norm.bias.copy_(random(4, seed=3))
        total = 0.0
        for c in range(4):
            values = student[:, c].ravel()
            normed = (values - values.mean()) / math.sqrt(values.var() + loss.norm.eps)
            regressed = loss.norm.weight[c].item() * normed + loss.norm.bias[c].item()
            total += ((regressed - teacher[:, c].ravel()) ** 2).sum()
        expected = total / (teacher**2).sum()
        assert loss(*fields()).item() == pytest.approx(expected, abs=1e-10)
        loss.norm.double()
        with pytest.raises(
            ValueError, match=r"expected at least two values a channel: take larger"
        ):
            loss(torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1))


class TestAttention(FeatureLossContract):
    make = staticmethod(partial(AttentionLoss, -3))

    def test_equals_a_loop_over_places(self, loss):
        total, (student, teacher) = 0.0, (x.numpy() for x in fields())
        for s, t in zip(student, teacher[:, :3], strict=True):
            maps = []
            for feature in (s, t):
                q = [(feature[:, i, j] ** 2).mean() for i in range(5) for j in range(2)]
                maps.append(np.array(q) / math.sqrt(sum(v**2 for v in q)))
            total += ((maps[0] - maps[1]) ** 2).sum()
        value = loss(fields()[0], fields()[1][:, :3])
        assert float(value) == pytest.approx(total / 3, abs=1e-10)
        for scale in (1e-30, 1e30):
            torch.testing.assert_close(loss(scale * fields()[0], fields()[1][:, :3]), value)


class TestBoundary(FeatureLossContract):
    make = BoundaryLoss

    def met(self):
        return 1.5 * fields()[1].sign(), fields()[1]

    def test_equals_a_loop_over_elements(self, loss):
        student, teacher = fields()
        total = 0.0
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
            if t <= 0 and s > -1:
                total += (s + 1) ** 2
            elif t > 0 and s <= 1:
                total += (s - 1) ** 2
        assert float(loss(student, teacher)) == pytest.approx(total / student.numel(), abs=1e-10)


@pytest.mark.parametrize(("channels", "axis"), [((4, 7), -3), ((7, 4), -1), ((5, 5), -2)])
def test_a_projector_is_an_orthogonal_linear_map_of_the_channels(channels: tuple, axis: int):
    before = torch.get_rng_state()
    projector = ChannelProjector(*channels, channel_axis=axis)
    assert torch.equal(torch.get_rng_state(), before)
    x = random(2, 3, 6, 8).movedim(axis, -1)[..., :1].expand(-1, -1, -1, channels[0])
    x = (x * torch.arange(1.0, channels[0] + 1)).movedim(-1, axis)
    weight = projector.linear.weight
    expected = torch.einsum("oc,...c->...o", weight, x.movedim(axis, -1)).movedim(-1, axis)
    torch.testing.assert_close(projector(x), expected)
    gram = weight.mT @ weight if channels[1] > channels[0] else weight @ weight.mT
    torch.testing.assert_close(gram, torch.eye(min(channels)), atol=1e-5, rtol=0)


def projector(distiller: nn.Module) -> nn.Module:
    return distiller.loss.latent_losses.by_pair[0]["0"].projector


@pytest.mark.parametrize("loss", ["frequency", "fitnets", "attention", "boundary"])
def test_training_brings_latents_closer(loss: str):
    distiller = make(latents=[LatentPair("0", "0", loss=loss)], example={"x": X})
    assert (projector(distiller) is None) == (loss == "attention")
    before = copy.deepcopy(distiller.loss.latent_losses.state_dict())
    (first,) = distiller.step(*batch()).features.values()
    train(distiller, 40)
    (last,) = distiller.step(*batch()).features.values()
    assert last < 0.9 * first
    after = distiller.loss.latent_losses.state_dict()
    assert not any(torch.equal(before[k], after[k]) for k in before if after[k].numel() > 0)


def test_fitting_changes_neither_student_nor_random_state():
    student = net(regularised=True).train()
    student[2].eval()  # a part that its owner froze
    modes = [module.training for module in student.modules()]
    state, random_state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    loss = make_loss(latents=LATENTS)
    assert loss.fit_latents(student, X) is loss
    assert [module.training for module in student.modules()] == modes
    assert same(state.values(), student.state_dict().values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in student.modules())


class Frames(nn.Module):
    """Keeps its latents as ``(batch, frames, channels, nx, ny)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv3d(1, width, 1), nn.Conv3d(width, 1, 1)
        self.latent = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        latent = self.latent(self.encode(x[:, None]).movedim(2, 1))
        return self.decode(latent.movedim(1, 2))[:, 0]


def test_frames_that_a_model_keeps_apart_are_channels():
    teacher, student = Frames(6), Frames(4)
    pair = LatentPair("latent", "latent")
    distiller = make(teacher=teacher, student=student, latents=[pair], example={"x": X})
    assert projector(distiller).linear.weight.shape == (2 * 6, 2 * 4)
    mine, theirs = (
        model.encode(X[:, None]).movedim(2, 1).flatten(1, 2) for model in (student, teacher)
    )
    error = F.mse_loss(projector(distiller)(mine), theirs) / theirs.square().mean()
    torch.testing.assert_close(distiller.step(X).features[pair.name], error.detach())


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_latents_of_two_resolutions_are_compared_on_shared_frequencies(boundary: str):
    def wave(n: int, k: int) -> Tensor:
        at = (torch.arange(n) + (0.5 if boundary == "reflect" else 0)) / n
        return torch.cos((1 if boundary == "reflect" else 2) * math.pi * k * at)[None, None]

    grid, pair = GridTransform((8,), boundary), LatentPair("a", "b")
    loss = LatentLoss(pair, wave(8, 1), wave(16, 1), grid, Bands.split(0.5))
    assert loss.domain.shape == ((7,) if boundary == "periodic" else (8,))
    with torch.no_grad():
        loss.projector.linear.weight.fill_(1)
    # The same function on both grids; what only the finer one has is dropped.
    assert loss(wave(8, 2), wave(16, 2)).item() == pytest.approx(0, abs=1e-10)
    both = wave(16, 2) + 9 * wave(16, 9 if boundary == "reflect" else 5)
    assert loss(wave(8, 2), both).item() == pytest.approx(0, abs=1e-10)
    assert loss(wave(8, 3), wave(16, 2)) > 1


def test_teachers_have_latent_losses_and_averages_of_their_own():
    weighting = AdaptiveWeighting(2)
    pairs = [LatentPair("0", "0", weighting=weighting), LatentPair("0", "3", teacher_index=1)]
    teachers = [teacher_net(), net(6, seed=4)]
    distiller = make(teacher=teachers, latents=pairs, example={"x": X})
    terms = distiller.step(X)
    assert list(terms.features) == ["0<-0", "0<-1.3"]
    losses = distiller.loss.latent_losses.by_pair
    first, second = (loss.loss.loss.weighting.averages for loss in losses[0].values())
    assert not torch.equal(first.error, second.error)
    assert not weighting.averages.error.any()
    outputs = distiller.loss.teacher_outputs(X)
    mine = distiller.student[0](X)
    distiller.eval()  # the averages stay
    each = [loss(mine, outputs[int(i)].latents["0"]) for i, loss in losses[0].items()]
    features = distiller.step(X).features
    torch.testing.assert_close(features["0<-0"], sum(each).detach() / 2)
    (only,) = losses[1].values()
    torch.testing.assert_close(features["0<-1.3"], only(mine, outputs[1].latents["3"]).detach())


def test_float64_models_have_float64_projectors():
    distiller = with_latents(
        teacher=teacher_net().double(), student=net().double(), example={"x": X.double()}
    )
    assert distiller.step(X.double()).total.dtype == torch.float64


test_refusals = refusals(
    (lambda: LatentPair(weight=-1.0), "`LatentPair.weight` is -1.0, expected a finite number"),
    (lambda: LatentPair(loss="fitnet"), r"`LatentPair.loss` is 'fitnet', .* mean 'fitnets'\?"),
    (lambda: LatentPair(teacher_index=-1), "`LatentPair.teacher_index` is -1, expected an int"),
    (
        lambda: LatentPair(loss="boundary", bands=Bands.split(0.5)),
        "`LatentPair` has `bands` or a `weighting` with the loss 'boundary', expected neither",
    ),
    (
        lambda: make(latents=[LatentPair("latent", "0")], example={"x": X}),
        r"`Sequential` has no tap 'latent'; it names \[\]",
    ),
    (
        lambda: make(latents=[LatentPair("0", "0", weighting="confidence")], example={"x": X}),
        "`latents` '0<-0' of teacher 0: `weighting` is a ConfidenceWeighting that needs labels",
    ),
    (
        lambda: make(student=flat(), latents=[ATTENTION], example={"x": X}),
        r"`latents` '0<-0 \(attention\)' of teacher 0: a tapped activation has shape",
    ),
    (lambda: make_loss(latents=LATENTS)(*batch()[::-1]), "call `fit_latents\\(student, x, "),
    (
        lambda: with_latents().loss(*batch()[::-1]),
        "the latents of '0<-0' were not given: expected the student's '0' and each teacher's",
    ),
)


def flat() -> nn.Module:
    size = math.prod(GRID)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * size, 3 * size), nn.Unflatten(1, (3, *GRID)))


def test_outputs_without_or_with_bad_latents_are_refused():
    distiller = with_latents()
    (output,) = distiller.loss.teacher_outputs(X)
    for latents, message in (
        ({"3": output.latents["3"]}, "the latents of '0<-0' were not given"),
        (output.latents | {"3": output.latents["3"] * torch.inf}, "`latent '3' of teacher 0 .*NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            distiller.step(X, outputs=[type(output)(output.forecast, latents)])


def test_latents_of_another_graph_are_refused():
    graph = random_graph()
    pooled = nn.Sequential(nn.Linear(1, 4), nn.AvgPool2d((2, 1)), nn.Upsample(scale_factor=(2, 1)))
    loss = make_loss(
        teacher=GraphLayer(4, seed=1),
        transform=GraphTransform.from_edges(**graph, num_nodes=10),
        latents=[LatentPair("1", "encode")],
    )
    with pytest.raises(ValueError, match=r"`latents` '1<-encode' of teacher 0: .*\b10\b"):
        loss.fit_latents(pooled, random(3, 12, 10, 1), **graph)
