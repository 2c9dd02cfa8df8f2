"""What transforms on grids promise besides their contract; compilation of all."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.fft
import torch
from transform_contract import BasisContract, Domain, Response

from sdkd_plugin import Bands, GridTransform
from sdkd_plugin.spectral import grid

SHAPES = [(8,), (7,), (4, 6), (5, 7), (5, 4), (1, 6), (4, 2, 6), (3, 4, 5)]
GRIDS = [(shape, boundary, 128) for boundary in ("periodic", "reflect") for shape in SHAPES]
GRIDS += [(shape, "reflect", 0) for shape in SHAPES]


def grid_filter(
    shape: tuple[int, ...], boundary: str
) -> Callable[[np.ndarray, Response], np.ndarray]:
    axes = tuple(range(1, 1 + len(shape)))
    if boundary == "periodic":
        relative = [np.abs(np.fft.fftfreq(n)) / 0.5 for n in shape]
    else:
        relative = [np.arange(n) / n for n in shape]
    squares = [k**2 for k in np.meshgrid(*relative, indexing="ij")]
    frequency = np.sqrt(sum(squares) / len(shape))

    def apply(x: np.ndarray, response: Response) -> np.ndarray:
        if boundary == "periodic":
            return np.fft.ifftn(np.fft.fftn(x, axes=axes) * response(frequency), axes=axes).real
        coefficients = scipy.fft.dctn(x, axes=axes, norm="ortho")
        return scipy.fft.idctn(coefficients * response(frequency), axes=axes, norm="ortho")

    return apply


def grid_modes(shape: tuple[int, ...], boundary: str) -> Iterator[tuple[np.ndarray, float]]:
    places = np.meshgrid(*map(np.arange, shape), indexing="ij")
    largest = [n // 2 if boundary == "periodic" else n - 1 for n in shape]
    for k in itertools.product(*(range(m + 1) for m in largest)):
        waves = list(zip(k, places, shape, strict=True))
        if boundary == "periodic":
            mode = np.cos(0.3 + sum(2 * np.pi * ki * p / n for ki, p, n in waves))
            relative = [ki / (n / 2) for ki, _, n in waves]
        else:
            mode = np.prod([np.cos(np.pi * ki * (p + 0.5) / n) for ki, p, n in waves], axis=0)
            relative = [ki / n for ki, _, n in waves]
        yield mode, float(np.sqrt(np.mean(np.square(relative))))


class TestGridTransform(BasisContract):
    @pytest.fixture(params=GRIDS, ids=lambda p: f"{p[1]}-{'x'.join(map(str, p[0]))}-{p[2]}")
    def domain(
        self,
        request: pytest.FixtureRequest,
        device: torch.device,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Domain:
        shape, boundary, by_matrix = request.param
        monkeypatch.setattr(grid, "BY_MATRIX", by_matrix)
        transform = GridTransform(shape, boundary).to(device)
        return Domain(transform, grid_filter(shape, boundary), list(grid_modes(shape, boundary)))


def test_grid_frequencies_are_those_documented():
    even = GridTransform((4, 4)).frequencies
    assert even.shape == (4, 3)
    assert even[2, 2] == 1  # the corner
    assert float(even[0, 1]) == pytest.approx(np.sqrt((1 / 2) ** 2 / 2))
    odd = GridTransform((5,)).frequencies
    assert odd.tolist() == pytest.approx([0, 0.4, 0.8])
    assert GridTransform((4,), "reflect").frequencies.tolist() == [0, 0.25, 0.5, 0.75]


def test_grid_multiplicity_counts_the_mean_and_an_even_nyquist_once():
    assert GridTransform((6,)).multiplicity.tolist() == [1, 2, 2, 1]
    assert GridTransform((7,)).multiplicity.tolist() == [1, 2, 2, 2]
    assert GridTransform((1,)).multiplicity.tolist() == [1]
    assert GridTransform((3,), "reflect").multiplicity.tolist() == [1, 1, 1]


def test_a_ramp_is_low_frequency_only_where_its_ends_do_not_meet():
    ramp = torch.linspace(-1, 1, 64).reshape(1, 1, 64)
    high = {
        boundary: float(GridTransform((64,), boundary).band_energy(ramp, Bands.split(0.25))[..., 1])
        for boundary in ("periodic", "reflect")
    }
    assert high["reflect"] < 0.01 * high["periodic"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), r"`shape` is \(\), expected one to three sizes"),
        (((2, 2, 2, 2),), r"`shape` is \(2, 2, 2, 2\), expected one to three sizes"),
        (((4, 0),), r"`shape` is 0, expected an integer of at least 1"),
        (((4.0,),), r"`shape` is 4.0, expected an integer"),
        (((4,), "periodical"), r"`boundary` is 'periodical'.*Did you mean 'periodic'"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_grid_refuses(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        GridTransform(*arguments)


COMPILED = """
import torch
from sdkd_plugin import Bands, GraphTransform, GridTransform
bands, weights = Bands.split(0.3), torch.tensor([0.5, 2.0])
for transform, *size in (
    (GridTransform((6, 5)), 2, 3, 6, 5),
    (GridTransform((6, 5), "reflect"), 2, 3, 6, 5),
    (GridTransform((6, 129), "reflect"), 2, 3, 6, 129),
    (GraphTransform.from_edges(torch.tensor([[0, 1, 2], [1, 2, 0]]), None, 3), 2, 4, 3, 1),
):
    loss = lambda x: (transform.sample_band_energy(x, bands) @ weights).sum()
    x = torch.randn(size, requires_grad=True)
    calls = torch.compile(loss, fullgraph=True, backend="aot_eager"), loss
    torch.testing.assert_close(*(torch.autograd.grad(call(x), x)[0] for call in calls))
"""


def test_energies_and_gradients_compile_to_one_graph():
    # Apart from pytest, whose type checks cannot be traced.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=120)
