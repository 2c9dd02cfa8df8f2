"""Road traffic as data: the speeds of sensors and the graph that joins them.

What lives here: :class:`TrafficData`, its checks, and the filling of gaps.
What doesn't: where the data come from (``traffic`` reads files, ``traffic_simulator`` makes them
up), and windows, scalers and splits, which are tsl's.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdkd_plugin._checks import check_finite, check_shape


@dataclass(frozen=True, eq=False, kw_only=True)
class TrafficData:
    """Speeds measured by sensors on a road network, and the graph of these sensors.

    Args:
        speed: miles an hour, ``(time, nodes)``; finite and not negative wherever ``mask`` is true.
            What was not measured may be NaN, so that an unmasked use shows at once (see
            :meth:`filled`).
        mask: true where a sensor reported, ``(time, nodes)``.
        edge_index: sources in row 0 and targets in row 1, int64 ``(2, edges)``.
        edge_weight: not negative, ``(edges,)``.
        node_ids: a name for each sensor.
        index: the time of each row, in equal steps.
        source: where the data come from, as a sentence fragment for tables and logs.
        positions: for maps, east then north, ``(nodes, 2)``: longitude and latitude in degrees for
            measured traffic, miles for simulated traffic.

    Raises:
        ValueError: where shapes, types, indices, weights, times or observed speeds are not so.

    Example:
        >>> data = TrafficData(
        ...     speed=torch.tensor([[60.0, float("nan")], [55.0, 50.0]]),
        ...     mask=torch.tensor([[True, False], [True, True]]),
        ...     edge_index=torch.tensor([[0], [1]]),
        ...     edge_weight=torch.tensor([0.5]),
        ...     node_ids=("a", "b"),
        ...     index=pd.date_range("2012-03-01", periods=2, freq="5min"),
        ...     source="two sensors",
        ... )
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
        self._check_speed()
        self._check_graph()
        self._check_index()

    def _check_speed(self) -> None:
        if self.speed.ndim != 2 or not self.speed.is_floating_point():
            raise ValueError(
                f"`speed` is {self.speed.dtype} of shape {tuple(self.speed.shape)}, expected "
                "floating point of shape (time, nodes)."
            )
        check_shape("mask", self.mask.shape, self.speed.shape, "as `speed` has")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"`mask` is {self.mask.dtype}, expected torch.bool; true is observed.")
        if not bool(self.mask.any()):
            raise ValueError("`mask` is false everywhere, expected at least one observed reading.")
        observed = self.speed[self.mask]
        check_finite("speed", observed)
        if bool((observed < 0).any()):
            raise ValueError(
                f"`speed` has observed readings down to {float(observed.min()):g} miles an hour, "
                "expected none below 0; mask out markers for missing readings."
            )

    def _check_graph(self) -> None:
        nodes = self.speed.shape[1]
        if len(self.node_ids) != nodes or len(set(self.node_ids)) != nodes:
            raise ValueError(
                f"`node_ids` has {len(self.node_ids)} names, {len(set(self.node_ids))} different "
                f"ones, expected {nodes} different ones, one for each column of `speed`."
            )
        if self.positions is not None:
            check_shape("positions", self.positions.shape, (nodes, 2), "one point for each sensor")
            check_finite("positions", self.positions)
        if self.edge_index.ndim != 2 or self.edge_index.shape[0] != 2:
            raise ValueError(
                f"`edge_index` has shape {tuple(self.edge_index.shape)}, expected (2, edges)."
            )
        if self.edge_index.dtype != torch.int64:
            raise ValueError(f"`edge_index` is {self.edge_index.dtype}, expected torch.int64.")
        edges = self.edge_index.shape[1]
        check_shape("edge_weight", self.edge_weight.shape, (edges,), "one weight for each edge")
        if edges == 0:
            return
        low, high = int(self.edge_index.min()), int(self.edge_index.max())
        if low < 0 or high >= nodes:
            raise ValueError(
                f"`edge_index` refers to nodes {low} to {high}, expected 0 to {nodes - 1}."
            )
        check_finite("edge_weight", self.edge_weight)
        if bool((self.edge_weight < 0).any()):
            raise ValueError(
                f"`edge_weight` goes down to {float(self.edge_weight.min()):g}, expected no "
                "negative weight; weights are similarities, not distances."
            )

    def _check_index(self) -> None:
        if len(self.index) != self.speed.shape[0]:
            raise ValueError(
                f"`index` has {len(self.index)} times, expected {self.speed.shape[0]}, one for "
                "each row of `speed`."
            )
        steps = np.diff(self.index.to_numpy())
        zero = np.timedelta64(0)
        if self.index.hasnans or (len(steps) and (steps[0] <= zero or (steps != steps[0]).any())):
            raise ValueError(
                "`index` does not go forward in equal steps; sort it and reindex to a regular "
                "frequency, masking out the rows that are new."
            )

    def filled(self) -> Float[Tensor, "time nodes"]:
        """Speeds without gaps, as model inputs need them; the mask still says what was measured.

        A gap holds the sensor's last reading before it; what lies before its first reading holds
        that one. A sensor that never reported holds the mean of the others.

        Returns:
            A new tensor like ``speed``, finite everywhere.
        """
        steps = torch.arange(self.speed.shape[0], device=self.speed.device).unsqueeze(1)
        last = torch.where(self.mask, steps, -1).cummax(dim=0).values
        first = self.mask.int().argmax(dim=0)
        filled = self.speed.gather(0, torch.where(last < 0, first, last))
        silent = ~self.mask.any(dim=0)
        if bool(silent.any()):
            filled[:, silent] = filled[:, ~silent].mean(dim=1, keepdim=True)
        return filled
