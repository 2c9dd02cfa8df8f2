"""What the graph models share: input checks, propagation over edges, and small layers.

Here live the checks of a batch and of a graph against the sizes a model was built for, one step of
row-normalised propagation (dense for small graphs, over the edge list for large ones), the node
embedding and the residual MLP block. No model lives here, and nothing spectral: a graph's Laplacian
and its eigenvectors belong to `sdkd_plugin.spectral`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Up to this many nodes an adjacency matrix (4 MiB in float32) and one matrix product beat gathering
# a message an edge, on a CPU and on a GPU alike, and nothing but standard operators is exported.
DENSE_UP_TO = 1024


def output_size_of(input_size: int, output_size: int | None, residual: bool) -> int:
    """The number of forecast features; ``None`` means as many as are read.

    Raises:
        ValueError: if a residual forecast has another number of features than the readings.
    """
    size = input_size if output_size is None else output_size
    if residual and size != input_size:
        raise ValueError(
            f"`output_size` is {size} and `input_size` is {input_size}; a residual adds to "
            "the last reading, so they must be equal. Pass `residual=False`."
        )
    return size


def check_fraction(argument: str, got: float) -> None:
    """Refuse a dropout probability outside [0, 1).

    Raises:
        ValueError: naming the argument and what it was.
    """
    if not 0 <= got < 1:
        raise ValueError(f"`{argument}` is {got!r}, expected a probability in [0, 1).")


def check_batch(x: Tensor, *, window: int, n_nodes: int, input_size: int) -> None:
    """Refuse readings of another shape than ``(batch, window, n_nodes, input_size)``.

    Raises:
        ValueError: naming the axis that differs, what it was and what was expected.
    """
    if x.ndim != 4:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}, expected (batch, time, nodes, features); "
            "a single feature still needs its axis: `x.unsqueeze(-1)`."
        )
    expected = {"time steps": window, "nodes": n_nodes, "features": input_size}
    arguments = ("window", "n_nodes", "input_size")
    for (what, want), got, argument in zip(expected.items(), x.shape[1:], arguments, strict=True):
        if got != want:
            raise ValueError(
                f"`x` has {got} {what}, expected {want}, since the model was built with "
                f"`{argument}={want}`."
            )


def covariates(u: Tensor | None, x: Tensor, exog_size: int) -> Tensor | None:
    """Covariates as ``(batch, time, nodes, exog_size)``, with one node where all share them.

    Raises:
        ValueError: if they are missing, unexpected, or of another shape than `x` allows.
    """
    if u is None:
        if exog_size > 0:
            raise ValueError(
                f"`u` is None, expected covariates, since the model was built with "
                f"`exog_size={exog_size}`."
            )
        return None
    if exog_size == 0:
        raise ValueError(
            f"`u` has shape {tuple(u.shape)}, expected None, since the model was built with "
            f"`exog_size=0`; pass `exog_size={u.shape[-1]}` to use covariates."
        )
    batch, time, nodes, _ = x.shape
    shared, per_node = (batch, time, exog_size), (batch, time, nodes, exog_size)
    if tuple(u.shape) not in (shared, per_node):
        raise ValueError(
            f"`u` has shape {tuple(u.shape)}, expected {shared} (shared by all nodes) or "
            f"{per_node}."
        )
    return u.unsqueeze(2) if u.ndim == 3 else u


def check_graph(edge_index: Tensor | None, edge_weight: Tensor | None, n_nodes: int) -> Tensor:
    """The edges, unless they lead to nodes that do not exist or have a weight that is no weight.

    On a GPU this waits for the device. It is skipped while the model is compiled or exported,
    where values are unknown.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    if edge_index is None:
        raise ValueError("`edge_index` is None, expected the graph's edges, shape (2, edges).")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(
            f"`edge_index` has shape {tuple(edge_index.shape)}, expected (2, edges): sources, "
            "targets."
        )
    edges = edge_index.shape[1]
    if edge_weight is not None and tuple(edge_weight.shape) != (edges,):
        raise ValueError(
            f"`edge_weight` has shape {tuple(edge_weight.shape)}, expected ({edges},), one weight "
            "for each edge of `edge_index`."
        )
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


def normalised_weights(
    edge_index: Int[Tensor, "2 edges"],
    edge_weight: Float[Tensor, " edges"] | None,
    n_nodes: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " edges"]:
    """Edge weights that sum to 1 over the edges into each node, self loops set to 0.

    w_ij / sum_k w_ik for the edge from j to i. A node without incoming edges has none to weigh.

    Args:
        edge_index: sources and targets.
        edge_weight: weights of at least 0; ``None`` counts every edge once.
        n_nodes: number of nodes.
        dtype: of the result.

    Returns:
        One weight an edge.

    Example:
        >>> import torch
        >>> normalised_weights(torch.tensor([[0, 1, 2], [2, 2, 2]]), torch.tensor([1.0, 3, 9]), 3)
        tensor([0.2500, 0.7500, 0.0000])
    """
    source, target = edge_index[0].long(), edge_index[1].long()
    if edge_weight is None:
        weight = torch.ones(source.shape, dtype=dtype, device=edge_index.device)
    else:
        weight = edge_weight.to(dtype)
    weight = torch.where(source == target, torch.zeros_like(weight), weight)
    degree = torch.zeros(n_nodes, dtype=dtype, device=weight.device)
    degree = degree.index_add(0, target, weight)
    degree = torch.where(degree > 0, degree, torch.ones_like(degree))
    return weight / degree[target]


@dataclass(frozen=True, eq=False)
class Propagation:
    """One step over the edges: each node's weighted sum over the nodes that point at it.

    (P x)_i = sum over edges from j to i of w_ij x_j, and 0 where none points at i. Made once a
    forward pass and used by all layers, since the graph comes with the batch.

    Args:
        source: first ends of the edges, (edges,).
        target: second ends, (edges,).
        weight: one weight an edge, as of `normalised_weights`.
        matrix: the same weights as (target, source) entries of a dense matrix, or ``None`` to
            gather and add a message an edge.

    Example:
        >>> import torch
        >>> step = Propagation.over(torch.tensor([[0], [1]]), None, 2)
        >>> step(torch.tensor([[1.0], [5.0]]))
        tensor([[0.],
                [1.]])
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
        """Row-normalised propagation from sources to targets."""
        source, target = edge_index[0].long(), edge_index[1].long()
        weight = normalised_weights(edge_index, edge_weight, n_nodes, dtype=dtype)
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
    """A learned vector for every node, dropped whole with probability `dropout` in training.

    Dropping whole vectors, for all samples of a batch at once, keeps a short training series from
    being memorised node by node: the forecast has to do without the identity now and then.

    Args:
        n_nodes: number of nodes.
        emb_size: length of a vector.
        dropout: probability of a node's vector being zeroed in a training step.

    Example:
        >>> NodeEmbedding(n_nodes=207, emb_size=8)().shape
        torch.Size([207, 8])
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


class ResidualMLP(nn.Module):
    """A residual channel-mixing block, x + W2 gelu(W1 norm(x)).

    Args:
        channels: length of a node's vector, kept.
        expansion: hidden channels for each channel.
        dropout: probability, on the hidden channels.

    Example:
        >>> import torch
        >>> ResidualMLP(channels=4)(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, *, channels: int, expansion: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, expansion * channels)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(expansion * channels, channels)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """Mix the channels of every node by itself."""
        return x + self.down(self.drop(nn.functional.gelu(self.up(self.norm(x)))))
