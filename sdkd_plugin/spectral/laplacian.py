"""Laplacians of graphs, as sparse matrices whose frequency 0 is the mean.

What is computed from a Laplacian is in `graph_basis` and `chebyshev`.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from sdkd_plugin._checks import check_choice, check_not_negative, check_positive_int, check_shape

Normalization = Literal["symmetric", "combinatorial"]
Symmetrization = Literal["mean", "max", "refuse", "magnetic"]


@dataclass(frozen=True)
class Laplacian:
    """``P M P``, where M is a sparse Hermitian matrix and P takes out each component's mean.

    Attributes:
        matrix: M, float64 or complex128, positive semidefinite.
        means: orthonormal columns, constant on one connected component each; ``P = I - C C^T``.
        projected: whether P changes anything: M has other null vectors than the constants.
    """

    matrix: scipy.sparse.csr_array
    means: scipy.sparse.csr_array
    projected: bool

    def without_means(self, x: np.ndarray) -> np.ndarray:
        """``P x`` of signals with the nodes first."""
        return x - self.means @ (self.means.T @ x)

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        if not self.projected:
            return self.matrix @ x
        return self.without_means(self.matrix @ self.without_means(x))

    def dense(self) -> np.ndarray:
        """All entries; exactly Hermitian."""
        full = self @ np.eye(self.matrix.shape[0], dtype=self.matrix.dtype)
        return (full + full.conj().T) / 2

    def highest(self) -> float:
        """The largest eigenvalue, by Lanczos; 0 where there are no edges."""
        n = self.matrix.shape[0]
        if n <= 64:
            return float(np.linalg.eigvalsh(self.dense())[-1])
        if abs(self.matrix).max() == 0:
            return 0.0
        operator = LinearOperator((n, n), matvec=self.__matmul__, dtype=self.matrix.dtype)
        options: Any = {"tol": 1e-5, "ncv": 32, "v0": np.random.default_rng(0).normal(size=n)}
        return float(eigsh(operator, 1, which="LA", return_eigenvectors=False, **options)[0])

    def digest(self, *options: object) -> str:
        """A key of the graph and of options."""
        key = hashlib.sha256(repr((1, self.projected, self.matrix.shape, *options)).encode())
        for array in (self.matrix.indptr, self.matrix.indices, self.matrix.data):
            key.update(np.ascontiguousarray(array).tobytes())
        return key.hexdigest()


def graph_laplacian(
    directed: scipy.sparse.csr_array,
    normalization: Normalization,
    symmetrization: Symmetrization,
    potential: float,
) -> Laplacian:
    """The Laplacian of a weighted directed graph; arguments as `GraphTransform.from_edges`."""
    check_choice("normalization", normalization, get_args(Normalization))
    weights = symmetrized(directed, symmetrization)
    degree = weights.sum(1)
    coupling: Any = weights
    if symmetrization == "magnetic":
        there, back = directed[weights.row, weights.col], directed[weights.col, weights.row]
        phase = 2 * np.pi * potential * (there - back) / (there + back)
        values = weights.data * np.exp(1j * phase)
        coupling = scipy.sparse.coo_array((values, weights.coords), shape=weights.shape)
    matrix = scipy.sparse.diags_array(degree) - coupling
    if normalization == "symmetric":
        scale = scipy.sparse.diags_array(np.where(degree > 0, degree, 1) ** -0.5)
        matrix = scale @ matrix @ scale
    matrix = scipy.sparse.csr_array(matrix)
    count, label = connected_components(weights, directed=False)
    size = np.bincount(label, minlength=count)
    nodes = np.arange(len(label))
    means = scipy.sparse.csr_array((size[label] ** -0.5, (nodes, label)), shape=(len(label), count))
    constant = np.abs(matrix @ np.ones(len(label)))
    return Laplacian(matrix, means, bool(constant.max() > 1e-12 * max(abs(matrix).max(), 1)))


def directed_adjacency(
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None,
    num_nodes: int | np.integer,
) -> scipy.sparse.csr_array:
    """The weights of all edges but self-loops, float64; parallel edges add up."""
    check_positive_int("num_nodes", num_nodes)
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"`edge_index` has shape {tuple(edge_index.shape)}, expected (2, edges).")
    if edge_index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"`edge_index` is of {edge_index.dtype}, expected integers.")
    n_edges = edge_index.shape[1]
    if edge_weight is None:
        edge_weight = torch.ones(n_edges, dtype=torch.float64)
    check_shape("edge_weight", edge_weight.shape, (n_edges,), "a weight for each edge")
    check_not_negative(
        "edge_weight", edge_weight, "a Laplacian with negative weights has no frequencies"
    )
    if n_edges and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        raise ValueError(
            f"`edge_index` has nodes {int(edge_index.min())} to {int(edge_index.max())}, "
            f"expected 0 to {num_nodes - 1} (num_nodes is {num_nodes})."
        )
    index, weight = edge_index.cpu().numpy(), edge_weight.detach().double().cpu().numpy()
    kept = (index[0] != index[1]) & (weight > 0)
    shape = (int(num_nodes), int(num_nodes))
    return scipy.sparse.csr_array((weight[kept], tuple(index[:, kept])), shape=shape)


def symmetrized(directed: scipy.sparse.csr_array, rule: Symmetrization) -> scipy.sparse.coo_array:
    """The symmetric weights of a directed graph, by a named rule.

    ``refuse`` takes directions that differ by up to a millionth of the larger weight.
    """
    check_choice("symmetrization", rule, get_args(Symmetrization))
    larger = directed.maximum(directed.T)
    if rule == "refuse" and (abs(directed - directed.T) - 1e-6 * larger).max() > 0:
        raise ValueError(
            "`edge_index` is a directed graph: choose symmetrization='mean', 'max' or 'magnetic', "
            "or give both directions of each edge with one weight."
        )
    return (larger if rule == "max" else (directed + directed.T) / 2).tocoo()
