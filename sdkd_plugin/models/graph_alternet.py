"""GraphAlterNet, a large forecaster for signals on a graph, meant as a teacher."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sdkd_plugin._checks import check_choice, check_sizes, check_within
from sdkd_plugin._explained import explained
from sdkd_plugin.models.graph_blocks import (
    GraphForecaster,
    GraphSizes,
    Propagation,
    ResidualMLP,
    check_graph,
)

Attention: TypeAlias = Literal["auto", "exact", "landmarks"]
Latent: TypeAlias = Float[Tensor, "batch time nodes channels"]
Heads: TypeAlias = Float[Tensor, "batch heads _ _"]

# Up to this many nodes exact attention takes at most a quarter of a training step.
EXACT_UP_TO = 256


class GraphConvolutionBranch(nn.Module):
    """The high-frequency branch: diffusion convolution, which can form differences of neighbours.

    z + W2 gelu(W1 [n, P n, ..., P^hops n, Q n, ..., Q^hops n]) with n = norm(z), P the propagation
    along the edges and Q against them (``steps``). W1 can form the high-pass filter n - P n, the
    random-walk Laplacian of n.

    Source: Li et al., Diffusion Convolutional Recurrent Neural Network, ICLR 2018, equation 2.
    """

    def __init__(self, *, channels: int, hops: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hops = hops
        self.norm = nn.LayerNorm(channels)
        self.mix = nn.Linear(channels * (1 + 2 * hops), channels)
        self.out = nn.Linear(channels, channels)
        self.drop = nn.Dropout(dropout)

    def forward(self, z: Latent, steps: Sequence[Propagation]) -> Latent:
        """Mix every node with its neighbours up to ``hops`` edges away, in both directions."""
        seen = [self.norm(z)]
        for step in steps:
            diffused = seen[0]
            for _ in range(self.hops):
                diffused = step(diffused)
                seen.append(diffused)
        hidden = self.drop(F.gelu(self.mix(torch.cat(seen, dim=-1))))
        return z + self.drop(self.out(hidden))


def landmark_attention(q: Heads, k: Heads, v: Heads, landmarks: Heads) -> Heads:
    """Attention by way of a few landmarks, softmax(q l^T / s) softmax(l k^T / s) v, s = sqrt(c).

    Queries, keys and values are (batch, heads, length, c), landmarks (batch, heads, landmarks, c).
    Each landmark averages the nodes, and each node averages the landmarks: as in exact attention
    the weights are positive and sum to 1. Time and memory are linear in the length.

    Source: Han et al., Agent Attention, ECCV 2024, with learned agents (as the inducing points of
    Lee et al., Set Transformer, ICML 2019).
    """
    summary = F.scaled_dot_product_attention(landmarks, k, v)
    return F.scaled_dot_product_attention(q, landmarks, summary)


class AxisAttention(nn.Module):
    """Multi-head self-attention along one axis; entries of the other axes are separate sequences.

    softmax(q k^T / sqrt(channels / heads)) v, with q, k and v linear in norm(z); with landmarks it
    is `landmark_attention`. If ``auto``, weights that are loaded decide whether there are any.
    """

    landmarks: nn.Parameter | None

    def __init__(
        self,
        *,
        channels: int,
        heads: int,
        axis: Literal["time", "nodes"],
        n_landmarks: int = 0,
        auto: bool = False,
    ) -> None:
        super().__init__()
        check_choice("axis", axis, ("time", "nodes"))
        self.axis = 1 if axis == "time" else 2
        self.heads = heads
        self.auto = auto
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        shape = (heads, n_landmarks, channels // heads)
        self.landmarks = nn.Parameter(torch.randn(shape)) if n_landmarks else None

    def forward(self, z: Latent) -> Latent:
        """Mix the entries along the axis."""
        # To (3, batch, others x heads, length, channels / heads): with the other axis among the
        # heads, neither dimension nears the 65,535 that CUDA's attention kernels allow.
        sequences = self.qkv(self.norm(z)).movedim(self.axis, 2)
        split = sequences.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q, k, v = split.flatten(2, 3).unbind(0)
        if self.landmarks is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            landmarks = self.landmarks.to(q.dtype).repeat(sequences.shape[1], 1, 1)
            mixed = landmark_attention(q, k, v, landmarks.expand(len(q), -1, -1, -1))
        mixed = mixed.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3)
        return self.out(mixed.movedim(2, self.axis))

    def fit_to(self, landmarks: Sequence[int] | None) -> None:
        """If ``auto``, be as weights with landmarks of this shape, or None: older files have none.

        New landmarks have no values yet.
        """
        if self.auto and (landmarks is None) != (self.landmarks is None):
            empty = None if landmarks is None else self.qkv.weight.new_empty(landmarks)
            self.landmarks = None if empty is None else nn.Parameter(empty)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        stored = state.get(f"{prefix}landmarks")
        self.fit_to(None if stored is None else stored.shape)
        super()._load_from_state_dict(state, prefix, *args)

    def extra_repr(self) -> str:
        """The axis, and whether by landmarks."""
        by = "exact" if self.landmarks is None else f"by {self.landmarks.shape[1]} landmarks"
        return f"over {('time', 'nodes')[self.axis - 1]}, {by}"


class AttentionBranch(nn.Module):
    """The low-frequency branch: a Transformer layer with attention over nodes, then over time.

    Softmax attention is an average with positive weights, a low-pass filter. Attention over nodes
    ignores the edges. Without landmarks its time, not its memory, is quadratic in the nodes.

    Source: Park and Kim, How Do Vision Transformers Work?, ICLR 2022.
    """

    def __init__(
        self, *, channels: int, heads: int, dropout: float = 0.0, **over_nodes: Any
    ) -> None:
        super().__init__()
        self.over_nodes = AxisAttention(channels=channels, heads=heads, axis="nodes", **over_nodes)
        self.over_time = AxisAttention(channels=channels, heads=heads, axis="time")
        self.mlp = ResidualMLP(channels=channels, dropout=dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, z: Latent) -> Latent:
        """Mix the nodes of every time step, then the time steps of every node."""
        z = z + self.drop(self.over_nodes(z))
        z = z + self.drop(self.over_time(z))
        return self.mlp(z)


class LatentEvolution(nn.Module):
    """One block: both branches side by side, fused by LayerNorm(high + low).

    Source: Li et al., arXiv 2507.02939 (SDKD), the latent evolution module of ST-AlterNet.
    """

    def __init__(
        self, *, channels: int, hops: int, heads: int, dropout: float = 0.0, **over_nodes: Any
    ) -> None:
        super().__init__()
        self.high = GraphConvolutionBranch(channels=channels, hops=hops, dropout=dropout)
        self.low = AttentionBranch(channels=channels, heads=heads, dropout=dropout, **over_nodes)
        self.fuse = nn.LayerNorm(channels)

    def forward(self, z: Latent, steps: Sequence[Propagation]) -> Latent:
        """Evolve the latent by one block."""
        return self.fuse(self.high(z, steps) + self.low(z))


@explained
class GraphAlterNet(GraphForecaster):
    """The graph counterpart of ST-AlterNet: graph convolution and attention in each block.

    A node's window is cut into patches of ``patch_size`` steps, each encoded to a token;
    ``n_layers`` blocks (`LatentEvolution`) mix the tokens of all nodes and patches; the decoder
    reads a node's tokens and nothing else, so the tapped latent holds all that the forecast adds:

        forecast = last reading + decoder(blocks(encoder(window, covariates, node)))

    The graph convolution carries information along the edges and, with weights of its own, against
    them. Taps are of the last block, (batch, patches, nodes, channels): ``latent``, and its
    branches ``latent_high`` and ``latent_low``.

    Args:
        horizon: steps to forecast.
        window: steps to read. Where it is no multiple of ``patch_size``, the first step is
            repeated in front.
        n_nodes: nodes of the graph.
        input_size, output_size: features of a reading and of a forecast, by default the same.
        exog_size: features of the covariates, 0 for none. All steps of the window are read.
        hidden_size: channels of the latent; a multiple of ``n_heads``.
        emb_size: length of a node's learned vector, 0 for none.
        n_layers: blocks.
        n_heads: attention heads.
        patch_size: steps in a token. More make a cheaper model.
        hops: edges that one graph convolution reaches across, in either direction.
        decoder_size: hidden channels of the decoder.
        dropout: probability inside blocks, encoder and decoder.
        emb_dropout: probability that a node's learned vector is zeroed in a training step.
        residual: whether the forecast adds to the last reading.
        attention: over nodes, ``exact``, or by ``landmarks``, whose time is linear in the nodes.
            ``auto`` is exact for up to 256 nodes; weights that are loaded decide anew, so that
            those of an earlier version, always exact, still fit. The model's repr says which.
        n_landmarks: in each block and head.

    Raises:
        ValueError: for sizes below 1, probabilities outside [0, 1), a ``hidden_size`` that is no
            multiple of ``n_heads``, or a residual forecast with other features than the readings;
            from ``forward``, for a shape, an index or a weight that does not fit.

    Example:
        >>> model = GraphAlterNet(n_nodes=3, window=12, horizon=6, exog_size=2)
        >>> edge_index = torch.tensor([[0, 1], [1, 2]])
        >>> x, u = torch.randn(8, 12, 3, 1), torch.randn(8, 12, 2)
        >>> model(x, edge_index, u=u).shape
        torch.Size([8, 6, 3, 1])
        >>> model.taps["latent_high"]
        'blocks.1.high'

    Source: Li et al., arXiv 2507.02939 (SDKD), ST-AlterNet, with a graph in place of the grid.
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
        attention: Attention = "auto",
        n_landmarks: int = 32,
    ) -> None:
        sizes = GraphSizes(horizon, window, n_nodes, input_size, output_size, exog_size, residual)
        check_sizes(hidden_size=hidden_size, n_layers=n_layers, n_heads=n_heads, hops=hops)
        check_sizes(patch_size=patch_size, decoder_size=decoder_size, n_landmarks=n_landmarks)
        check_choice("attention", attention, get_args(Attention))
        check_sizes(0, emb_size=emb_size)
        check_within("dropout", dropout, "[0, 1)")
        check_within("emb_dropout", emb_dropout, "[0, 1)")
        if hidden_size % n_heads:
            raise ValueError(
                f"`hidden_size` is {hidden_size}, expected a multiple of `n_heads={n_heads}`."
            )
        super().__init__(sizes, hidden_size, emb_size, emb_dropout, steps=patch_size)
        self.patch_size = patch_size
        n_patches = -(-window // patch_size)
        last = f"blocks.{n_layers - 1}"
        self.taps = {"latent": last, "latent_high": f"{last}.high", "latent_low": f"{last}.low"}
        self.position = nn.Parameter(torch.empty(n_patches, 1, hidden_size))
        nn.init.normal_(self.position, std=0.02)
        self.encoder = ResidualMLP(channels=hidden_size, dropout=dropout)
        auto = attention == "auto"
        exact = n_nodes <= EXACT_UP_TO if auto else attention == "exact"
        block: dict[str, Any]
        block = {"channels": hidden_size, "hops": hops, "heads": n_heads, "dropout": dropout}
        block |= {"n_landmarks": 0 if exact else n_landmarks, "auto": auto}
        self.blocks = nn.ModuleList(LatentEvolution(**block) for _ in range(n_layers))
        self.decoder = nn.Sequential(
            nn.Linear(n_patches * hidden_size, decoder_size),
            ResidualMLP(channels=decoder_size, dropout=dropout),
            nn.Linear(decoder_size, horizon * sizes.outputs),
        )

    def decoded(
        self, x: Tensor, u: Tensor | None, edge_index: Tensor | None, edge_weight: Tensor | None
    ) -> Tensor:
        """The decoder's output, (batch, nodes, horizon x outputs)."""
        edge_index = check_graph(edge_index, edge_weight, self.n_nodes)
        steps = [
            Propagation.over(edges, edge_weight, self.n_nodes, dtype=x.dtype)
            for edges in (edge_index, edge_index.flip(0))
        ]
        z = self.encode_window(self._patches(x)) + self.position
        z = self.encoder(self.with_context(z, None if u is None else self._patches(u)))
        for block in self.blocks:
            z = block(z, steps)
        return self.decoder(z.transpose(1, 2).flatten(2))

    def _patches(self, x: Tensor) -> Tensor:
        """(batch, time, nodes, features) to (batch, patches, nodes, patch_size x features)."""
        if missing := -x.shape[1] % self.patch_size:
            x = torch.cat([x[:, :1].expand(-1, missing, -1, -1), x], dim=1)
        return x.unflatten(1, (-1, self.patch_size)).transpose(2, 3).flatten(3)
