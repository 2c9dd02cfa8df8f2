"""The graph models as tsl models, which take a network's own arguments and run in tsl's loops."""

import inspect
from typing import Any, Literal, get_origin

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tsl.nn.models import BaseModel

from sdkd_plugin.models import GraphAlterNet, GraphMixer


def tsl_model(name: str, network: type[GraphAlterNet] | type[GraphMixer]) -> type[BaseModel]:
    """Make a tsl model class of a graph network, which takes the network's arguments by keyword.

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
            self.taps = {tap: f"network.{path}" for tap, path in self.network.taps.items()}

        def forward(
            self,
            x: Float[Tensor, "batch time nodes features"],
            edge_index: Int[Tensor, "2 edges"] | None = None,
            edge_weight: Float[Tensor, " edges"] | None = None,
            u: Float[Tensor, "..."] | None = None,
        ) -> Float[Tensor, "batch horizon nodes outputs"]:
            """Forecast as the network does; each graph of a disjoint batch by itself.

            A tsl ``DisjointBatch`` is one sample with the nodes of its graphs one after the other.
            Each graph must have the network's sensors in their order; the edges may differ.
            """
            n = self.network.n_nodes
            graphs, rest = divmod(x.shape[2], n)
            owner = None if edge_index is None else edge_index // n
            disjoint = x.shape[0] == 1 and graphs > 1 and not rest
            if not disjoint or (owner is not None and not torch.equal(owner[0], owner[1])):
                return self.network(x, edge_index, edge_weight, u)
            forecasts = []
            for i in range(graphs):
                nodes, edges, weights = slice(i * n, (i + 1) * n), edge_index, edge_weight
                if edge_index is not None and owner is not None:
                    edges = edge_index[:, owner[0] == i] - i * n
                    weights = None if edge_weight is None else edge_weight[owner[0] == i]
                own_u = u[:, :, nodes] if u is not None and u.ndim == 4 else u
                forecasts.append(self.network(x[:, :, nodes], edges, weights, own_u))
            return torch.cat(forecasts, dim=2)

    # tsl reads which arguments a model takes from its constructor, and overlooks keyword-only ones.
    usual = inspect.Parameter.POSITIONAL_OR_KEYWORD
    # Its command line makes values by their annotation, which a Literal cannot.
    taken = [
        each.replace(kind=usual, annotation=_made_by(each.annotation))
        for each in inspect.signature(network).parameters.values()
    ]
    signature = inspect.Signature([inspect.Parameter("self", usual), *taken])
    Model.__init__.__signature__ = signature  # type: ignore[attr-defined]
    Model.__name__ = Model.__qualname__ = name  # so that a model can be pickled
    Model.__doc__ = f"`{network.__name__}` as a tsl model: see there for the arguments."
    return Model


def _made_by(annotation: Any) -> Any:
    return str if get_origin(annotation) is Literal else annotation


SDKDTeacher = tsl_model("SDKDTeacher", GraphAlterNet)
SDKDStudent = tsl_model("SDKDStudent", GraphMixer)
