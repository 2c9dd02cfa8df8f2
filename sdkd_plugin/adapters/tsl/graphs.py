"""Spectra of parts of the nodes: of each graph of a disjoint batch, or of the shared sensors."""

import itertools
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_positive_int, check_shape
from sdkd_plugin.spectral import AbstractTransform, Bands, GraphTransform
from sdkd_plugin.spectral.transform import check_field


class AbstractParts(AbstractTransform):
    """A transform of fields ``(batch, ..., nodes, features)`` by graphs on parts of the nodes.

    Energies add up over the parts and are scaled by all nodes over the nodes in a part.
    """

    n_nodes: int
    domain_axes = (-2,)
    channel_axis = -1

    @abstractmethod
    def parts(self) -> list[tuple[GraphTransform, Tensor]]:
        """Transforms, and the nodes ``(graphs, nodes)`` of the equal graphs that each is for."""

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """The number of nodes, those in no part included."""
        return (self.n_nodes,)

    def sample_band_energy(
        self, x: Float[Tensor, "batch ..."], bands: Bands
    ) -> Float[Tensor, "batch n_bands"]:
        """See `AbstractTransform`."""
        parts = self.parts()
        check_field(self, x, batched=True)
        energy = [part.sample_band_energy(_select(x, nodes), bands) for part, nodes in parts]
        return torch.stack(energy).sum(0) * (self.n_nodes / sum(n.numel() for _, n in parts))

    def filter(
        self, x: Float[Tensor, "..."], response: Callable[[Tensor], Tensor] | Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """See `AbstractTransform`; nodes in no part become 0."""
        parts = self.parts()
        check_field(self, x)
        if isinstance(response, Tensor) and len(parts) > 1:
            raise ValueError("`response` is a tensor, expected a function: each graph has its own.")
        out = torch.zeros_like(x)
        for part, nodes in parts:
            filtered = part.filter(_select(x, nodes), response).flatten(-3, -2)
            with torch.autocast(x.device.type, enabled=False):  # it knows no `index_copy` of halves
                out = out.index_copy(-2, nodes.flatten(), filtered)
        return out


class DisjointGraphs(AbstractParts):
    """The transform of whichever graphs a batch holds, each with a spectrum of its own.

    A tsl ``DisjointBatch`` lays the nodes of several graphs side by side. Each graph has its own
    frequencies, up to 1, the highest that it carries; its eigenvectors are computed once. All
    nodes have the same weight, and equal band weights are the MSE. `DistillationPredictor` calls
    `set_graphs` for every batch. Latents cannot be distilled over it.

    Args:
        keep: how many graphs' eigenvectors are kept; those of the graphs seen last.
        **options: of `GraphTransform.from_edges`: ``normalization``, ``symmetrization``.

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
        self.n_nodes = 0
        self._known: OrderedDict[Hashable, GraphTransform] = OrderedDict()
        self._parts: list[tuple[GraphTransform, Tensor]] = []

    def set_graphs(
        self,
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None,
        ptr: Int[Tensor, " graphs_plus_one"],
    ) -> None:
        """Set the graphs that the fields are on from now on.

        Args:
            edge_index: of all graphs, no edge between two of them.
            edge_weight: of all edges; ``None`` is 1 for every edge.
            ptr: the first node of each graph and then the number of nodes, as in ``batch.ptr``.

        Raises:
            ValueError: if an edge joins two graphs, or `GraphTransform.from_edges` refuses one.
        """
        edges, device, starts = edge_index.cpu(), edge_index.device, ptr.tolist()
        weight = None if edge_weight is None else edge_weight.detach().cpu()
        graph, target = torch.bucketize(edges, ptr.cpu(), right=True) - 1
        if crossing := int((graph != target).sum()):
            raise ValueError(
                f"`edge_index` has {crossing} edges from one graph to another, expected none: "
                "`ptr` gives the nodes of each graph."
            )
        nodes: dict[Hashable, list[Tensor]] = {}
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            own = graph == i
            part = edges[:, own] - start, None if weight is None else weight[own]
            key = end - start, *(None if x is None else x.numpy().tobytes() for x in part)
            if key not in self._known:
                self._known[key] = GraphTransform.from_edges(*part, end - start, **self.options)
            self._known.move_to_end(key)
            nodes.setdefault(key, []).append(torch.arange(start, end, device=device))
        self._parts = [(self._known[key].to(device), torch.stack(n)) for key, n in nodes.items()]
        self.n_nodes = starts[-1]
        while len(self._known) > self.keep:
            self._known.popitem(last=False)

    def parts(self) -> list[tuple[GraphTransform, Tensor]]:
        """The graphs that were set; a ValueError if there are none."""
        if not self._parts:
            raise ValueError("no graphs are set: call `set_graphs` before a field is measured.")
        return self._parts

    def resized(self, domain_shape: tuple[int, ...]) -> "DisjointGraphs":
        """Refused by a ValueError, because the graphs change with every batch."""
        raise ValueError(
            f"latents on {domain_shape} nodes cannot be distilled over DisjointGraphs: distil "
            "forecasts alone, or batches of one static graph with a GraphTransform."
        )


class SharedSensors(AbstractParts):
    """The transform of some of the nodes, on fields that have more; the others have no energy.

    For a student with sensors that its teacher does not know. Losses are means over the shared
    sensors.

    Args:
        transform: of the graph of the shared sensors, in the order of ``places``.
        places: of the shared sensors in the student's order, as ``match_sensors(...).student``.
        n_nodes: of the student.

    Raises:
        ValueError: if the transform has another number of nodes, or a place is out of range.

    Example:
        >>> pair = GraphTransform.from_edges(torch.tensor([[0, 1], [1, 0]]), None, 2)
        >>> shared = SharedSensors(pair, torch.tensor([0, 2]), 3)
        >>> x = torch.tensor([[[1.0], [9.0], [1.0]]])
        >>> shared.sample_band_energy(x, Bands.split(0.5)).round(decimals=4)
        tensor([[3., 0.]])
    """

    places: Tensor

    def __init__(
        self, transform: GraphTransform, places: Int[Tensor, " shared"], n_nodes: int
    ) -> None:
        super().__init__()
        check_shape("transform", transform.domain_shape, tuple(places.shape), "one node a place")
        if int(places.min()) < 0 or int(places.max()) >= n_nodes:
            expected = f"expected nodes from 0 to {n_nodes - 1}"
            raise ValueError(f"`places` is {places.tolist()}, {expected}.")
        self.transform = transform
        self.n_nodes = n_nodes
        self.register_buffer("places", places, persistent=False)

    def parts(self) -> list[tuple[GraphTransform, Tensor]]:
        """See `AbstractParts`."""
        return [(self.transform, self.places[None])]

    def resized(self, domain_shape: tuple[int, ...]) -> "SharedSensors":
        """The same transform; a ValueError if the size is another."""
        check_shape("domain_shape", domain_shape, self.domain_shape, "the student's nodes")
        return self


def _select(x: Tensor, nodes: Tensor) -> Tensor:
    """Fields ``(..., graphs, nodes, features)`` of equal graphs."""
    return x.index_select(-2, nodes.flatten()).unflatten(-2, nodes.shape)
