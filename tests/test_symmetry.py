"""Symmetries: the solver commutes with them, groups are closed, a sample stays together."""

import pytest
import torch

from sdkd_plugin.data import Symmetry, navier_stokes_symmetry
from sdkd_plugin.data.navier_stokes import gaussian_random_field
from sdkd_plugin.data.symmetry import _applied
from sdkd_plugin.data.vorticity import solve


@pytest.mark.parametrize("generator", navier_stokes_symmetry().generators)
def test_the_solver_commutes_with_each_generator(generator):
    w = gaussian_random_field(2, 16, generator=0)
    settings = {"viscosity": 1e-3, "duration": 2.0}
    then, first = generator(solve(w, **settings)), solve(generator(w), **settings)
    # To the scheme's rounding, where the field itself moved by a large part of its size.
    torch.testing.assert_close(first, then, rtol=0, atol=1e-11)
    assert float((then[:, -1] - w).abs().max()) > 0.5
    other = solve(generator(w).roll(1, -1), **settings)
    assert float((other - then.roll(1, -1)).abs().max()) > 1e-2  # not every shift is one


def test_all_elements_are_symmetries_and_the_group_is_closed():
    symmetry = navier_stokes_symmetry()
    group = symmetry.elements((8, 8))
    assert len(group) == 4 * 8
    w = gaussian_random_field(1, 8, generator=1).float()
    images = _applied(group, w.expand(len(group), -1, -1), 2)
    settings = {"viscosity": 1e-3, "duration": 1.0}
    moved = _applied(group, solve(w, **settings).expand(len(group), -1, -1, -1), 2)
    torch.testing.assert_close(solve(images, **settings), moved, rtol=0, atol=1e-5)
    known = {tuple(row) for row in group.tolist()}
    for g in group[::5]:
        for h in group[::7]:
            assert tuple((g[h.abs().long() - 1] * h.sign()).tolist()) in known


def test_a_sample_gets_one_element_and_samples_differ():
    symmetry = navier_stokes_symmetry(torch.Generator().manual_seed(0))
    x = torch.randn(1, 3, 8, 8).expand(40, -1, -1, -1)
    seen = x > 0
    moved, twice, flags, flag = symmetry.together(x, 2 * x, seen, seen[:, :1, :1, :1])
    torch.testing.assert_close(twice, 2 * moved)
    assert len({tuple(each.flatten().tolist()) for each in moved}) > 15
    assert flags.dtype == torch.bool
    same_sign = (moved.flatten(1).sum(1) * x.flatten(1).sum(1)) > 0
    assert torch.equal(flags[same_sign], moved[same_sign] > 0)
    assert torch.equal(flags[~same_sign], moved[~same_sign] < 0)
    assert bool(same_sign.any())
    assert not bool(same_sign.all())
    assert torch.equal(flag, seen[:, :1, :1, :1])
    assert symmetry(x).shape == x.shape


def test_one_axis_and_errors():
    ring = Symmetry("ring", [lambda x: x.roll(1, -1), lambda x: -x], axes=1)
    assert len(ring.elements((5,))) == 10
    assert ring(torch.ones(6, 2, 5)).abs().eq(1).all()
    with pytest.raises(ValueError, match="n x n with n a multiple of 4"):
        navier_stokes_symmetry()(torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match="does more on a grid of"):
        Symmetry("no", [lambda x: x + 1])(torch.zeros(1, 1, 4, 4))
    many = Symmetry("many", [lambda x: x.roll(1, 0), lambda x: x[[1, 0, *range(2, 9)]]], axes=1)
    with pytest.raises(ValueError, match="more than 4096 elements"):
        many.elements((9,))
