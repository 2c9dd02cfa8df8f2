"""Derivative matching: linear maps, whose derivatives are known, and what it is for."""

from pathlib import Path

import pytest
import torch
from small import random, random_graph, refusals
from torch import Tensor, nn

from sdkd_plugin import (
    Bands,
    DerivativeMatching,
    DistillationLoss,
    GraphTransform,
    GridTransform,
    SDKDDistiller,
    precompute,
)
from sdkd_plugin.losses.derivatives import random_directions

LINE, BANDS = GridTransform((16,)), Bands.split(0.5)
DOMAINS = {
    "grid": (LINE, (4, 2, 16)),
    "graph": (GraphTransform.from_edges(**random_graph(), num_nodes=10), (4, 3, 10, 2)),
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_directions_lie_in_one_band_with_unit_size(domain: str):
    transform, shape = DOMAINS[domain]
    seen = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        v = random_directions(random(*shape), transform, BANDS, generator)
        assert v.shape == shape
        torch.testing.assert_close(v.square().flatten(1).mean(1), torch.ones(4))
        share = transform.sample_band_energy(v, BANDS).sum(0)
        share = share / share.sum()
        torch.testing.assert_close(share.max(), torch.ones(()))
        seen.add(int(share.argmax()))
    assert seen == {0, 1}


@pytest.mark.parametrize("domain", DOMAINS)
def test_linear_maps_have_the_gain_of_their_difference(domain: str):
    """s - t multiplies the low band by 0.3 and the high one by 0.7: the loss is one of the squares.

    A step's length does not matter, nor do constants.
    """
    transform, shape = DOMAINS[domain]
    x = random(*shape, dtype=torch.float64)

    def response(frequency: Tensor) -> Tensor:
        return torch.where(frequency < 0.5, 0.3, 0.7).to(frequency)

    def student(x: Tensor) -> Tensor:
        return 2 * x + transform.filter(x, response) + 5

    def teacher(x: Tensor) -> Tensor:
        return 2 * x - 1

    found = set()
    for seed in range(8):
        values = []
        for size in (0.01, 1.0):
            matching = DerivativeMatching(3.0, size, torch.Generator().manual_seed(seed))
            given = (x, student(x), teacher(x), transform, BANDS)
            values.append(float(matching(student, teacher, *given)))
        assert values[0] == pytest.approx(values[1])
        found.add(round(values[0] / 3, 6))
    assert found == {0.09, 0.49}


def test_it_is_the_derivative_of_the_student_by_forward_mode():
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 2, 3, padding=1)
    ).double()
    x = random(4, 2, 16, dtype=torch.float64)
    matching = DerivativeMatching(1.0, 1e-6, torch.Generator().manual_seed(3))
    zero = torch.zeros_like(x)
    value = matching(student, torch.zeros_like, x, student(x), zero, LINE, BANDS)
    v = random_directions(x, LINE, BANDS, torch.Generator().manual_seed(3))
    _, tangent = torch.func.jvp(student, (x,), (v,))
    torch.testing.assert_close(value, tangent.square().mean(), rtol=1e-4, atol=0)
    mine = torch.autograd.grad(value, [*student.parameters()][:-1])
    theirs = torch.autograd.grad(tangent.square().mean(), [*student.parameters()][:-1])
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-7)


class Masked(nn.Module):
    """A further input beside x."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return gain * self.net(x)


def test_a_step_adds_it_and_reports_it():
    teachers, student = [Masked(1), Masked(2)], Masked(3)
    x, y, gain = random(4, 1, 16), random(4, 1, 16, seed=1), torch.tensor(2.0)
    options = {"kd_weight": 0.5, "weighting": (1.0, 2.0)}
    plain = SDKDDistiller(teachers, student, LINE, BANDS, **options).step(x, y, gain=gain)
    matching = DerivativeMatching(2.0, generator=torch.Generator().manual_seed(4))
    made = SDKDDistiller(teachers, student, LINE, BANDS, derivatives=matching, **options)
    terms = made.step(x, y, gain=gain)
    v = random_directions(x, LINE, BANDS, torch.Generator().manual_seed(4))

    def linear(model: Masked) -> Tensor:
        return gain * (model.net(v) - model.net.bias[:, None])

    theirs = torch.stack([linear(teacher) for teacher in teachers]).mean(0)
    expected = 2 * (linear(student) - theirs).square().mean()
    torch.testing.assert_close(terms.total, plain.total + 0.5 * expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        terms.scalars()["kd_derivatives"], expected.detach(), rtol=1e-3, atol=0
    )
    terms.total.backward()
    assert all(p.grad is None for teacher in made.loss.teachers for p in teacher.parameters())


def test_few_inputs_teach_a_linear_map_by_its_derivatives():
    """Two inputs fix a map of two dimensions among sixteen; derivatives fix all of them."""
    wrong = {}
    teacher = nn.Conv1d(1, 1, 15, padding=7, padding_mode="circular")
    x, new = torch.ones(2, 1, 16), random(8, 1, 16)
    x[1] = torch.cos(2 * torch.pi * torch.arange(16) / 16)
    for derivatives in (None, DerivativeMatching(1.0, generator=torch.Generator().manual_seed(0))):
        torch.manual_seed(0)
        student = nn.Conv1d(1, 1, 15, padding=7, padding_mode="circular")
        distiller = SDKDDistiller(teacher, student, LINE, derivatives=derivatives)
        optimizer = torch.optim.Adam(student.parameters(), 0.02)
        for _ in range(300):
            optimizer.zero_grad()
            distiller.step(x).total.backward()
            optimizer.step()
        wrong[derivatives is None] = float((student(new) - teacher(new)).square().mean().detach())
    assert wrong[False] < 1e-3 * wrong[True]


def test_stored_answers_are_refused(tmp_path: Path):
    stored = precompute(
        DistillationLoss(nn.Conv1d(1, 1, 1), LINE), [{"x": random(3, 1, 16)}], tmp_path
    )
    with pytest.raises(ValueError, match="`derivatives` is given with stored outputs"):
        SDKDDistiller(stored, nn.Conv1d(1, 1, 1), LINE, derivatives=DerivativeMatching())


test_refusals = refusals(
    ({"weight": 0.0}, "`weight` is 0.0, expected a finite number above 0"),
    ({"size": -1.0}, "`size` is -1.0"),
    of=DerivativeMatching,
)
