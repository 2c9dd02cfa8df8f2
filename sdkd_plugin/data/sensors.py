"""The speeds that sensors on roads measure, and the graph that joins the sensors."""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_finite, check_mask, check_not_negative, check_shape
from sdkd_plugin._explained import explained
from sdkd_plugin.data.reading import check_index


@explained
@dataclass(frozen=True, eq=False, kw_only=True)
class TrafficData:
    """Speeds measured by sensors on a road network, and the graph of these sensors.

    Args:
        speed: miles an hour; finite and not negative wherever ``mask`` is true, else perhaps NaN.
        mask: true where a sensor reported.
        edge_index: sources in row 0 and targets in row 1, int64.
        edge_weight: not negative.
        node_ids: a name for each sensor.
        index: the time of each row, in equal steps.
        source: where the data come from, for tables and logs.
        positions: of the sensors, east and north in one unit, for maps.

    Raises:
        ValueError: if the data are not so.

    Example:
        >>> speed = torch.tensor([[60.0, torch.nan], [55.0, 50.0]])
        >>> graph = {"edge_index": torch.tensor([[0], [1]]), "edge_weight": torch.tensor([0.5])}
        >>> index = pd.date_range("2012-03-01", periods=2, freq="5min")
        >>> more = {"node_ids": ("a", "b"), "index": index, "source": "two sensors"}
        >>> data = TrafficData(speed=speed, mask=~speed.isnan(), **graph, **more)
        >>> data.filled()
        tensor([[60., 50.],
                [55., 50.]])
    """

    speed: Float[Tensor, "time nodes"]
    mask: Bool[Tensor, "time nodes"]
    edge_index: Int[Tensor, "2 edges"]
    edge_weight: Float[Tensor, " edges"]
    node_ids: tuple[str, ...]
    index: pd.DatetimeIndex
    source: str
    positions: Float[Tensor, "nodes 2"] | None = None

    def __post_init__(self) -> None:
        if self.speed.ndim != 2 or not self.speed.is_floating_point():
            raise ValueError(
                f"`speed` is {self.speed.dtype} of shape {tuple(self.speed.shape)}, expected "
                "floating point of shape (time, nodes)."
            )
        steps, nodes = self.speed.shape
        check_shape("mask", self.mask.shape, self.speed.shape, "as `speed` has")
        check_mask(self.mask, self.speed)
        if not bool(self.mask.any()):
            raise ValueError("`mask` is false everywhere, expected at least one observed reading.")
        check_not_negative("speed", self.speed[self.mask], "mask out markers of missing readings")
        if len(self.node_ids) != nodes or len(set(self.node_ids)) != nodes:
            raise ValueError(
                f"`node_ids` has {len(self.node_ids)} names, {len(set(self.node_ids))} different "
                f"ones, expected {nodes} different ones, one for each column of `speed`."
            )
        edges = self.edge_index
        if edges.ndim != 2 or len(edges) != 2 or edges.dtype != torch.int64:
            raise ValueError(
                f"`edge_index` is {edges.dtype} of shape {tuple(edges.shape)}, expected "
                "torch.int64 of shape (2, edges)."
            )
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < nodes:
            raise ValueError(
                f"`edge_index` refers to nodes {int(edges.min())} to {int(edges.max())}, expected "
                f"0 to {nodes - 1}."
            )
        check_shape("edge_weight", self.edge_weight.shape, edges.shape[1:], "one for each edge")
        check_not_negative("edge_weight", self.edge_weight, "weights are similarities")
        check_index("`index`", self.index, steps, equal_steps=True)
        if self.positions is not None:
            check_shape("positions", self.positions.shape, (nodes, 2), "one for each sensor")
            check_finite("positions", self.positions)

    def filled(self) -> Float[Tensor, "time nodes"]:
        """Speeds without gaps: a sensor's last reading, or its first one where there is none yet.

        A sensor that never reported has the mean of the others.
        """
        steps = torch.arange(self.speed.shape[0], device=self.speed.device).unsqueeze(1)
        last = torch.where(self.mask, steps, -1).cummax(dim=0).values
        first = self.mask.int().argmax(dim=0)
        filled = self.speed.gather(0, torch.where(last < 0, first, last))
        silent = ~self.mask.any(dim=0)
        if bool(silent.any()):
            filled[:, silent] = filled[:, ~silent].mean(dim=1, keepdim=True)
        return filled
