"""What transforms on graphs promise besides their contract."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_parts import (
    GRAPHS,
    NORMALIZATIONS,
    TWO,
    Graph,
    dense_laplacian,
    exact,
    random_graph,
    ring,
    torus,
)
from small import medium_precision
from torch import Tensor
from transform_contract import BANDS, TIGHT, BasisContract, Domain, Response, TransformContract

from sdkd_plugin import Bands, GraphTransform, GridTransform
from sdkd_plugin.spectral.chebyshev import MARGIN, band_polynomials


class TestExactGraph(BasisContract):
    @pytest.fixture(
        params=itertools.product(GRAPHS, NORMALIZATIONS), ids=lambda param: "-".join(param)
    )
    def domain(self, request: pytest.FixtureRequest, device: torch.device) -> Domain:
        name, normalization = request.param
        values, vectors = np.linalg.eigh(dense_laplacian(GRAPHS[name], normalization))
        frequency = np.clip(values, 0, None) / max(values[-1], 1e-30)

        def apply(x: np.ndarray, response: Response) -> np.ndarray:
            return x @ ((vectors * response(frequency)) @ vectors.conj().T).T

        # A complex eigenvector is no real field.
        real = not np.iscomplexobj(vectors)
        modes = zip(vectors.T if real else np.ones((1, len(vectors))), frequency, strict=False)
        return Domain(exact(GRAPHS[name], normalization).to(device), apply, list(modes))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("n", [8, 7])
def test_ring_graph_has_the_band_energies_of_the_1d_grid(n: int, normalization: str):
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges = (0.25, 0.5, 0.6)  # two of them frequencies of the even ring, in pairs of eigenvectors
    grid = GridTransform((n,)).band_energy(x, Bands(edges))
    highest = np.sin(np.pi / 2 * (n // 2) / (n / 2)) ** 2
    mapped = tuple(float(np.sin(np.pi / 2 * e) ** 2 / highest) for e in edges)
    graph = exact(ring(n), normalization).band_energy(x.mT, Bands(mapped))
    torch.testing.assert_close(graph, grid, **TIGHT)


@pytest.mark.parametrize("shape", [(4, 6), (4, 4), (5, 3)])
def test_torus_graph_has_the_eigenspaces_of_the_2d_grid(shape: tuple[int, int]):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph, grid = exact(torus(*shape), "combinatorial"), GridTransform(shape)
    kx, ky = (torch.fft.fftfreq(n, dtype=torch.float64) for n in shape)
    ky = ky[: shape[1] // 2 + 1]
    eigenvalues = 4 * torch.sin(torch.pi * kx[:, None]) ** 2 + 4 * torch.sin(torch.pi * ky) ** 2
    eigenvalues = eigenvalues / eigenvalues.max()
    distinct = eigenvalues.flatten().round(decimals=9).unique()
    assert len(distinct) >= 4
    for value in distinct:
        on_grid = grid.filter(x, ((eigenvalues - value).abs() < 1e-8).double())
        on_graph = graph.filter(x.flatten(1).unsqueeze(-1), lambda f, v=value: (f - v).abs() < 1e-8)
        torch.testing.assert_close(on_graph.reshape(x.shape), on_grid, **TIGHT)


@pytest.mark.parametrize("time_last", [False, True], ids=["nodes last", "time last"])
@pytest.mark.parametrize("name", ["random-mean", "isolated", "components"])
def test_two_hard_bands_are_a_projection_with_every_derivative(name: str, time_last: bool):
    transform, bands = exact(GRAPHS[name]), Bands.split(0.3)
    assert transform.projection.saves(bands)
    assert not transform.projection.saves(Bands.split(0.3, 0.1))
    assert not transform.projection.saves(Bands((0.3, 0.6)))
    assert not transform.projection.saves(Bands.split(0.999))
    size = (2, transform.domain_shape[0], 3, 1)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.transpose(1, 2) if time_last else x.transpose(1, 2).contiguous()
    energy = functools.partial(transform.sample_band_energy, bands=bands)
    whole = functools.partial(transform.engine.sample_band_energy, bands=bands)
    torch.testing.assert_close(energy(x), whole(x), **TIGHT)
    weights = torch.tensor([[3.0, 0.5], [1.0, 2.0]], dtype=torch.float64)
    mine, theirs = (
        torch.func.grad(lambda x, e=each: (weights * e(x)).sum())(x) for each in (energy, whole)
    )
    torch.testing.assert_close(mine, theirs, **TIGHT)
    x.requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(energy, (x,), fast_mode=True, check_fwd_over_rev=True)
    batched = torch.func.vmap(energy)(x.detach()[:, None])
    torch.testing.assert_close(batched[:, 0], whole(x.detach()), **TIGHT)
    jacobians = (
        torch.func.vmap(torch.func.jacrev(e))(x.detach()[:, None]) for e in (energy, whole)
    )
    torch.testing.assert_close(*jacobians, **TIGHT)


def test_a_basis_is_checked_in_full_precision():
    with medium_precision():
        GraphTransform.from_edges(ring(200).edge_index, None, 200)


def test_a_small_high_band_is_exact_to_rounding_in_float32():
    """It is no difference of large numbers."""
    transform = GraphTransform.from_edges(ring(60).edge_index, None, 60)
    wave = torch.arange(60, dtype=torch.float64)[:, None] * (2 * torch.pi / 60)
    x = (wave.cos() + 1e-4 * (25 * wave).cos())[None]
    energy = transform.sample_band_energy(x.float(), Bands.split(0.25)).double()
    torch.testing.assert_close(energy, energy.new_tensor([[30.0, 30e-8]]), rtol=3e-3, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", ["random-mean", "random-max", "ring-even", "isolated"])
def test_the_order_of_the_nodes_does_not_count(name: str, normalization: str):
    graph = GRAPHS[name]
    order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(3))
    x = torch.randn(
        2, graph.num_nodes, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    # Node i is now called order[i].
    renamed = graph._replace(edge_index=order[graph.edge_index])
    moved = torch.empty_like(x)
    moved[:, order] = x
    bands = Bands((0.25, 0.5))
    torch.testing.assert_close(
        exact(renamed, normalization).sample_band_energy(moved, bands),
        exact(graph, normalization).sample_band_energy(x, bands),
        **TIGHT,
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_isolated_nodes_are_low_frequency(normalization: str):
    graph = GRAPHS["isolated"]
    transform = exact(graph, normalization)
    x = torch.zeros(1, graph.num_nodes, 1, dtype=torch.float64)
    x[0, -3:, 0] = torch.tensor([1.0, -2.0, 3.0])
    energy = transform.sample_band_energy(x, Bands.split(1e-6))
    torch.testing.assert_close(energy, energy.new_tensor([[14.0, 0.0]]), rtol=0, atol=1e-12)


STAR = Graph(torch.stack([torch.zeros(9, dtype=torch.long), torch.arange(1, 10)]), None, 10)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_constant_has_frequency_zero_exactly(normalization: str):
    for graph in (ring(12), torus(4, 5), random_graph(30, 200), STAR):
        transform = exact(graph, normalization)
        x = torch.ones(1, graph.num_nodes, 1, dtype=torch.float64)
        torch.testing.assert_close(transform.filter(x, lambda f: f == 0), x, **TIGHT)


def test_symmetrization_rules_and_duplicate_edges():
    edges = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 0, 2, 1, 2]])
    weights = torch.tensor([1.0, 2.0, 1.0, 4.0, 4.0, 9.0])  # 0->1 twice, 2->2 a self-loop
    for rule, between_0_and_1 in (("mean", 2.0), ("max", 3.0)):
        transform = GraphTransform.from_edges(
            edges,
            weights,
            3,
            normalization="combinatorial",
            symmetrization=rule,
            dtype=torch.float64,
        )
        w = between_0_and_1
        laplacian = torch.tensor([[w, -w, 0], [-w, w + 4, -4], [0, -4, 4]], dtype=torch.float64)
        highest = torch.linalg.eigvalsh(laplacian)[-1]
        x = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(
            transform.filter(x, lambda f, h=highest: f * h), laplacian, **TIGHT
        )
    GraphTransform.from_edges(TWO, torch.ones(2), 2, symmetrization="refuse")
    for graph in ((edges, weights, 3), (TWO[:, :1], torch.tensor([1e-8]), 2)):
        with pytest.raises(ValueError, match="directed graph: choose symmetrization='mean', 'max'"):
            GraphTransform.from_edges(*graph, symmetrization="refuse")


class TestLowRankGraph(TransformContract):
    @pytest.fixture(params=["mean", "magnetic"])
    def transform(self, request: pytest.FixtureRequest, device: torch.device) -> GraphTransform:
        graph = random_graph(24, 60, request.param, isolated=1)
        return exact(graph, method="low-rank", rank=22).to(device)

    def response(self, frequency: Tensor) -> Tensor:
        return 1 / (1 + frequency.clamp(max=0.72))  # the lowest frequency that all keep


class TestChebyshevGraph(TransformContract):
    @pytest.fixture(params=itertools.product(["mean", "magnetic"], NORMALIZATIONS), ids="-".join)
    def transform(self, request: pytest.FixtureRequest, device: torch.device) -> GraphTransform:
        rule, normalization = request.param
        graph = random_graph(14, 30, rule, isolated=2)
        return exact(graph, normalization, method="chebyshev", tolerance=0.05).to(device)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("rule", ["mean", "magnetic"])
def test_the_engines_agree(normalization: str, rule: str):
    graph = random_graph(150, 500, rule, isolated=1)
    known = exact(graph, normalization)
    low = exact(graph, normalization, method="low-rank", rank=60)
    x = torch.randn(3, 151, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(low.frequencies, known.frequencies[:60], **TIGHT)
    bands = Bands((0.3 * float(low.frequencies[-1]), 0.9 * float(low.frequencies[-1])))
    expected = known.sample_band_energy(x, bands)
    torch.testing.assert_close(low.sample_band_energy(x, bands), expected, **TIGHT)
    with pytest.raises(ValueError, match=r"`bands` reach up to 0.9, expected edges up to"):
        low.sample_band_energy(x, Bands.split(0.9))
    with pytest.raises(ValueError, match=r"`response` differs between frequencies"):
        low.filter(x, lambda f: f)
    for bands in (Bands.split(0.3, 0.2), Bands((0.2, 0.6), 0.3)):
        expected = known.sample_band_energy(x, bands)
        for tolerance in (0.03, 0.003):
            fast = exact(graph, normalization, method="chebyshev", tolerance=tolerance)
            energy = fast.sample_band_energy(x, bands)
            total = expected.sum(1, keepdim=True)
            assert float(((energy - expected).abs() / total).max()) < tolerance / 2
            response = lambda f: 1 / (1 + 5 * f)  # noqa: E731
            error = fast.filter(x, response) - known.filter(x, response)
            assert float(error.norm() / x.norm()) < tolerance
    for transform, method in ((known, "exact"), (low, "low-rank"), (fast, "chebyshev")):
        assert f"method='{method}'" in repr(transform)


def test_chebyshev_weights_are_within_their_tolerance():
    frequency = (1 + MARGIN) * (1 + torch.linspace(0, torch.pi, 999, dtype=torch.float64).cos()) / 2
    angle = (2 * frequency / (1 + MARGIN) - 1).acos()
    for bands in (Bands.split(0.25, 0.2), Bands((0.1, 0.5, 0.7), 0.2), Bands.split(0.25)):
        exact_weights = bands(frequency)[:-1]
        outside = frequency <= 1
        if bands.transition == 0:  # a quarter of 0.25 x 0.75 on either side
            outside &= (frequency - 0.25).abs() > 0.047
        for tolerance in (0.03, 0.01):
            c = band_polynomials(bands, tolerance)
            weights = c @ (torch.arange(c.shape[1])[:, None] * angle).cos()
            assert weights.min() >= -1e-9
            assert weights.sum(0).max() <= 1 + 1e-9
            assert (weights - exact_weights)[:, outside].abs().max() <= 1.02 * tolerance
    with pytest.raises(ValueError, match="expected wider edges"):
        band_polynomials(Bands.split(0.25), 1e-9)
    graph = exact(ring(70), method="chebyshev")
    with pytest.raises(ValueError, match="`response` is too steep"):
        graph.filter(torch.ones(1, 70, 1), lambda f: f > 0.5)


def test_a_directed_ring_under_the_magnetic_laplacian_has_the_fourier_modes():
    n, edges = 12, (0.31, 0.62)
    graph = ring(n)._replace(symmetrization="magnetic")
    transform = exact(graph, potential=0.05)
    wave = torch.fft.fftfreq(n, dtype=torch.float64)
    eigenvalue = 1 - torch.cos(2 * torch.pi * (wave - 0.05))
    eigenvalue[0] = 0  # the mean is taken out
    frequency = eigenvalue / eigenvalue.max()
    torch.testing.assert_close(transform.frequencies, frequency.sort().values, **TIGHT)
    assert len(transform.frequencies.unique()) == n  # both directions of a wave are told apart
    x = torch.randn(3, n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power = torch.fft.fft(x[..., 0], norm="ortho").abs().square()
    expected = power @ Bands(edges)(frequency).mT
    torch.testing.assert_close(transform.sample_band_energy(x, Bands(edges)), expected, **TIGHT)


def test_a_basis_is_kept_on_disk_and_broken_files_are_replaced(tmp_path: Path, monkeypatch):
    graph = random_graph(40, 120)
    first = exact(graph, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("computed again"))
    again = exact(graph, cache=tmp_path)
    assert torch.equal(again.eigenvectors, first.eigenvectors)
    assert torch.equal(again.frequencies, first.frequencies)
    monkeypatch.undo()
    whole = file.read_bytes()
    exact(random_graph(41, 120), cache=tmp_path)
    other = next(path for path in tmp_path.iterdir() if path != file).read_bytes()
    for content in (whole[:100], other, b""):
        file.write_bytes(content)
        assert torch.equal(exact(graph, cache=tmp_path).eigenvectors, first.eigenvectors)
        assert file.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_size_chooses_the_engine():
    n = 4100
    assert GraphTransform.from_edges(ring(n).edge_index, None, n).method == "chebyshev"
    assert GraphTransform.from_edges(TWO, None, np.int64(2)).method == "exact"
    with pytest.raises(ValueError, match="no eigenvectors"):
        GraphTransform.from_edges(ring(n).edge_index, None, n).spectrum(torch.ones(1, n, 1))


def test_a_graph_kept_in_float32_is_exact_to_float32():
    graph = random_graph(40, 300)
    x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    kept = GraphTransform.from_edges(graph.edge_index, graph.edge_weight, 40)
    assert kept.eigenvectors.dtype == torch.float32
    torch.testing.assert_close(
        kept.sample_band_energy(x, BANDS[0]).double(),
        exact(graph).sample_band_energy(x.double(), BANDS[0]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((TWO, None, 0), {}, r"`num_nodes` is 0, expected an integer of at least 1"),
        ((TWO, None, 2.0), {}, r"`num_nodes` is 2.0, expected an integer of at least 1"),
        ((TWO, None, 16_001), {"method": "exact"}, r"`num_nodes` is 16001, expected at most 16000"),
        ((TWO.float(), None, 2), {}, r"`edge_index` is of torch.float32, expected integers"),
        ((TWO[:1], None, 2), {}, r"`edge_index` has shape \(1, 2\), expected \(2, edges\)"),
        ((TWO, torch.ones(3), 2), {}, r"`edge_weight` has shape \(3,\), expected \(2,\)"),
        ((TWO, torch.tensor([1, torch.nan]), 2), {}, r"`edge_weight` has 1 of 2 values.*NaN"),
        (
            (TWO, torch.tensor([1, -2.0]), 2),
            {},
            r"`edge_weight` goes down to -2, expected none below 0",
        ),
        ((TWO + 1, None, 2), {}, r"`edge_index` has nodes 1 to 2, expected 0 to 1"),
        ((TWO - 1, None, 2), {}, r"`edge_index` has nodes -1 to 0, expected 0 to 1"),
        ((TWO, None, 2), {"normalization": "sym"}, r"`normalization` is 'sym', expected one of"),
        ((TWO, None, 2), {"symmetrization": "min"}, r"`symmetrization` is 'min', expected one of"),
        ((TWO, None, 2), {"method": "lanczos"}, r"`method` is 'lanczos', expected one of"),
        ((TWO, None, 2), {"method": "low-rank"}, r"`rank` is 256, expected .* fewer than 1"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_graph_refuses(arguments: tuple, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GraphTransform.from_edges(*arguments, **options)


@pytest.mark.parametrize(
    ("eigenvectors", "eigenvalues", "message"),
    [
        (torch.eye(3)[:, :2], torch.zeros(2), r"`eigenvectors` has shape \(3, 2\)"),
        (2 * torch.eye(2), torch.zeros(2), r"`eigenvectors` has columns that are not orthonormal"),
        (
            torch.eye(2),
            torch.tensor([-1.0, 1.0]),
            r"`eigenvalues` goes down to -1, expected none below 0",
        ),
        (torch.eye(2), torch.tensor([0.0, torch.nan]), r"`eigenvalues` has 1 of 2 values"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_graph_refuses_a_bad_basis(eigenvectors: Tensor, eigenvalues: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        GraphTransform(eigenvectors, eigenvalues)


def test_a_graph_has_one_size():
    with pytest.raises(ValueError, match=r"expected \(8,\) \(the only size"):
        exact(ring(8)).resized((9,))
