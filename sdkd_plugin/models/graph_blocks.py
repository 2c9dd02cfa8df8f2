"""What the graph models share: sizes and checks, propagation over edges, small layers.

A graph's Laplacian and its eigenvectors belong to `sdkd_plugin.spectral`.
"""

from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sdkd_plugin._checks import check_sizes, shown

# Up to this many nodes an adjacency matrix (4 MiB in float32) and one matrix product beat gathering
# a message an edge, on a CPU and on a GPU alike, and nothing but standard operators is exported.
DENSE_UP_TO = 1024


def check_probabilities(**options: object) -> None:
    """Refuse dropout probabilities outside [0, 1)."""
    for argument, got in options.items():
        if isinstance(got, bool) or not isinstance(got, Real) or not 0 <= float(got) < 1:
            raise ValueError(f"`{argument}` is {shown(got)}, expected a probability in [0, 1).")


@dataclass(frozen=True)
class GraphSizes:
    """What a graph model reads and forecasts. ``output_size=None`` becomes ``input_size``."""

    horizon: int
    window: int
    n_nodes: int
    input_size: int
    output_size: int | None
    exog_size: int
    residual: bool

    def __post_init__(self) -> None:
        check_sizes(horizon=self.horizon, window=self.window, n_nodes=self.n_nodes)
        check_sizes(input_size=self.input_size, output_size=self.outputs)
        check_sizes(0, exog_size=self.exog_size)
        if self.residual and self.outputs != self.input_size:
            raise ValueError(
                f"`output_size` is {self.outputs} and `input_size` is {self.input_size}; a "
                "residual adds to the last reading, so they must be equal. Pass `residual=False`."
            )

    @property
    def outputs(self) -> int:
        """Features of a forecast."""
        return self.input_size if self.output_size is None else self.output_size

    def checked(self, x: Tensor, u: Tensor | None) -> Tensor | None:
        """Check a batch; return ``u`` with a node axis, of length 1 where all nodes share it."""
        if x.ndim != 4:
            raise ValueError(
                f"`x` has shape {tuple(x.shape)}, expected (batch, time, nodes, features); "
                "a single feature still needs its axis: `x.unsqueeze(-1)`."
            )
        axes = {"window": "time steps", "n_nodes": "nodes", "input_size": "features"}
        for (argument, what), got in zip(axes.items(), x.shape[1:], strict=True):
            want = getattr(self, argument)
            if got != want:
                raise ValueError(
                    f"`x` has {got} {what}, expected {want}, since the model was built with "
                    f"`{argument}={want}`."
                )
        built = f"since the model was built with `exog_size={self.exog_size}`"
        if u is None:
            if self.exog_size:
                raise ValueError(f"`u` is None, expected covariates, {built}.")
            return None
        if not self.exog_size:
            raise ValueError(
                f"`u` has shape {tuple(u.shape)}, expected None, {built}; pass "
                f"`exog_size={u.shape[-1]}` to use covariates."
            )
        shared = (*x.shape[:2], self.exog_size)
        per_node = (*x.shape[:3], self.exog_size)
        if tuple(u.shape) not in (shared, per_node):
            raise ValueError(
                f"`u` has shape {tuple(u.shape)}, expected {shared} (shared by all nodes) or "
                f"{per_node}."
            )
        return u.unsqueeze(2) if u.ndim == 3 else u

    def forecast(self, out: Tensor, x: Tensor) -> Tensor:
        """The forecast, from (batch, nodes, horizon * outputs) and the window."""
        out = out.unflatten(-1, (self.horizon, self.outputs)).transpose(1, 2)
        return x[:, -1:] + out if self.residual else out


def check_graph(edge_index: Tensor | None, edge_weight: Tensor | None, n_nodes: int) -> Tensor:
    """Return the edges; refuse nodes that do not exist and weights that are negative or not finite.

    On a GPU this waits for the device. Values are not checked while the model is compiled or
    exported.
    """
    if edge_index is None or edge_index.ndim != 2 or edge_index.shape[0] != 2:
        got = "is None" if edge_index is None else f"has shape {tuple(edge_index.shape)}"
        raise ValueError(f"`edge_index` {got}, expected (2, edges): sources, targets.")
    edges = edge_index.shape[1]
    if edge_weight is not None and tuple(edge_weight.shape) != (edges,):
        got = str(tuple(edge_weight.shape))
        raise ValueError(f"`edge_weight` has shape {got}, expected ({edges},), a weight an edge.")
    if torch.compiler.is_compiling() or edges == 0:
        return edge_index
    low, high = torch.stack(edge_index.aminmax()).tolist()
    if low < 0 or high >= n_nodes:
        raise ValueError(
            f"`edge_index` has indices from {low} to {high}, expected 0 to "
            f"{n_nodes - 1}, since the model was built with `n_nodes={n_nodes}`."
        )
    if edge_weight is None:
        return edge_index
    least, most = torch.stack(edge_weight.detach().aminmax()).tolist()
    if not (least >= 0 and most < float("inf")):  # NaN fails both comparisons
        raise ValueError(
            f"`edge_weight` has values from {least:g} to {most:g}, expected finite ones "
            "of at least 0; a similarity may be clamped, a distance must be turned into one."
        )
    return edge_index


@dataclass(frozen=True, eq=False)
class Propagation:
    """One step over the edges: each node's weighted mean over the nodes that point at it.

    (P x)_i = sum_j w_ij x_j / sum_j w_ij over the edges from j to i, self loops left out, and 0
    where none points at i. It is made once in a forward pass, since the graph comes with the batch.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    matrix: Tensor | None = None

    @classmethod
    def over(
        cls,
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None,
        n_nodes: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "Propagation":
        """Propagation from sources to targets; without weights every edge has weight 1."""
        source, target = edge_index[0].long(), edge_index[1].long()
        if edge_weight is None:
            weight = torch.ones(source.shape, dtype=dtype, device=edge_index.device)
        else:
            weight = edge_weight.to(dtype)
        weight = torch.where(source == target, torch.zeros_like(weight), weight)
        degree = torch.zeros(n_nodes, dtype=dtype, device=weight.device)
        degree = degree.index_add(0, target, weight)
        degree = torch.where(degree > 0, degree, torch.ones_like(degree))
        weight = weight / degree[target]
        if n_nodes > DENSE_UP_TO:
            return cls(source, target, weight)
        matrix = torch.zeros(n_nodes, n_nodes, dtype=dtype, device=weight.device)
        matrix = matrix.index_put((target, source), weight, accumulate=True)
        return cls(source, target, weight, matrix)

    def __call__(
        self, x: Float[Tensor, "*batch nodes channels"]
    ) -> Float[Tensor, "*batch nodes channels"]:
        """Propagate fields on the nodes by one step."""
        if self.matrix is not None:
            return self.matrix @ x
        messages = x.index_select(-2, self.source) * self.weight[:, None]
        out = torch.zeros(x.shape, dtype=messages.dtype, device=x.device)
        return out.index_add(-2, self.target, messages)


class NodeEmbedding(nn.Module):
    """A learned vector for every node.

    In training a node's whole vector is zeroed with probability ``dropout``, for all samples of a
    batch at once. This keeps the model from memorising a short training series node by node.
    """

    def __init__(self, *, n_nodes: int, emb_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(n_nodes, emb_size))
        nn.init.normal_(self.weight, std=0.1)

    def forward(self) -> Float[Tensor, "nodes emb"]:
        """The vectors of all nodes."""
        if not self.training or self.dropout == 0:
            return self.weight
        kept = nn.functional.dropout(self.weight.new_ones(self.weight.shape[0], 1), self.dropout)
        return self.weight * kept


def encoders(
    sizes: GraphSizes, hidden: int, emb_size: int, dropout: float, *, steps: int, copies: int = 1
) -> tuple[nn.Linear, nn.Linear | None, NodeEmbedding | None, nn.Linear | None]:
    """Encoder of readings; and, or None, encoder of covariates, node embedding and its encoder.

    They encode ``steps`` steps at once, of ``copies`` fields of readings. Covariates have their own
    encoder, so that those shared by all nodes are encoded once, not once a node.
    """
    window = nn.Linear(steps * sizes.input_size * copies, hidden)
    exog = nn.Linear(steps * sizes.exog_size, hidden, bias=False) if sizes.exog_size else None
    if not emb_size:
        return window, exog, None, None
    embedding = NodeEmbedding(n_nodes=sizes.n_nodes, emb_size=emb_size, dropout=dropout)
    return window, exog, embedding, nn.Linear(emb_size, hidden, bias=False)


class ResidualMLP(nn.Module):
    """A residual MLP over the channels, x + W2 gelu(W1 norm(x)), dropout on the hidden ones."""

    def __init__(self, *, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, channels)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """Mix the channels of every node by itself."""
        return x + self.down(self.drop(nn.functional.gelu(self.up(self.norm(x)))))
