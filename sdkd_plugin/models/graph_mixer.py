"""GraphMixer, a small forecaster for signals on a graph, meant as a student."""

import torch
from torch import Tensor, nn

from sdkd_plugin._checks import check_sizes, check_within
from sdkd_plugin._explained import explained
from sdkd_plugin.models.graph_blocks import (
    GraphForecaster,
    GraphSizes,
    Propagation,
    ResidualMLP,
    check_graph,
)


@explained
class GraphMixer(GraphForecaster):
    """An MLP shared by all nodes, on each node's window, learned vector and surroundings.

    h_i = W [x_i, (P x)_i, ..., (P^hops x)_i] + W_u u_i + W_e e_i, then residual MLP blocks over the
    channels, then a linear head for all steps of the horizon:

        forecast_i = last reading_i + head(blocks(h_i))

    x_i is the flattened window of node i, P the row-normalised adjacency without self loops
    (`Propagation`), u the covariates and e_i the node's learned vector. Edges carry information
    from source to target; for both directions give both edges. With ``hops=0`` and no edges this
    is STID with continuous covariates in place of embedded ones. The tap ``latent`` is
    ``blocks(h)``, (batch, nodes, channels).

    Args:
        horizon, window: steps to forecast and to read.
        n_nodes: nodes of the graph.
        input_size, output_size: features of a reading and of a forecast, by default the same.
        exog_size: features of the covariates, 0 for none. All steps of the window are read.
        hidden_size: channels of the latent.
        emb_size: length of a node's learned vector, 0 for none.
        n_layers: residual blocks.
        hops: how often the window is propagated; 0 makes the model graph-free.
        dropout: probability inside the blocks.
        emb_dropout: probability that a node's learned vector is zeroed in a training step.
        residual: whether the forecast adds to the last reading.

    Raises:
        ValueError: for sizes below 1, probabilities outside [0, 1), or a residual forecast with
            other features than the readings; from ``forward``, for what does not fit the model.

    Example:
        >>> import torch
        >>> model = GraphMixer(n_nodes=3, window=12, horizon=6, exog_size=2)
        >>> edge_index = torch.tensor([[0, 1], [1, 2]])
        >>> x, u = torch.randn(8, 12, 3, 1), torch.randn(8, 12, 2)
        >>> model(x, edge_index, u=u).shape
        torch.Size([8, 6, 3, 1])
        >>> model.taps
        {'latent': 'blocks'}

    Source: without the graph, Shao et al., Spatial-Temporal Identity, CIKM 2022 (STID); the inputs
    propagated once, before anything learned, Wu et al., SGC, ICML 2019.
    """

    def __init__(
        self,
        *,
        horizon: int,
        window: int,
        n_nodes: int,
        input_size: int = 1,
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
        sizes = GraphSizes(horizon, window, n_nodes, input_size, output_size, exog_size, residual)
        check_sizes(hidden_size=hidden_size, n_layers=n_layers)
        check_sizes(0, emb_size=emb_size, hops=hops)
        check_within("dropout", dropout, "[0, 1)")
        check_within("emb_dropout", emb_dropout, "[0, 1)")
        super().__init__(sizes, hidden_size, emb_size, emb_dropout, steps=window, copies=1 + hops)
        self.hops = hops
        self.taps = {"latent": "blocks"}
        self.blocks = nn.Sequential(
            *(ResidualMLP(channels=hidden_size, dropout=dropout) for _ in range(n_layers))
        )
        self.head = nn.Linear(hidden_size, horizon * sizes.outputs)

    def decoded(
        self, x: Tensor, u: Tensor | None, edge_index: Tensor | None, edge_weight: Tensor | None
    ) -> Tensor:
        """The head's output, (batch, nodes, horizon x outputs)."""
        seen = [x.transpose(1, 2).flatten(2)]
        if self.hops:
            edge_index = check_graph(edge_index, edge_weight, self.n_nodes)
            step = Propagation.over(edge_index, edge_weight, self.n_nodes, dtype=x.dtype)
            for _ in range(self.hops):
                seen.append(step(seen[-1]))
        h = self.encode_window(torch.cat(seen, dim=-1))
        h = self.with_context(h, None if u is None else u.transpose(1, 2).flatten(2))
        return self.head(self.blocks(h))
