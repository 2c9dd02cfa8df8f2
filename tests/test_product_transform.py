"""Products of a transform and the time axis."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
import torch
from graph_parts import GRAPHS, dense_laplacian, exact, ring
from torch import Tensor
from transform_contract import TIGHT, BasisContract, Domain, Response

from sdkd_plugin import GridTransform
from sdkd_plugin.spectral import ProductTransform


def grid_basis(shape: tuple[int, ...], boundary: str) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns over a grid, complex where it is periodic, and their frequencies."""
    columns, squares = np.ones((1, 1)), np.zeros(1)
    for n in shape:
        wave = np.arange(n) / n if boundary == "reflect" else 2 * np.abs(np.fft.fftfreq(n))
        one = scipy.fft.idct(np.eye(n), axis=0, norm="ortho")
        one = one if boundary == "reflect" else np.fft.ifft(np.eye(n), axis=0, norm="ortho")
        columns, squares = np.kron(columns, one), np.add.outer(squares, wave**2).ravel()
    return columns, np.sqrt(squares / len(shape))


PRODUCTS = {
    "periodic": (lambda: GridTransform((4, 3)), 3, 1, "joint"),
    "reflect": (lambda: GridTransform((4, 3), "reflect"), 3, 2, "joint"),
    "graph": (lambda: exact(GRAPHS["random-mean"]), 4, 1, "joint"),
    "magnetic": (lambda: exact(GRAPHS["magnetic"]), 2, 1, "joint"),
    "time-grid": (lambda: GridTransform((2, 3)), 5, 2, "time"),
    "time-graph": (lambda: exact(ring(3), method="chebyshev"), 6, 1, "time"),
}


class TestProductTransform(BasisContract):
    @pytest.fixture(params=PRODUCTS)
    def domain(self, request: pytest.FixtureRequest, device: torch.device) -> Domain:
        make, frames, variables, over = PRODUCTS[request.param]
        space = make()
        columns, frequency, d = np.ones((1, 1)), np.zeros(1), len(space.domain_axes)
        if over == "joint" and isinstance(space, GridTransform):
            columns, frequency = grid_basis(space.shape, space.boundary)
        elif over == "joint":
            graph = GRAPHS["random-mean" if request.param == "graph" else "magnetic"]
            values, columns = np.linalg.eigh(dense_laplacian(graph, "symmetric"))
            frequency = np.clip(values, 0, None) / values[-1]
        cosines, wave = grid_basis((frames,), "reflect")
        vectors = np.kron(np.kron(cosines, np.eye(variables)), columns)
        wave = np.repeat(wave, variables)
        if over == "joint":
            wave = np.sqrt(np.add.outer(wave**2, d * frequency**2).ravel() / (d + 1))

        def apply(x: np.ndarray, response: Response) -> np.ndarray:
            flat = x.reshape(len(x), -1)
            return (flat @ ((vectors * response(wave)) @ vectors.conj().T).T).reshape(x.shape)

        transform = ProductTransform(space, frames, over=over, variables=variables).to(device)
        real = request.param != "magnetic"
        modes = [vectors[:, i].real.reshape(transform.domain_shape) for i in range(len(wave))]
        return Domain(
            transform,
            apply,
            list(zip(modes, wave, strict=True))
            if real
            else [(np.ones(transform.domain_shape), 0.0)],
        )

    @pytest.fixture
    def make_field(
        self, transform: ProductTransform, device: torch.device
    ) -> Callable[..., Tensor]:
        behind = {"time": [*transform.space.domain_shape], "joint": []}[transform.over]
        behind += [2] if transform.space.channel_axis == -1 else []

        def make(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
            size = (*leading, *transform.domain_shape, *behind)
            generator = torch.Generator().manual_seed(0)
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

        return make


def test_the_product_of_a_ring_and_a_path_has_the_eigenspaces_of_the_grid():
    n, frames = 8, 5
    x = torch.randn(2, frames, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    on_graph = ProductTransform(exact(ring(n)), frames)
    on_grid = ProductTransform(GridTransform((n,)), frames)
    wave = torch.arange(5, dtype=torch.float64) / 4
    for k, f in enumerate(torch.sin(torch.pi * wave / 2) ** 2):  # the ring's eigenvalues
        for t in range(frames):
            both = [((g**2 + (t / frames) ** 2) / 2).sqrt() for g in (f, wave[k])]
            parts = [
                transform.filter(field, lambda g, b=b: (g - b).abs() < 1e-9)
                for transform, field, b in zip(
                    (on_graph, on_grid), (x.unsqueeze(-1), x), both, strict=True
                )
            ]
            torch.testing.assert_close(parts[0].squeeze(-1), parts[1], **TIGHT)


@pytest.mark.usefixtures("as_shipped")
def test_products_refuse_and_are_resized():
    ring_of_70 = exact(ring(70), method="chebyshev")
    for space in (ring_of_70, exact(ring(70), method="low-rank", rank=9)):
        with pytest.raises(ValueError, match=r"no eigenvectors|`space` has no whole basis"):
            ProductTransform(space, 3)
    with pytest.raises(ValueError, match="`over` is 'space', expected one of"):
        ProductTransform(ring_of_70, 3, over="space")
    with pytest.raises(ValueError, match="`frames` is 0, expected an integer"):
        ProductTransform(GridTransform((4,)), 0)
    latent = ProductTransform(GridTransform((8, 8)), 3).resized((16, 4, 4))
    assert latent.domain_shape == (4, 4)  # channels of latents are no frames
    assert ProductTransform(exact(ring(7)), 3).resized((6, 7)).frames == 6
    with pytest.raises(ValueError, match=r"`domain_shape` has shape \(16,\), expected \(3,\)"):
        ProductTransform(GridTransform((8,)), 3, over="time").resized((16,))
