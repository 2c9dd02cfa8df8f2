"""The graph models as tsl models, which take a network's own arguments and run in tsl's loops."""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tsl.nn.models import BaseModel

from sdkd_plugin.models import GraphAlterNet, GraphMixer

Network = GraphAlterNet | GraphMixer


def tsl_model(name: str, network: type[GraphAlterNet] | type[GraphMixer]) -> type[BaseModel]:
    """Make a tsl model of a graph network.

    The model takes the network's arguments by keyword and raises its errors. Its taps are the
    network's.

    Args:
        name: of the class.
        network: makes the network from keyword arguments.

    Example:
        >>> model = SDKDStudent(horizon=6, window=12, n_nodes=3)
        >>> edge_index = torch.tensor([[0, 1], [1, 2]])
        >>> model(torch.randn(8, 12, 3, 1), edge_index).shape
        torch.Size([8, 6, 3, 1])
        >>> model.taps
        {'latent': 'network.blocks'}
    """

    class Model(BaseModel):
        return_type = Tensor

        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            self.network = network(**arguments)

        @property
        def taps(self) -> dict[str, str]:
            """Tap names and module paths, the network's own."""
            return {tap: f"network.{path}" for tap, path in self.network.taps.items()}

        def forward(
            self,
            x: Float[Tensor, "batch time nodes features"],
            edge_index: Int[Tensor, "2 edges"] | None = None,
            edge_weight: Float[Tensor, " edges"] | None = None,
            u: Float[Tensor, "..."] | None = None,
        ) -> Float[Tensor, "batch horizon nodes outputs"]:
            """Forecast; each graph of a disjoint batch by itself (see `forecast_each_graph`)."""
            return forecast_each_graph(self.network, x, edge_index, edge_weight, u)

    # tsl reads which arguments a model takes from its constructor, and overlooks keyword-only ones.
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [
        each.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for each in inspect.signature(network).parameters.values()
    ]
    Model.__init__.__signature__ = inspect.Signature([own, *taken])  # type: ignore[attr-defined]
    # Under its public name a model can be pickled.
    Model.__name__ = Model.__qualname__ = name
    Model.__doc__ = f"`{network.__name__}` as a tsl model: see there for the arguments."
    return Model


def forecast_each_graph(
    network: Network,
    x: Float[Tensor, "batch time nodes features"],
    edge_index: Int[Tensor, "2 edges"] | None = None,
    edge_weight: Float[Tensor, " edges"] | None = None,
    u: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "batch horizon nodes outputs"]:
    """Forecast each graph of a disjoint batch by itself, and any other batch as it is.

    A tsl ``DisjointBatch`` is one sample with the nodes of its graphs one after the other. Each
    graph must have the network's sensors in their order; the edges may differ.

    Raises:
        ValueError: as the network.
    """
    n = network.n_nodes
    graphs, rest = divmod(x.shape[2], n)
    owner = None if edge_index is None else edge_index // n
    disjoint = x.shape[0] == 1 and graphs > 1 and not rest
    if not disjoint or (owner is not None and not torch.equal(owner[0], owner[1])):
        return network(x, edge_index, edge_weight, u)
    forecasts = []
    for i in range(graphs):
        nodes = slice(i * n, (i + 1) * n)
        edges, weights = edge_index, edge_weight
        if edge_index is not None and owner is not None:
            own = owner[0] == i
            edges = edge_index[:, own] - i * n
            weights = None if edge_weight is None else edge_weight[own]
        each_u = u[:, :, nodes] if u is not None and u.ndim == 4 else u
        forecasts.append(network(x[:, :, nodes], edges, weights, each_u))
    return torch.cat(forecasts, dim=2)


SDKDTeacher = tsl_model("SDKDTeacher", GraphAlterNet)
SDKDStudent = tsl_model("SDKDStudent", GraphMixer)
