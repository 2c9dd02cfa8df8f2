"""Signals on graphs: the frequencies of a graph's Laplacian, by the engine that its size allows."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sdkd_plugin._checks import check_choice
from sdkd_plugin._explained import explained
from sdkd_plugin.spectral.bands import Bands
from sdkd_plugin.spectral.chebyshev import ChebyshevGraph
from sdkd_plugin.spectral.graph_basis import GraphBasis, graph_basis
from sdkd_plugin.spectral.laplacian import (
    Normalization,
    Symmetrization,
    directed_adjacency,
    graph_laplacian,
)
from sdkd_plugin.spectral.projection import LowBandProjection
from sdkd_plugin.spectral.transform import AbstractTransform, check_field

Method = Literal["auto", "exact", "low-rank", "chebyshev"]

AUTO_EXACT_NODES = 4000
"""Up to this size ``auto`` computes all eigenvectors, in half a minute and 130 MB."""

MAX_EXACT_NODES = 16_000
"""Beyond this all eigenvectors take an hour and many gigabytes."""


_OF_BASIS = ("eigenvectors", "frequencies", "multiplicity", "inverse", "spectrum")


@explained
class GraphTransform(AbstractTransform):
    """Orthonormal graph Fourier transform ``x_hat = U^T x`` with ``L = U diag(lambda) U^T``.

    Frequency is lambda / lambda_max. Signals are ``(..., nodes, features)``, as in tsl and PyG.
    Build one with `from_edges`. On large graphs there may be no U: then ``frequencies``,
    ``spectrum`` and such raise.

    Args:
        eigenvectors: orthonormal columns, of shape ``(nodes, nodes)``.
        eigenvalues: of shape ``(nodes,)``, ascending and not negative.

    Raises:
        ValueError: if the shapes do not match, an eigenvalue is negative, or the columns are not
            orthonormal.

    Source: Shuman et al. 2013, "The emerging field of signal processing on graphs".
    """

    domain_axes = (-2,)
    channel_axis = -1
    domain_shape: tuple[int, ...] = ()
    engine: GraphBasis | ChebyshevGraph

    def __init__(
        self,
        eigenvectors: Float[Tensor, "nodes frequencies"],
        eigenvalues: Float[Tensor, " frequencies"],
    ) -> None:
        super().__init__()
        self._set_engine(GraphBasis(eigenvectors, eigenvalues))

    @classmethod
    @explained
    def from_edges(
        cls,
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None,
        num_nodes: int | np.integer,
        *,
        normalization: Normalization = "symmetric",
        symmetrization: Symmetrization = "mean",
        potential: float = 0.25,
        method: Method = "auto",
        rank: int = 256,
        tolerance: float = 0.02,
        cache: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "GraphTransform":
        """The transform of a weighted graph.

        With A the weights, W the symmetrised ones without self-loops and D their degrees, L is
        ``P M P``: M is ``D - W`` (combinatorial) or ``I - D^(-1/2) W D^(-1/2)`` (symmetric), P
        takes out the mean of each connected component. So frequency 0 is the mean, also where
        degrees differ. The symmetric Laplacian is the default because its eigenvalues are at most
        2: a hub does not push the frequencies of all other nodes towards 0.

        Args:
            edge_index: source and target of each edge; parallel edges add up.
            edge_weight: not negative; ``None`` weighs every edge 1.
            num_nodes: nodes without edges included; these have frequency 0 only.
            normalization: which M.
            symmetrization: what a directed graph becomes: the ``mean`` of both directions, their
                ``max``, an error (``refuse``), or ``magnetic``: the mean W with the phases
                ``exp(2 pi i potential (A_uv - A_vu) / (A_uv + A_vu))``, a Hermitian Laplacian that
                tells directions apart. Of real signals it sees the real part of ``g(L)``.
            potential: of the magnetic Laplacian, in turns an edge.
            method: ``exact``, all eigenvectors in float64; ``low-rank``, the ``rank`` lowest, below
                whose highest frequency bands must have their edges, for all others are one band;
                ``chebyshev``, polynomials of L in O(order x edges), whose power weights are within
                ``tolerance`` of the bands' (see `sdkd_plugin.spectral.chebyshev`). ``auto`` is
                exact up to 4,000 nodes, else chebyshev.
            rank: eigenvectors that low-rank keeps.
            tolerance: of chebyshev.
            cache: folder where eigenvectors are kept under the graph's hash; by default
                ``$SDKD_CACHE``, where that is set and for graphs of 1,000 nodes and more.
            dtype: in which eigenvectors or the matrix are kept.

        Raises:
            ValueError: if there are no nodes or too many for the method, an index is no integer
                or out of range, a weight is negative or not finite, an option is unknown, the
                graph is directed and that was refused, or ``rank`` does not fit the graph.

        Example:
            >>> ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
            >>> transform = GraphTransform.from_edges(ring, None, 4)
            >>> [round(float(f), 6) for f in transform.frequencies]
            [0.0, 0.5, 0.5, 1.0]

        Source: magnetic Laplacian: Zhang et al. 2021, "MagNet".
        """
        check_choice("method", method, get_args(Method))
        directed = directed_adjacency(edge_index, edge_weight, num_nodes)
        laplacian = graph_laplacian(directed, normalization, symmetrization, potential)
        n = directed.shape[0]
        if method == "auto":
            method = "exact" if n <= AUTO_EXACT_NODES else "chebyshev"
        if method == "exact" and n > MAX_EXACT_NODES:
            raise ValueError(
                f"`num_nodes` is {n}, expected at most {MAX_EXACT_NODES} for method='exact': it "
                "needs all eigenvectors; take 'low-rank' or 'chebyshev'."
            )
        if method == "chebyshev":
            return cls._of(ChebyshevGraph(laplacian, tolerance, dtype))
        folder = cache or (os.environ.get("SDKD_CACHE") if n >= 1000 else None)
        return cls._of(
            graph_basis(
                laplacian,
                rank if method == "low-rank" else None,
                dtype,
                Path(folder).expanduser() if folder else None,
            )
        )

    @classmethod
    def _of(cls, engine: GraphBasis | ChebyshevGraph) -> "GraphTransform":
        transform = cls.__new__(cls)
        AbstractTransform.__init__(transform)
        transform._set_engine(engine)
        return transform

    def _set_engine(self, engine: GraphBasis | ChebyshevGraph) -> None:
        self.engine, self.domain_shape = engine, engine.domain_shape
        self.projection: LowBandProjection | None = None
        if isinstance(engine, GraphBasis) and not engine.needs_field:
            self.projection = LowBandProjection(engine)

    @property
    def method(self) -> str:
        """Of the engine, ``exact``, ``low-rank`` or ``chebyshev``."""
        if isinstance(self.engine, ChebyshevGraph):
            return "chebyshev"
        return "low-rank" if self.engine.needs_field else "exact"

    @property
    def basis(self) -> GraphBasis:
        """The engine with eigenvectors.

        Raises:
            ValueError: if there are none.
        """
        if isinstance(self.engine, GraphBasis):
            return self.engine
        raise ValueError(
            "this graph's transform has no eigenvectors: build it by from_edges(..., "
            "method='exact') or method='low-rank'."
        )

    def __getattr__(self, name: str) -> Any:
        """``eigenvectors``, ``frequencies``, ``inverse``, ``spectrum`` and such are the basis'."""
        if name in _OF_BASIS:
            return getattr(self.basis, name)
        return super().__getattr__(name)

    def forward(self, x: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Coefficients ``(..., frequencies, features)`` of signals ``(..., nodes, features)``."""
        return self.basis(x)

    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """See `AbstractTransform`."""
        # How many frequencies are low is read from a tensor, which a compiled graph cannot do.
        projection = None if torch.compiler.is_compiling() else self.projection
        if projection is not None and projection.saves(bands):
            check_field(self, x, batched=True)
            # With the nodes side by side in memory, as its products are, no pass mixes two layouts.
            return projection.sample_band_energy(x.mT.contiguous().mT, bands)
        return self.engine.sample_band_energy(x, bands)

    def filter(
        self,
        x: Float[Tensor, "..."],
        response: Callable[[Tensor], Tensor] | Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """See `AbstractTransform`; with eigenvectors also values at ``frequencies``."""
        return self.engine.filter(x, response)

    def extra_repr(self) -> str:
        """Nodes and method, for ``print``."""
        kept = "" if self.method != "low-rank" else f", rank={self.frequencies.numel()}"
        return f"nodes={self.domain_shape[0]}, method={self.method!r}{kept}"
