"""What every transform promises, inherited by each; then what grids and graphs promise alone.

A new transform subclasses `TransformContract` and writes two fixtures, `domain` and `make_field`.
References are numpy and scipy in float64, share no code with ours, and rebuild band images.
"""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from sdkd_plugin import Bands, GraphTransform, GridTransform
from sdkd_plugin.spectral import AbstractBasisTransform
from sdkd_plugin.spectral.graph import MAX_EXACT_NODES, adjacency_matrix

Response = Callable[[np.ndarray], np.ndarray]

EDGES = (0.31, 0.62)  # no small domain has a frequency there
BANDS = [Bands(EDGES), Bands(EDGES, transition=0.2)]
BAND_IDS = ["hard", "smooth"]
TIGHT = dict(rtol=1e-10, atol=1e-10)


class Domain(NamedTuple):
    """A transform, exact in float64, and what is known about its domain without it.

    ``filter(x, response)`` is ``g(L) x`` for a field without channels, ``(fields, *domain_shape)``;
    ``modes`` are pure fields ``domain_shape`` and their frequencies.
    """

    transform: AbstractBasisTransform
    filter: Callable[[np.ndarray, Response], np.ndarray]
    modes: list[tuple[np.ndarray, float]]


MakeField = Callable[..., Tensor]


def raised_cosine_weights(frequency: np.ndarray, bands: Bands) -> np.ndarray:
    """Power weights of bands, written anew."""

    def step(edge: float) -> np.ndarray:
        if bands.transition == 0:
            return np.where(frequency >= edge, 1.0, 0.0)
        ramp = np.clip((frequency - edge) / bands.transition + 0.5, 0, 1)
        return 0.5 - 0.5 * np.cos(np.pi * ramp)

    steps = [np.ones_like(frequency), *map(step, bands.edges), np.zeros_like(frequency)]
    return np.stack([low - high for low, high in itertools.pairwise(steps)])


def without_channels(x: Tensor, transform: AbstractBasisTransform) -> np.ndarray:
    """All fields of a tensor, one after the other: ``(fields, *domain_shape)``."""
    n = len(transform.domain_axes)
    last = x.detach().cpu().double().movedim(transform.domain_axes, tuple(range(-n, 0)))
    return last.reshape(-1, *transform.domain_shape).numpy()


class TransformContract:
    """What `SDKDDistiller` and the losses rely on, whatever the domain."""

    @pytest.fixture
    def domain(self, device: torch.device) -> Domain:
        raise NotImplementedError

    @pytest.fixture
    def make_field(self, domain: Domain, device: torch.device) -> MakeField:
        """``make_field(*leading, dtype=...)``, random numbers on the domain."""
        raise NotImplementedError

    def test_round_trip(self, domain: Domain, make_field: MakeField):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            x = make_field(2, 3, dtype=dtype)
            back = domain.transform.inverse(domain.transform(x))
            torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)

    def test_parseval(self, domain: Domain, make_field: MakeField):
        x = make_field(2, 3)
        transform = domain.transform
        n = len(transform.domain_axes)
        c = transform(x).movedim(transform.domain_axes, tuple(range(-n, 0)))
        energy = (transform.multiplicity * c.abs().square()).sum()
        torch.testing.assert_close(energy, x.square().sum(), **TIGHT)

    def test_frequencies_reach_from_the_mean_to_at_most_one(self, domain: Domain):
        frequencies = domain.transform.frequencies
        assert frequencies.dtype == torch.float64
        assert frequencies.min() == 0
        assert frequencies.max() <= 1

    def test_a_pure_field_falls_into_exactly_one_band(self, domain: Domain, device: torch.device):
        bands = Bands(tuple(i / 16 for i in range(1, 16)))
        fields = torch.from_numpy(np.stack([mode for mode, _ in domain.modes])).to(device)
        x = fields.unsqueeze(domain.transform.channel_axis)
        energy = domain.transform.sample_band_energy(x, bands)
        share = energy / energy.sum(1, keepdim=True)
        frequencies = np.array([frequency for _, frequency in domain.modes])
        # A frequency on an edge belongs to the band above it.
        expected = np.searchsorted(bands.edges, frequencies + 1e-9, side="right")
        wanted = torch.nn.functional.one_hot(torch.from_numpy(expected), bands.n_bands)
        torch.testing.assert_close(share, wanted.to(share), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("bands", BANDS, ids=BAND_IDS)
    def test_band_energy_is_that_of_rebuilt_band_images(
        self, domain: Domain, make_field: MakeField, bands: Bands
    ):
        x = make_field(2, 3)
        transform = domain.transform
        images = [
            domain.filter(
                without_channels(x, transform),
                lambda f, i=i: np.sqrt(raised_cosine_weights(f, bands)[i]),
            )
            for i in range(bands.n_bands)
        ]
        axes = tuple(range(1, 1 + len(transform.domain_shape)))
        expected = np.stack([(image**2).sum(axes) for image in images], -1)
        actual = transform.band_energy(x, bands)
        np.testing.assert_allclose(
            actual.cpu().reshape(-1, bands.n_bands), expected, rtol=1e-10, atol=1e-10
        )
        a_sample = transform.sample_band_energy(x, bands)
        torch.testing.assert_close(a_sample, actual.flatten(1, -2).sum(1), **TIGHT)

    @pytest.mark.parametrize("bands", BANDS, ids=BAND_IDS)
    def test_gradient_is_twice_the_filtered_field(
        self, domain: Domain, make_field: MakeField, bands: Bands
    ):
        weights = np.array([3.0, 0.5, 2.0])
        x = make_field(2, 3).requires_grad_()
        energy = domain.transform.sample_band_energy(x, bands)
        (energy @ torch.from_numpy(weights).to(x)).sum().backward()
        expected = 2 * domain.filter(
            without_channels(x, domain.transform),
            lambda f: np.tensordot(weights, raised_cosine_weights(f, bands), 1),
        )
        actual = without_channels(x.grad, domain.transform)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)

    def test_partitions_are_not_mixed_up(self, domain: Domain, make_field: MakeField):
        x, transform = make_field(2, 3), domain.transform
        for bands in (*BANDS, Bands.split(0.5), BANDS[0]):
            fresh = copy.deepcopy(domain.transform).masks(bands, x)
            assert torch.equal(transform.masks(bands, x), fresh)
            assert torch.equal(transform.masks(bands, x.float()), fresh.float())
            torch.testing.assert_close(fresh, bands(transform.frequencies), **TIGHT)

    def test_filter_is_the_response_times_each_frequency(
        self, domain: Domain, make_field: MakeField
    ):
        x = make_field(2, 3)
        actual = domain.transform.filter(x, lambda f: 1 / (1 + 5 * f))
        expected = domain.filter(without_channels(x, domain.transform), lambda f: 1 / (1 + 5 * f))
        np.testing.assert_allclose(
            without_channels(actual, domain.transform), expected, rtol=1e-10, atol=1e-10
        )
        values = 1 / (1 + 5 * domain.transform.frequencies)
        torch.testing.assert_close(domain.transform.filter(x, values), actual, **TIGHT)

    def test_spectrum_sums_to_the_mean_square(self, domain: Domain, make_field: MakeField):
        x = make_field(2, 3)
        frequencies, energy = domain.transform.spectrum(x)
        assert frequencies.shape == energy.shape
        torch.testing.assert_close(energy.sum(), x.square().mean(), **TIGHT)
        low = energy[frequencies < EDGES[0]].sum() * x.numel()
        expected = domain.transform.band_energy(x, BANDS[0])[..., 0].sum()
        torch.testing.assert_close(low, expected, **TIGHT)

    @pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 1, 3)])
    def test_leading_axes_are_kept(
        self, domain: Domain, make_field: MakeField, leading: tuple[int, ...]
    ):
        x, transform = make_field(*leading), domain.transform
        assert transform.filter(x, torch.ones_like).shape == x.shape
        others = [n for a, n in enumerate(x.shape, -x.ndim) if a not in transform.domain_axes]
        energy = transform.band_energy(x, BANDS[0])
        assert energy.shape == (*others, 3)
        flat = transform.band_energy(x.flatten(0, len(leading) - 1), BANDS[0])
        torch.testing.assert_close(energy.flatten(0, -2), flat.flatten(0, -2), **TIGHT)

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    def test_dtype_and_device_are_kept_and_halves_are_computed_in_float32(
        self, domain: Domain, make_field: MakeField, dtype: torch.dtype, autocast: bool
    ):
        x = make_field(2, 3, dtype=dtype).requires_grad_()
        transform = domain.transform
        working = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            energy = transform.sample_band_energy(x, BANDS[0])
            filtered = transform.filter(x, lambda f: 1 / (1 + f))
        assert (energy.dtype, energy.device) == (working, x.device)
        assert (filtered.dtype, filtered.device) == (dtype, x.device)
        exact = x.detach().double()
        tolerance = dict(rtol=1e-10, atol=1e-10) if working == torch.float64 else dict(rtol=2e-5)
        tolerance.setdefault("atol", 2e-5)
        torch.testing.assert_close(
            energy.double(), transform.sample_band_energy(exact, BANDS[0]), **tolerance
        )
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(
            filtered.double(),
            transform.filter(exact, lambda f: 1 / (1 + f)),
            rtol=max(rounding, 2e-5),
            atol=max(rounding, 2e-5),
        )
        energy.sum().backward()
        assert (x.grad.dtype, x.grad.device) == (dtype, x.device)
        torch.testing.assert_close(x.grad.double(), 2 * exact, rtol=2 * rounding + 2e-5, atol=1e-4)

    def test_gradcheck(self, domain: Domain, make_field: MakeField):
        x = make_field(2, 1).requires_grad_()
        energy = lambda x: domain.transform.sample_band_energy(x, BANDS[1])  # noqa: E731
        filtered = lambda x: domain.transform.filter(x, lambda f: 1 / (1 + f))  # noqa: E731
        assert torch.autograd.gradcheck(energy, (x,), fast_mode=True)
        assert torch.autograd.gradcheck(filtered, (x,), fast_mode=True)

    def test_casting_the_module_leaves_the_frequencies_exact(
        self, domain: Domain, make_field: MakeField
    ):
        x = make_field(2, 3)
        expected = domain.transform.sample_band_energy(x, BANDS[0])
        cast = copy.deepcopy(domain.transform).to(torch.bfloat16).float().half()
        assert torch.equal(cast.frequencies, domain.transform.frequencies)
        assert torch.equal(cast.sample_band_energy(x, BANDS[0]), expected)

    def test_trains_after_a_first_use_in_inference_mode(
        self, domain: Domain, make_field: MakeField
    ):
        x = make_field(2, 3)
        with torch.inference_mode():
            domain.transform.sample_band_energy(x, BANDS[0])
        domain.transform.sample_band_energy(x.requires_grad_(), BANDS[0]).sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach(), **TIGHT)

    def test_pickles_and_copies(self, domain: Domain, make_field: MakeField):
        x = make_field(2, 3)
        expected = domain.transform.sample_band_energy(x, BANDS[0])
        for twin in (
            copy.deepcopy(domain.transform),
            pickle.loads(pickle.dumps(domain.transform)),  # noqa: S301
        ):
            assert torch.equal(twin.sample_band_energy(x, BANDS[0]), expected)
        assert not domain.transform.state_dict()

    def test_the_field_given_is_not_changed(self, domain: Domain, make_field: MakeField):
        x = make_field(2, 3)
        before = x.clone()
        domain.transform.inverse(domain.transform(x))
        domain.transform.sample_band_energy(x, BANDS[0])
        domain.transform.filter(x, torch.zeros_like)
        assert torch.equal(x, before)

    def test_resized_to_its_own_size_is_the_same(self, domain: Domain, make_field: MakeField):
        x, transform = make_field(2, 3), domain.transform
        twin = transform.resized(transform.domain_shape).to(x.device)
        torch.testing.assert_close(
            twin.sample_band_energy(x, BANDS[0]), transform.sample_band_energy(x, BANDS[0])
        )

    @pytest.mark.usefixtures("as_shipped")
    def test_refuses_fields_off_the_domain(
        self, domain: Domain, make_field: MakeField, device: torch.device
    ):
        transform = domain.transform
        x = make_field(2, 3)
        axis = transform.domain_axes[0]
        longer = torch.cat([x, x], axis)
        for call in (
            transform,
            lambda x: transform.sample_band_energy(x, BANDS[0]),
            lambda x: transform.band_energy(x, BANDS[0]),
            lambda x: transform.filter(x, torch.ones_like),
            transform.spectrum,
        ):
            with pytest.raises(ValueError, match=r"a field has shape .* expected .* along axes"):
                call(longer)
            with pytest.raises(ValueError, match=r"a field is of torch.int64, expected floating"):
                call(x.long())
        bare = torch.ones(transform.domain_shape + (1,) * (-transform.domain_axes[-1] - 1))
        with pytest.raises(ValueError, match="expected a batch axis before its domain"):
            transform.sample_band_energy(bare.to(device), BANDS[0])
        with pytest.raises(ValueError, match=r"`response` has shape \(1, 2, 3, 4\), expected that"):
            transform.filter(x, torch.ones(1, 2, 3, 4, device=device))


# ------------------------------------------------------------------------------------------ grids

SHAPES = [(8,), (7,), (4, 6), (5, 7), (5, 4), (1, 6), (4, 2, 6), (3, 4, 5)]
GRIDS = [(shape, boundary) for boundary in ("periodic", "reflect") for shape in SHAPES]


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


class TestGridTransform(TransformContract):
    @pytest.fixture(params=GRIDS, ids=lambda p: f"{p[1]}-{'x'.join(map(str, p[0]))}")
    def domain(self, request: pytest.FixtureRequest, device: torch.device) -> Domain:
        shape, boundary = request.param
        transform = GridTransform(shape, boundary).to(device)
        return Domain(transform, grid_filter(shape, boundary), list(grid_modes(shape, boundary)))

    @pytest.fixture
    def make_field(self, domain: Domain, device: torch.device) -> MakeField:
        def make(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
            size = (*leading, *domain.transform.domain_shape)
            x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            return x.to(device, dtype)

        return make


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


# ----------------------------------------------------------------------------------------- graphs


class Graph(NamedTuple):
    edge_index: Tensor
    edge_weight: Tensor | None
    num_nodes: int
    symmetrization: str = "mean"


def ring(n: int) -> Graph:
    nodes = torch.arange(n)
    return Graph(torch.stack([nodes, (nodes + 1) % n]), None, n)


def torus(nx: int, ny: int) -> Graph:
    node = torch.arange(nx * ny).reshape(nx, ny)
    right, down = node.roll(-1, 1), node.roll(-1, 0)
    pairs = [torch.stack([node.flatten(), other.flatten()]) for other in (right, down)]
    return Graph(torch.cat(pairs, 1), None, nx * ny)


def random_graph(n: int, n_edges: int, symmetrization: str = "mean", isolated: int = 0) -> Graph:
    generator = torch.Generator().manual_seed(1)
    edge_index = torch.randint(0, n, (2, n_edges), generator=generator)
    edge_weight = torch.rand(n_edges, generator=generator, dtype=torch.float64) + 0.1
    return Graph(edge_index, edge_weight, n + isolated, symmetrization)


GRAPHS = {
    "random-mean": random_graph(11, 40),
    "random-max": random_graph(11, 40, "max"),
    "ring-even": ring(8),
    "ring-odd": ring(7),
    "torus": torus(4, 5),
    "isolated": random_graph(9, 30, isolated=3),
    "components": Graph(torch.tensor([[0, 1, 3, 4], [1, 2, 4, 5]]), None, 6),
    "without-edges": Graph(torch.empty(2, 0, dtype=torch.long), None, 3),
}
NORMALIZATIONS = ["symmetric", "combinatorial"]


def dense_laplacian(graph: Graph, normalization: str) -> np.ndarray:
    """The Laplacian as documented, edge by edge."""
    n = graph.num_nodes
    directed = np.zeros((n, n))
    for e, (source, target) in enumerate(graph.edge_index.T.tolist()):
        if source != target:
            directed[source, target] += 1 if graph.edge_weight is None else graph.edge_weight[e]
    if graph.symmetrization == "max":
        weights = np.maximum(directed, directed.T)
    else:
        weights = (directed + directed.T) / 2
    degree = weights.sum(1)
    laplacian = np.diag(degree) - weights
    if normalization == "symmetric":
        scale = np.where(degree > 0, degree, 1) ** -0.5
        laplacian = scale[:, None] * laplacian * scale
    return laplacian


def exact(graph: Graph, normalization: str = "symmetric") -> GraphTransform:
    return GraphTransform.from_edges(
        graph.edge_index,
        graph.edge_weight,
        graph.num_nodes,
        normalization=normalization,
        symmetrization=graph.symmetrization,
        dtype=torch.float64,
    )


class TestGraphTransform(TransformContract):
    @pytest.fixture(
        params=itertools.product(GRAPHS, NORMALIZATIONS), ids=lambda param: "-".join(param)
    )
    def domain(self, request: pytest.FixtureRequest, device: torch.device) -> Domain:
        name, normalization = request.param
        values, vectors = np.linalg.eigh(dense_laplacian(GRAPHS[name], normalization))
        frequency = np.clip(values, 0, None) / max(values[-1], 1e-30)

        def apply(x: np.ndarray, response: Response) -> np.ndarray:
            return x @ (vectors * response(frequency)) @ vectors.T

        return Domain(
            exact(GRAPHS[name], normalization).to(device),
            apply,
            list(zip(vectors.T, frequency.tolist(), strict=True)),
        )

    @pytest.fixture
    def make_field(self, domain: Domain, device: torch.device) -> MakeField:
        def make(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
            size = (*leading, *domain.transform.domain_shape, 2)
            x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            return x.to(device, dtype)

        return make


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


def test_a_constant_has_frequency_zero_exactly():
    for graph in (ring(12), torus(4, 5), random_graph(30, 200)):
        transform = exact(graph, "combinatorial")
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
        expected = torch.tensor([[0, w, 0], [w, 0, 4], [0, 4, 0]], dtype=torch.float64)
        adjacency = adjacency_matrix(edges, weights, 3, rule).toarray()
        torch.testing.assert_close(torch.from_numpy(adjacency), expected, **TIGHT)
    both_ways = torch.tensor([[0, 1], [1, 0]])
    GraphTransform.from_edges(both_ways, torch.ones(2), 2, symmetrization="refuse")
    with pytest.raises(ValueError, match="directed graph: choose symmetrization='mean' or 'max'"):
        GraphTransform.from_edges(edges, weights, 3, symmetrization="refuse")


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


TWO = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((TWO, None, 0), {}, r"`num_nodes` is 0, expected an integer of at least 1"),
        ((TWO, None, MAX_EXACT_NODES + 1), {}, r"`num_nodes` is 8001, expected at most 8000"),
        ((TWO[:1], None, 2), {}, r"`edge_index` has shape \(1, 2\), expected \(2, edges\)"),
        ((TWO, torch.ones(3), 2), {}, r"`edge_weight` has shape \(3,\), expected \(2,\)"),
        ((TWO, torch.tensor([1, torch.nan]), 2), {}, r"`edge_weight` has 1 of 2 values.*NaN"),
        ((TWO, torch.tensor([1, -2.0]), 2), {}, r"`edge_weight` has -2.0, expected none below 0"),
        ((TWO + 1, None, 2), {}, r"`edge_index` has nodes 1 to 2, expected 0 to 1"),
        ((TWO - 1, None, 2), {}, r"`edge_index` has nodes -1 to 0, expected 0 to 1"),
        ((TWO, None, 2), {"normalization": "sym"}, r"`normalization` is 'sym', expected one of"),
        ((TWO, None, 2), {"symmetrization": "min"}, r"`symmetrization` is 'min', expected one of"),
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
        (torch.eye(2), torch.tensor([-1.0, 1.0]), r"`eigenvalues` has -1.0, expected none below 0"),
        (torch.eye(2), torch.tensor([0.0, torch.nan]), r"`eigenvalues` has 1 of 2 values"),
    ],
)
@pytest.mark.usefixtures("as_shipped")
def test_graph_refuses_a_bad_basis(eigenvectors: Tensor, eigenvalues: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        GraphTransform(eigenvectors, eigenvalues)


def test_a_graph_has_one_size():
    with pytest.raises(ValueError, match=r"expected \(8,\) \(the graph's nodes\)"):
        exact(ring(8)).resized((9,))
