"""Fields of two resolutions: cropped, resampled and completed spectra against sums of waves."""

import itertools
import math

import pytest
import torch
from small import random, refusals
from torch import Tensor

from sdkd_plugin import GridTransform
from sdkd_plugin.spectral.crop import (
    complete_frequencies,
    crop_frequencies,
    resample_frequencies,
    shared_grid,
)

SHAPES = [
    ((16,), (24,)),
    ((9,), (16,)),
    ((8, 12), (16, 12)),
    ((8, 15), (12, 9)),
    ((6, 8), (8, 6)),
    ((4, 6, 5), (8, 7, 10)),
    ((5, 6, 8), (6, 6, 12)),
]


def waves(grid: GridTransform, wavenumbers: list, amplitude: float = 1.0) -> Tensor:
    """Waves with phases of their own, at j / n or at the centres of cells."""
    reflect = grid.boundary == "reflect"
    places = [(torch.arange(n).double() + reflect / 2) / n for n in grid.shape]
    mesh = torch.meshgrid(*places, indexing="ij")
    total = torch.zeros(1, *grid.shape, dtype=torch.float64)
    for i, k in enumerate(wavenumbers):
        angles = [math.pi * ki * x for ki, x in zip(k, mesh, strict=True)]
        wave = torch.stack(angles).cos().prod(0) if reflect else torch.cos(2 * sum(angles) + i)
        total += amplitude * math.cos(3 * i) * wave
    return total


def wavenumbers(shape: tuple[int, ...], boundary: str) -> list[tuple[int, ...]]:
    """Those below the highest of a grid's axes."""
    half = [math.ceil(n / 2) for n in shape]
    if boundary == "reflect":
        return list(itertools.product(*map(range, shape)))
    return list(itertools.product(*[range(-h + 1, h) for h in half]))


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_a_band_limited_field_is_one_function_on_all_grids(shapes: tuple, boundary: str):
    grids = [GridTransform(shape, boundary) for shape in shapes]
    shared = shared_grid(*grids)
    coarse = tuple(map(min, *shapes))
    content = wavenumbers(coarse, boundary)
    fields = [waves(grid, content) for grid in grids]
    for i, grid in enumerate(grids):
        cropped = crop_frequencies(fields[i], grid, shared)
        torch.testing.assert_close(cropped, waves(shared, content), atol=1e-11, rtol=0)
        resampled = resample_frequencies(fields[i], grid, grids[1 - i])
        torch.testing.assert_close(resampled, fields[1 - i], atol=1e-11, rtol=0)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_completing_keeps_what_the_other_grid_lacks(shapes: tuple, boundary: str):
    source, target = (GridTransform(shape, boundary) for shape in shapes)
    x, rest = (random(2, *shape, dtype=torch.float64) for shape in shapes)
    there = resample_frequencies(x, source, target)
    back = resample_frequencies(there, target, source)
    torch.testing.assert_close(resample_frequencies(back, source, target), there)
    completed = complete_frequencies(x, rest, source, target)
    torch.testing.assert_close(resample_frequencies(completed, target, source), back)
    known = resample_frequencies(resample_frequencies(rest, target, source), source, target)
    torch.testing.assert_close(completed - there, rest - known)
    assert torch.equal(complete_frequencies(rest, rest, target, target), rest)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_what_only_the_finer_grid_has_is_dropped(boundary: str):
    coarse, fine = GridTransform((8, 6), boundary), GridTransform((12, 16), boundary)
    # Beyond the coarse grid along one axis, or the other.
    beyond = [(5, 1), (-5, 2), (1, 7), (0, 8)] if boundary == "periodic" else [(9, 1), (2, 7)]
    shared = shared_grid(coarse, fine)
    cropped = crop_frequencies(waves(fine, beyond, 3.0), fine, shared)
    assert cropped.abs().max() < 1e-12


def test_the_nyquist_wavenumber_is_kept_only_if_both_axes_have_the_same_size():
    for n in (8, 16):
        grid = GridTransform((n,))
        assert crop_frequencies(waves(grid, [(4,)]), grid, GridTransform((7,))).abs().max() < 1e-12
    coarse, fine = GridTransform((8, 9)), GridTransform((8, 16))
    assert shared_grid(coarse, fine).shape == (8, 9)
    checkers = torch.tensor([1.0, -1.0] * 4).double()[:, None]
    cropped = crop_frequencies(checkers.expand(8, 16), fine, coarse)
    torch.testing.assert_close(cropped, checkers.expand(8, 9))
    assert crop_frequencies(checkers.expand(8, 16), fine, fine).shape == (8, 16)


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_gradients_and_dtypes(boundary: str):
    source, target, other = (GridTransform(n, boundary) for n in ((4, 6), (3, 6), (6, 5)))
    x, rest = (random(1, *n, dtype=torch.float64).requires_grad_() for n in ((4, 6), (6, 5)))
    assert torch.autograd.gradcheck(lambda f: crop_frequencies(f, source, target), x)
    assert torch.autograd.gradcheck(lambda *f: complete_frequencies(*f, source, other), (x, rest))
    assert crop_frequencies(x.bfloat16(), source, target).dtype == torch.bfloat16


test_refusals = refusals(
    (lambda: shared_grid(GridTransform((8,)), GridTransform((8, 8))), "expected as many axes"),
    (
        lambda: shared_grid(GridTransform((8,)), GridTransform((8,), "reflect")),
        "expected as many axes as .* and the boundary 'periodic'",
    ),
    (
        lambda: crop_frequencies(random(1, 8), GridTransform((8,)), GridTransform((9,))),
        "expected a grid no finer than",
    ),
    (
        lambda: crop_frequencies(random(1, 8), GridTransform((8,)), GridTransform((4,))),
        "the Nyquist wavenumber 2 of a coarser even axis is ambiguous; take 3 points",
    ),
)
