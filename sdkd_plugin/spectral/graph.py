"""Signals on graphs: the graph Fourier transform in the Laplacian's eigenbasis."""

from functools import cached_property
from typing import Literal, get_args

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_finite, check_positive_int, check_shape
from sdkd_plugin.spectral.basis import AbstractBasisTransform
from sdkd_plugin.spectral.transform import check_field, working_dtype

Normalization = Literal["symmetric", "combinatorial"]
Symmetrization = Literal["mean", "max", "refuse"]

MAX_EXACT_NODES = 8000
"""Beyond this an eigendecomposition takes minutes and gigabytes."""


class GraphTransform(AbstractBasisTransform):
    """Orthonormal graph Fourier transform ``x_hat = U^T x`` with ``L = U diag(lambda) U^T``.

    Frequency is lambda / lambda_max. Signals are ``(..., nodes, features)``, as in tsl and PyG.
    Build one with `from_edges`.

    Args:
        eigenvectors: orthonormal columns, of shape ``(nodes, nodes)``.
        eigenvalues: of shape ``(nodes,)``, ascending and not negative.

    Raises:
        ValueError: if the shapes do not match, an eigenvalue is negative, or the columns are not
            orthonormal.

    Source: Shuman et al. 2013, "The emerging field of signal processing on graphs".
    """

    eigenvectors: Tensor

    domain_axes = (-2,)
    channel_axis = -1
    _unscaled_energy = 1.0

    def __init__(
        self,
        eigenvectors: Float[Tensor, "nodes frequencies"],
        eigenvalues: Float[Tensor, " frequencies"],
    ) -> None:
        n = eigenvalues.shape[0]
        check_shape("eigenvectors", eigenvectors.shape, (n, n), "a column for each eigenvalue")
        gram = eigenvectors.mT @ eigenvectors
        if not torch.allclose(gram, torch.eye(n, dtype=gram.dtype, device=gram.device), atol=1e-4):
            raise ValueError("`eigenvectors` has columns that are not orthonormal.")
        check_finite("eigenvalues", eigenvalues)
        if n and float(eigenvalues.min()) < 0:
            raise ValueError(
                f"`eigenvalues` has {float(eigenvalues.min())}, expected none below 0: "
                "the Laplacian of a graph without negative weights has none."
            )
        highest = eigenvalues.double().max()
        # A graph without edges carries means only.
        frequencies = eigenvalues.double() / torch.where(highest > 0, highest, 1)
        super().__init__(frequencies, torch.ones_like(frequencies))
        self.register_buffer("eigenvectors", eigenvectors, persistent=False)

    @classmethod
    def from_edges(
        cls,
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None,
        num_nodes: int,
        *,
        normalization: Normalization = "symmetric",
        symmetrization: Symmetrization = "mean",
        dtype: torch.dtype = torch.float32,
    ) -> "GraphTransform":
        """The transform of a weighted graph, exact.

        With W the symmetrised adjacency without self-loops and D its degrees, the Laplacian is
        ``D - W`` (combinatorial) or ``I - D^(-1/2) W D^(-1/2)`` (symmetric). The row of an
        isolated node is zero in both: its signal has frequency 0, whatever it is.

        Args:
            edge_index: source and target of each edge; parallel edges add up.
            edge_weight: not negative; ``None`` weighs every edge 1.
            num_nodes: nodes without edges count too.
            normalization: which Laplacian.
            symmetrization: what a directed graph becomes: the ``mean`` of both directions, their
                ``max``, or an error (``refuse``).
            dtype: in which the eigenvectors are kept; they are computed in float64.

        Raises:
            ValueError: if there are no nodes or more than `MAX_EXACT_NODES`, an index is out of
                range, a weight is negative or not finite, an option is unknown, or the graph is
                directed and that was refused.

        Example:
            >>> ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
            >>> transform = GraphTransform.from_edges(ring, None, 4)
            >>> [round(float(f), 6) for f in transform.frequencies]
            [0.0, 0.5, 0.5, 1.0]
        """
        check_choice("normalization", normalization, get_args(Normalization))
        adjacency = adjacency_matrix(edge_index, edge_weight, num_nodes, symmetrization)
        # scipy's convention for a node without edges is the one documented above.
        laplacian = scipy.sparse.csgraph.laplacian(
            adjacency.toarray(), normed=normalization == "symmetric"
        )
        values, vectors = torch.linalg.eigh(torch.from_numpy(np.asarray(laplacian)))
        # Round-off leaves eigenvalues of about 1e-17, of either sign, where the exact ones are 0.
        noise = num_nodes * torch.finfo(values.dtype).eps * values.max()
        return cls(vectors.to(dtype), torch.where(values > noise, values, 0))

    @cached_property
    def domain_shape(self) -> tuple[int, ...]:
        """The number of nodes."""
        return (self.eigenvectors.shape[0],)

    def resized(self, domain_shape: tuple[int, ...]) -> "GraphTransform":
        """The same transform: a graph has one size.

        Raises:
            ValueError: if another number of nodes is asked for.
        """
        check_shape("domain_shape", domain_shape, self.domain_shape, "the graph's nodes")
        return self

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Coefficients ``(..., frequencies, features)`` of signals ``(..., nodes, features)``.

        Raises:
            ValueError: if the last but one axis of ``x`` is not the graph's nodes.
        """
        check_field(self, x)
        return self._multiply(self.eigenvectors.mT, x)

    def inverse(self, coefficients: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Signals ``(..., nodes, features)`` from their coefficients."""
        return self._multiply(self.eigenvectors, coefficients)

    def _unscaled(self, x: Tensor) -> Tensor:
        return (x.mT @ self.eigenvectors.to(x.dtype)).mT

    def _from_unscaled(self, coefficients: Tensor) -> Tensor:
        return (coefficients.mT @ self.eigenvectors.mT.to(coefficients.dtype)).mT

    def _multiply(self, matrix: Tensor, x: Tensor) -> Tensor:
        dtype = working_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            # Nodes last is one product for all fields; nodes last but one is one for each.
            return (x.to(dtype).mT @ matrix.to(dtype).mT).mT

    def extra_repr(self) -> str:
        """Number of nodes, for ``print``."""
        return f"nodes={self.domain_shape[0]}"


def adjacency_matrix(
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None,
    num_nodes: int,
    symmetrization: Symmetrization = "mean",
) -> scipy.sparse.csr_array:
    """The symmetric adjacency of a graph, float64, without self-loops.

    Args: as `GraphTransform.from_edges`.

    Raises:
        ValueError: as `GraphTransform.from_edges`.
    """
    check_choice("symmetrization", symmetrization, get_args(Symmetrization))
    check_positive_int("num_nodes", num_nodes)
    if num_nodes > MAX_EXACT_NODES:
        raise ValueError(
            f"`num_nodes` is {num_nodes}, expected at most {MAX_EXACT_NODES}: "
            "the exact transform needs an eigendecomposition."
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"`edge_index` has shape {tuple(edge_index.shape)}, expected (2, edges).")
    n_edges = edge_index.shape[1]
    if edge_weight is None:
        edge_weight = torch.ones(n_edges, dtype=torch.float64)
    check_shape("edge_weight", edge_weight.shape, (n_edges,), "a weight for each edge")
    check_finite("edge_weight", edge_weight)
    if n_edges and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        raise ValueError(
            f"`edge_index` has nodes {int(edge_index.min())} to {int(edge_index.max())}, "
            f"expected 0 to {num_nodes - 1} (num_nodes is {num_nodes})."
        )
    if n_edges and float(edge_weight.min()) < 0:
        raise ValueError(
            f"`edge_weight` has {float(edge_weight.min())}, expected none below 0: "
            "a Laplacian with negative weights has no frequencies."
        )
    index, weight = edge_index.cpu().numpy(), edge_weight.detach().double().cpu().numpy()
    kept = index[0] != index[1]
    shape = (num_nodes, num_nodes)
    directed = scipy.sparse.csr_array((weight[kept], tuple(index[:, kept])), shape=shape)
    if symmetrization == "max":
        return directed.maximum(directed.T).tocsr()
    if symmetrization == "refuse" and abs(directed - directed.T).max() > np.finfo(np.float32).eps:
        raise ValueError(
            "`edge_index` is a directed graph: choose symmetrization='mean' or 'max', "
            "or give both directions of each edge with one weight."
        )
    return ((directed + directed.T) / 2).tocsr()
