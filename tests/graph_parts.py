"""Graphs that tests share, and their Laplacian as documented."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdkd_plugin import GraphTransform


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
    "magnetic": random_graph(9, 20, "magnetic"),
    "ring-even": ring(8),
    "ring-odd": ring(7),
    "torus": torus(4, 5),
    "isolated": random_graph(9, 30, isolated=3),
    "components": Graph(torch.tensor([[0, 1, 3, 4], [1, 2, 4, 5]]), None, 6),
    "without-edges": Graph(torch.empty(2, 0, dtype=torch.long), None, 3),
}
NORMALIZATIONS = ["symmetric", "combinatorial"]
TWO = torch.tensor([[0, 1], [1, 0]])


def dense_laplacian(graph: Graph, normalization: str) -> np.ndarray:
    """The Laplacian as documented, edge by edge."""
    n = graph.num_nodes
    directed = np.zeros((n, n))
    for e, (source, target) in enumerate(graph.edge_index.T.tolist()):
        if source != target:
            directed[source, target] += 1 if graph.edge_weight is None else graph.edge_weight[e]
    weights = (directed + directed.T) / 2
    if graph.symmetrization == "max":
        weights = np.maximum(directed, directed.T)
    degree = weights.sum(1)
    coupling = weights
    if graph.symmetrization == "magnetic":
        share = (directed - directed.T) / np.where(weights > 0, 2 * weights, 1)
        coupling = weights * np.exp(2j * np.pi * share / 4)
    laplacian = np.diag(degree) - coupling
    if normalization == "symmetric":
        scale = np.where(degree > 0, degree, 1) ** -0.5
        laplacian = scale[:, None] * laplacian * scale
    connected = np.linalg.matrix_power(np.eye(n) + (weights > 0), n) > 0
    no_means = np.eye(n) - connected / connected.sum(1)
    return no_means @ laplacian @ no_means


def exact(graph: Graph, normalization: str = "symmetric", **options) -> GraphTransform:
    return GraphTransform.from_edges(
        graph.edge_index,
        graph.edge_weight,
        graph.num_nodes,
        normalization=normalization,
        symmetrization=graph.symmetrization,
        dtype=torch.float64,
        **options,
    )
