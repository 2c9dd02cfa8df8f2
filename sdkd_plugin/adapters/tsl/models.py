"""The graph models as tsl models, with the argument names that tsl's experiments fill in."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tsl.nn.models import BaseModel

from sdkd_plugin.models import GraphAlterNet, GraphMixer


class SDKDTeacher(BaseModel):
    """`GraphAlterNet` as a tsl model; see there for the architecture and its arguments.

    Args:
        input_size: features of a reading.
        horizon: steps to forecast.
        window: steps to read.
        n_nodes: nodes of the graph.
        output_size: features of a forecast; as many as are read unless given.
        exog_size: features of the covariates ``u``, 0 for none.
        hidden_size: channels of the latent.
        emb_size: length of a node's learned vector.
        n_layers: latent-evolution blocks.
        n_heads: attention heads.
        patch_size: steps of a token.
        hops: of the graph convolution.
        decoder_size: channels of the decoder.
        dropout: in the blocks.
        emb_dropout: of a node's learned vector.
        residual: whether the forecast adds to the last reading.

    Raises:
        ValueError: as `GraphAlterNet`.
    """

    return_type = Tensor

    def __init__(
        self,
        input_size: int,
        horizon: int,
        window: int,
        n_nodes: int,
        output_size: int | None = None,
        exog_size: int = 0,
        hidden_size: int = 48,
        emb_size: int = 16,
        n_layers: int = 2,
        n_heads: int = 4,
        patch_size: int = 6,
        hops: int = 2,
        decoder_size: int = 64,
        dropout: float = 0.1,
        emb_dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.network = GraphAlterNet(
            input_size=input_size,
            horizon=horizon,
            window=window,
            n_nodes=n_nodes,
            output_size=output_size,
            exog_size=exog_size,
            hidden_size=hidden_size,
            emb_size=emb_size,
            n_layers=n_layers,
            n_heads=n_heads,
            patch_size=patch_size,
            hops=hops,
            decoder_size=decoder_size,
            dropout=dropout,
            emb_dropout=emb_dropout,
            residual=residual,
        )

    @property
    def taps(self) -> dict[str, str]:
        """Tap names and module paths, the network's own."""
        return {name: f"network.{path}" for name, path in self.network.taps.items()}

    def forward(
        self,
        x: Float[Tensor, "batch time nodes features"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
        u: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch horizon nodes outputs"]:
        """Forecast; see `GraphAlterNet.forward`, and `forecast_each_graph` of a disjoint batch."""
        return forecast_each_graph(self.network, x, edge_index, edge_weight, u)


class SDKDStudent(BaseModel):
    """`GraphMixer` as a tsl model; see there for the architecture and its arguments.

    Args:
        input_size: features of a reading.
        horizon: steps to forecast.
        window: steps to read.
        n_nodes: nodes of the graph.
        output_size: features of a forecast; as many as are read unless given.
        exog_size: features of the covariates ``u``, 0 for none.
        hidden_size: channels of the latent.
        emb_size: length of a node's learned vector, 0 for none.
        n_layers: residual blocks.
        hops: how often the window is propagated; 0 makes the model graph-free.
        dropout: in the blocks.
        emb_dropout: of a node's learned vector.
        residual: whether the forecast adds to the last reading.

    Raises:
        ValueError: as `GraphMixer`.
    """

    return_type = Tensor

    def __init__(
        self,
        input_size: int,
        horizon: int,
        window: int,
        n_nodes: int,
        output_size: int | None = None,
        exog_size: int = 0,
        hidden_size: int = 32,
        emb_size: int = 8,
        n_layers: int = 2,
        hops: int = 1,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.network = GraphMixer(
            input_size=input_size,
            horizon=horizon,
            window=window,
            n_nodes=n_nodes,
            output_size=output_size,
            exog_size=exog_size,
            hidden_size=hidden_size,
            emb_size=emb_size,
            n_layers=n_layers,
            hops=hops,
            dropout=dropout,
            emb_dropout=emb_dropout,
            residual=residual,
        )

    @property
    def taps(self) -> dict[str, str]:
        """Tap names and module paths, the network's own."""
        return {name: f"network.{path}" for name, path in self.network.taps.items()}

    def forward(
        self,
        x: Float[Tensor, "batch time nodes features"],
        edge_index: Int[Tensor, "2 edges"] | None = None,
        edge_weight: Float[Tensor, " edges"] | None = None,
        u: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch horizon nodes outputs"]:
        """Forecast; see `GraphMixer.forward`, and `forecast_each_graph` of a disjoint batch."""
        return forecast_each_graph(self.network, x, edge_index, edge_weight, u)


def forecast_each_graph(
    network: GraphAlterNet | GraphMixer,
    x: Float[Tensor, "batch time nodes features"],
    edge_index: Int[Tensor, "2 edges"] | None = None,
    edge_weight: Float[Tensor, " edges"] | None = None,
    u: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "batch horizon nodes outputs"]:
    """The network's forecast, of each graph by itself where tsl has laid several side by side.

    A tsl ``DisjointBatch`` has a single sample, and the nodes of its graphs behind each other.
    These must be the sensors the network was built for, in their order; their edges may differ
    from graph to graph. Any other input goes to the network as it is.

    Raises:
        ValueError: as the network.
    """
    n = network.n_nodes
    graphs, rest = divmod(x.shape[2], n)
    if x.shape[0] != 1 or graphs < 2 or rest:
        return network(x, edge_index, edge_weight, u)
    owner = None if edge_index is None else edge_index // n
    if owner is not None and not torch.equal(owner[0], owner[1]):
        return network(x, edge_index, edge_weight, u)
    forecasts = []
    for i in range(graphs):
        nodes = slice(i * n, (i + 1) * n)
        edges, weights, shared = edge_index, edge_weight, u
        if edge_index is not None and owner is not None:
            own = owner[0] == i
            edges = edge_index[:, own] - i * n
            weights = None if edge_weight is None else edge_weight[own]
        if u is not None and u.ndim == 4:
            shared = u[:, :, nodes]
        forecasts.append(network(x[:, :, nodes], edges, weights, shared))
    return torch.cat(forecasts, dim=2)
