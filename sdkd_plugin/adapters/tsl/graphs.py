"""The spectral view of disjoint batches, whose samples have graphs of their own.

Here lives `DisjointGraphs`. One fixed graph needs only `GraphTransform`; sensors that teacher and
student do not share are in `sensors`.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_positive_int, check_shape
from sdkd_plugin.spectral import AbstractTransform, Bands, GraphTransform


class DisjointGraphs(AbstractTransform):
    """The transform of whichever graphs a batch holds, each with a spectrum of its own.

    A tsl ``DisjointBatch`` lays the nodes of several graphs side by side. The difference of student
    and teacher is taken to the frequencies of each graph apart, 1 being the highest that this graph
    carries; energies add up over the graphs, so that all nodes count alike and equal band weights
    are the MSE. A graph's eigenvectors are computed when it is first met, and kept for ``keep`` of
    the graphs last met.

    `DistillationPredictor` calls `set_graphs` for every batch, of static graphs too. Latents cannot
    be distilled over it.

    Args:
        keep: graphs whose eigenvectors are kept.
        **options: of `GraphTransform.from_edges`: ``normalization``, ``symmetrization``.

    Raises:
        ValueError: if ``keep`` is not a positive integer; in `set_graphs`, as
            `GraphTransform.from_edges`.

    Example:
        >>> graphs = DisjointGraphs()
        >>> edges, ptr = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 4]]), torch.tensor([0, 2, 5])
        >>> graphs.set_graphs(edges, None, ptr)
        >>> x = torch.randn(1, 12, 5, 1)
        >>> energy = graphs.sample_band_energy(x, Bands.split(0.5))
        >>> torch.allclose(energy.sum(), x.square().sum())
        True
    """

    def __init__(self, *, keep: int = 64, **options: Any) -> None:
        super().__init__()
        check_positive_int("keep", keep)
        self.keep = keep
        self.options = options
        self._known: OrderedDict[Hashable, GraphTransform] = OrderedDict()
        self._parts: list[tuple[GraphTransform, Tensor]] = []
        self._n_nodes = 0

    def set_graphs(
        self,
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None,
        ptr: Int[Tensor, " graphs_plus_one"],
    ) -> None:
        """From now on the fields are on these graphs.

        Args:
            edge_index: of all graphs, no edge between two of them.
            edge_weight: likewise; ``None`` weighs every edge 1.
            ptr: the first node of each graph, and behind them the number of nodes, as in
                ``batch.ptr``.

        Raises:
            ValueError: if an edge leads from one graph to another, or as
                `GraphTransform.from_edges`.
        """
        starts, device = ptr.cpu(), edge_index.device
        edges = edge_index.cpu()
        weight = None if edge_weight is None else edge_weight.detach().cpu()
        graph, target = torch.bucketize(edges, starts, right=True) - 1
        if not torch.equal(graph, target):
            raise ValueError(
                f"`edge_index` has {int((graph != target).sum())} edges from one graph to another, "
                "expected none: `ptr` says which nodes are of one graph."
            )
        nodes: dict[Hashable, list[Tensor]] = {}
        for i, (start, end) in enumerate(
            zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        ):
            own = graph == i
            part = edges[:, own] - start, None if weight is None else weight[own]
            key = self._key(*part, end - start)
            if key not in self._known:
                self._known[key] = GraphTransform.from_edges(*part, end - start, **self.options)
            self._known.move_to_end(key)
            nodes.setdefault(key, []).append(torch.arange(start, end, device=device))
        self._parts = [
            (self._known[key].to(device), torch.stack(each)) for key, each in nodes.items()
        ]
        self._n_nodes = int(starts[-1])
        while len(self._known) > self.keep:
            self._known.popitem(last=False)

    @staticmethod
    def _key(edge_index: Tensor, edge_weight: Tensor | None, n_nodes: int) -> Hashable:
        weight = None if edge_weight is None else edge_weight.numpy().tobytes()
        return n_nodes, edge_index.numpy().tobytes(), weight

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """The number of nodes of all graphs together."""
        return (self._n_nodes,)

    @property
    def domain_axes(self) -> tuple[int, ...]:
        """The axis before the features."""
        return (-2,)

    @property
    def channel_axis(self) -> int:
        """The last axis."""
        return -1

    def resized(self, domain_shape: tuple[int, ...]) -> "DisjointGraphs":
        """Refused: latents keep no track of which graphs a batch holds.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"latents on {domain_shape} nodes cannot be distilled over DisjointGraphs: distil "
            "forecasts alone, or batches of one static graph with a GraphTransform."
        )

    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """See `AbstractTransform`."""
        self._check(x)
        parts = [
            transform.sample_band_energy(_nodes_of(x, nodes), bands)
            for transform, nodes in self._parts
        ]
        return torch.stack(parts).sum(0)

    def filter(
        self,
        x: Float[Tensor, "..."],
        response: Callable[[Tensor], Tensor] | Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """See `AbstractTransform`; the response is a function of the frequencies."""
        self._check(x)
        if isinstance(response, Tensor):
            raise ValueError("`response` is a tensor, expected a function: each graph has its own.")
        out = torch.empty_like(x)
        for transform, nodes in self._parts:
            filtered = transform.filter(_nodes_of(x, nodes), response)
            out = out.index_copy(-2, nodes.flatten(), filtered.flatten(-3, -2))
        return out

    def _check(self, x: Tensor) -> None:
        if not self._parts:
            raise ValueError("no graphs are set: call `set_graphs` before a field is measured.")
        if x.ndim < 3:
            raise ValueError(
                f"a field has shape {tuple(x.shape)}, expected (batch, nodes, features)"
            )
        check_shape("nodes of a field", x.shape[-2:-1], self.domain_shape, "those of the graphs")

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _nodes_of(x: Tensor, nodes: Tensor) -> Tensor:
    """Fields ``(..., graphs, nodes, features)`` of equal graphs."""
    return x.index_select(-2, nodes.flatten()).unflatten(-2, nodes.shape)
