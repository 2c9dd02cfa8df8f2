"""What the graph models share: checks, encoders, propagation over edges, small layers.

A graph's Laplacian and its eigenvectors belong to `sdkd_plugin.spectral`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sdkd_plugin._checks import check_sizes, check_type

# Up to this many nodes an adjacency matrix (4 MiB in float32) and one matrix product are faster
# than a message an edge, on CPUs and GPUs, and export to standard operators alone.
DENSE_UP_TO = 1024
# On CPUs a sparse matrix is faster where fewer than one in so many entries are edges.
SPARSE_BELOW = 1 / 50


@dataclass(frozen=True)
class GraphSizes:
    """What a graph model reads and forecasts; ``output_size=None`` is that of the input."""

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
        if not isinstance(x, Tensor):
            check_type("x", x, Tensor, "a batch of readings")
        if x.ndim != 4:
            raise ValueError(
                f"`x` has shape {tuple(x.shape)}, expected (batch, time, nodes, features); "
                "a single feature still needs its axis: `x.unsqueeze(-1)`."
            )
        axes = {"window": "time steps", "n_nodes": "nodes", "input_size": "features"}
        for (argument, what), got in zip(axes.items(), x.shape[1:], strict=True):
            if got != (want := getattr(self, argument)):
                raise ValueError(
                    f"`x` has {got} {what}, expected {want}, since the model was built with "
                    f"`{argument}={want}`."
                )
        if u is None and not self.exog_size:
            return None
        given = "is None" if u is None else f"has shape {tuple(u.shape)}"
        shapes = [(*x.shape[:n], self.exog_size) for n in (2, 3)]
        if u is None or not self.exog_size or tuple(u.shape) not in shapes:
            wanted = f"covariates {shapes[0]} (shared by all nodes) or {shapes[1]}"
            raise ValueError(
                f"`u` {given}, expected {wanted if self.exog_size else None}: the model was built "
                f"with `exog_size={self.exog_size}`, the number of covariates' features."
            )
        return u.unsqueeze(2) if u.ndim == 3 else u


def check_graph(edge_index: Tensor | None, edge_weight: Tensor | None, n_nodes: int) -> Tensor:
    """Return the edges; refuse nodes that do not exist and weights that are negative or not finite.

    On a GPU this waits for the device. Values are not checked in compilation or export.
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
            f"`edge_index` has indices from {low} to {high}, expected 0 to {n_nodes - 1}, since "
            f"the model was built with `n_nodes={n_nodes}`."
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
    where none points at i. It is made in every forward pass, since a batch brings its graph.
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
        source, target = edge_index.long().unbind()
        weight = torch.ones_like(source) if edge_weight is None else edge_weight
        weight = weight.to(dtype).where(source != target, 0)
        degree = weight.new_zeros(n_nodes).index_add(0, target, weight)
        weight = weight / degree.where(degree > 0, 1)[target]
        small, shape = n_nodes <= DENSE_UP_TO, (n_nodes, n_nodes)
        # In compilation and export a comparison would fix the number of edges.
        sparse = weight.device.type == "cpu" and not torch.compiler.is_compiling()
        if sparse and (not small or len(weight) < SPARSE_BELOW * n_nodes**2):
            places = torch.stack([target, source])
            matrix = torch.sparse_coo_tensor(places, weight, shape, check_invariants=False)
            return cls(source, target, weight, matrix)
        if not small:
            return cls(source, target, weight)
        matrix = weight.new_zeros(shape).index_put((target, source), weight, accumulate=True)
        return cls(source, target, weight, matrix)

    def __call__(
        self, x: Float[Tensor, "*batch nodes channels"]
    ) -> Float[Tensor, "*batch nodes channels"]:
        """Propagate fields on the nodes by one step."""
        if self.matrix is not None and self.matrix.is_sparse:
            nodes_first = x.movedim(-2, 0)
            out = torch.sparse.mm(self.matrix, nodes_first.flatten(1))
            return out.view(nodes_first.shape).movedim(0, -2)
        if self.matrix is not None:
            return self.matrix @ x
        messages = x.index_select(-2, self.source) * self.weight[:, None]
        out = torch.zeros(x.shape, dtype=messages.dtype, device=x.device)
        return out.index_add(-2, self.target, messages)


class NodeEmbedding(nn.Module):
    """A learned vector for every node.

    In training a node's whole vector is zeroed with probability ``dropout``, for all samples of a
    batch at once, lest a model memorise a short training series node by node.
    """

    def __init__(self, n_nodes: int, emb_size: int, *, dropout: float = 0.0) -> None:
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


class GraphForecaster(nn.Module, ABC):
    """What both graph models do: check a batch, encode its parts, add to the last reading.

    Encoders read ``steps`` steps at once, of ``copies`` fields of readings. Covariates have their
    own, so that those shared by all nodes are encoded once, not once a node.
    """

    taps: dict[str, str]

    def __init__(
        self, sizes: GraphSizes, hidden: int, emb: int, dropout: float, steps: int, copies: int = 1
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.n_nodes = sizes.n_nodes
        self.encode_window = nn.Linear(steps * sizes.input_size * copies, hidden)
        exog = steps * sizes.exog_size
        self.encode_exog = nn.Linear(exog, hidden, bias=False) if exog else None
        self.embedding = NodeEmbedding(sizes.n_nodes, emb, dropout=dropout) if emb else None
        self.encode_node = nn.Linear(emb, hidden, bias=False) if emb else None

    def with_context(self, z: Tensor, u: Tensor | None) -> Tensor:
        """Add encoded covariates and node embeddings to encoded readings."""
        if self.encode_exog is not None and u is not None:
            z = z + self.encode_exog(u)
        if self.embedding is not None and self.encode_node is not None:
            z = z + self.encode_node(self.embedding())
        return z

    @abstractmethod
    def decoded(
        self, x: Tensor, u: Tensor | None, edge_index: Tensor | None, edge_weight: Tensor | None
    ) -> Float[Tensor, "batch nodes steps_outputs"]:
        """What a forecast adds to the last reading, from checked readings and covariates."""

    def forward(
        self,
        x: Float[Tensor, "batch time nodes features"],
        edge_index: Int[Tensor, "2 edges"] | None = None,
        edge_weight: Float[Tensor, " edges"] | None = None,
        u: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch horizon nodes outputs"]:
        """Forecast the steps after the window.

        Args:
            x: readings.
            edge_index: sources and targets; a `GraphMixer` with ``hops=0`` needs none.
            edge_weight: weights of at least 0; by default 1 for every edge.
            u: covariates, (batch, time, exog) or (batch, time, nodes, exog).
        """
        out = self.decoded(x, self.sizes.checked(x, u), edge_index, edge_weight)
        out = out.unflatten(-1, (self.sizes.horizon, self.sizes.outputs)).transpose(1, 2)
        return x[:, -1:] + out if self.sizes.residual else out
