"""The graph models as tsl models, with the argument names that tsl's experiments fill in."""

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
        """Forecast; see `GraphAlterNet.forward`."""
        return self.network(x, edge_index, edge_weight, u)


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
        """Forecast; see `GraphMixer.forward`."""
        return self.network(x, edge_index, edge_weight, u)
