"""The cell transmission model of road traffic, on any network of merges and diverges.

What lives here: :class:`RoadNetwork`, one step of the model (:func:`cell_flows`), and its run over
time (:func:`transmit`).
What doesn't: which roads there are, who drives when, and what a detector makes of it
(``road_network``, ``traffic_simulator``).

Units: miles, hours, vehicles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from sdkd_plugin._checks import check_positive, check_shape


@dataclass(frozen=True, eq=False, kw_only=True)
class RoadNetwork:
    """Road cells with a triangular fundamental diagram, and the junctions that join them.

    Flow rises with density at the free speed up to the capacity, then falls at the wave speed
    ``capacity / (jam_density - capacity / free_speed)`` to zero at the jam density. Every cell has
    exactly one junction at either end.

    Args:
        length: miles, ``(cells,)``.
        free_speed: miles an hour, ``(cells,)``.
        capacity: vehicles an hour over all lanes, ``(cells,)``.
        jam_density: vehicles a mile over all lanes, ``(cells,)``.
        links: from and to, ``(links, 2)``.
        merges: from the main road, from the ramp, and to, ``(merges, 3)``.
        priority: the share of a contested merge that the main road gets, ``(merges,)``, in (0, 1).
        diverges: from, to the main road, and to the ramp, ``(diverges, 3)``.
        split: the share that takes the ramp, ``(diverges,)``, in (0, 1).
        turning_lane: true where those who take the ramp queue in a lane of their own, so that
            neither way blocks the other, ``(diverges,)``; false for first in, first out.
        sources: cells that drivers enter from a queue outside, ``(sources,)``.
        sinks: cells that drivers leave unhindered, ``(sinks,)``.

    Raises:
        ValueError: where a number is out of range or a cell has not one junction at either end.

    Example:
        >>> RoadNetwork.straight(3).wave_speed.round(1)
        array([12.6, 12.6, 12.6])

    Source:
        Daganzo, The cell transmission model, Transportation Research B 28 (1994) 269-287, and
        part II: Network traffic, 29 (1995) 79-93.
    """

    length: Float[np.ndarray, " cells"]
    free_speed: Float[np.ndarray, " cells"]
    capacity: Float[np.ndarray, " cells"]
    jam_density: Float[np.ndarray, " cells"]
    links: Int[np.ndarray, "links 2"]
    merges: Int[np.ndarray, "merges 3"]
    priority: Float[np.ndarray, " merges"]
    diverges: Int[np.ndarray, "diverges 3"]
    split: Float[np.ndarray, " diverges"]
    turning_lane: Bool[np.ndarray, " diverges"]
    sources: Int[np.ndarray, " sources"]
    sinks: Int[np.ndarray, " sinks"]

    def __post_init__(self) -> None:
        for name in ("length", "free_speed", "capacity", "jam_density"):
            values = getattr(self, name)
            check_shape(name, values.shape, self.length.shape, "as `length` has")
            if not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"`{name}` is {values}, expected finite numbers above 0.")
        if not (self.jam_density > self.capacity / self.free_speed).all():
            raise ValueError(
                "`jam_density` must lie above `capacity / free_speed`, the density at capacity."
            )
        check_shape("turning_lane", self.turning_lane.shape, (len(self.diverges),))
        for name, junctions in (("priority", self.merges), ("split", self.diverges)):
            values = getattr(self, name)
            check_shape(name, values.shape, (len(junctions),), "one number for each junction")
            if not ((values > 0) & (values < 1)).all():
                raise ValueError(f"`{name}` is {values}, expected shares above 0 and below 1.")
        ends = {
            "downstream": (self.links[:, 0], self.merges[:, :2], self.diverges[:, 0], self.sinks),
            "upstream": (self.links[:, 1], self.merges[:, 2], self.diverges[:, 1:], self.sources),
        }
        for end, cells in ends.items():
            joined = np.sort(np.concatenate([each.ravel() for each in cells]))
            if not np.array_equal(joined, np.arange(len(self.length))):
                raise ValueError(
                    f"junctions hold the {end} ends of cells {joined.tolist()}, expected each of "
                    f"0 to {len(self.length) - 1} exactly once."
                )

    @classmethod
    def straight(
        cls,
        cells: int,
        *,
        length: float = 0.3,
        free_speed: float = 65.0,
        capacity: float = 6000.0,
        jam_density: float = 570.0,
    ) -> "RoadNetwork":
        """One road without ramps: a source, ``cells`` equal cells in a row, a sink."""
        order = np.arange(cells)
        return cls(
            length=np.full(cells, length),
            free_speed=np.full(cells, free_speed),
            capacity=np.full(cells, capacity),
            jam_density=np.full(cells, jam_density),
            links=np.stack([order[:-1], order[1:]], axis=1),
            merges=np.empty((0, 3), dtype=np.int64),
            priority=np.empty(0),
            diverges=np.empty((0, 3), dtype=np.int64),
            split=np.empty(0),
            turning_lane=np.empty(0, dtype=bool),
            sources=order[:1],
            sinks=order[-1:],
        )

    @property
    def wave_speed(self) -> Float[np.ndarray, " cells"]:
        """How fast queues dissolve upstream, miles an hour."""
        return self.capacity / (self.jam_density - self.capacity / self.free_speed)

    def edges(self) -> tuple[Int[np.ndarray, "edges 2"], Float[np.ndarray, " edges"]]:
        """Every way from a cell to the next, and the share of the cell's drivers who take it."""
        pairs = (
            self.links,
            self.merges[:, [0, 2]],
            self.merges[:, [1, 2]],
            self.diverges[:, [0, 1]],
            self.diverges[:, [0, 2]],
        )
        certain = np.ones(len(self.links) + 2 * len(self.merges))
        return np.concatenate(pairs), np.concatenate([certain, 1 - self.split, self.split])

    def steady_flow(
        self, demand: Float[np.ndarray, "*times sources"]
    ) -> Float[np.ndarray, "*times cells"]:
        """The flow through every cell, vehicles an hour, if no capacity were in the way."""
        pairs, shares = self.edges()
        cells = len(self.length)
        balance = np.eye(cells)
        balance[pairs[:, 1], pairs[:, 0]] -= shares
        entering = np.zeros((*demand.shape[:-1], cells))
        entering[..., self.sources] = demand
        flow: np.ndarray = np.linalg.solve(balance, entering[..., None])[..., 0]
        return flow


class TrafficHistory(NamedTuple):
    """What :func:`transmit` saw, with one row for each interval.

    ``speed`` is the distance driven over the time spent (miles an hour, Edie's definition) and
    ``flow`` the vehicles an hour that left a cell, both means over the interval; ``vehicles`` is
    the count at its end. ``arrived`` (those that wanted to enter), ``left`` and ``waiting`` (in
    queues outside) are totals of the network: arrived = left + waiting + vehicles.sum() - initial.
    """

    speed: Float[np.ndarray, "intervals cells"]
    flow: Float[np.ndarray, "intervals cells"]
    vehicles: Float[np.ndarray, "intervals cells"]
    arrived: Float[np.ndarray, " intervals"]
    left: Float[np.ndarray, " intervals"]
    waiting: Float[np.ndarray, " intervals"]


class CellFlows(NamedTuple):
    """Vehicles that cross each cell's downstream and upstream end in one step, ``(cells,)``."""

    out: Float[np.ndarray, " cells"]
    into: Float[np.ndarray, " cells"]


def cell_flows(
    network: RoadNetwork,
    vehicles: Float[np.ndarray, " cells"],
    waiting: Float[np.ndarray, " sources"],
    time_step: float,
    capacity: Float[np.ndarray, " cells"] | None = None,
) -> CellFlows:
    """Vehicles that move in one step of the cell transmission model.

    With S = min(v dt n / L, Q dt), what a cell can send, and R = min(Q dt, w dt (N - n / L)), what
    it can receive (free speed v, wave speed w, capacity Q, jam density N, length L):

    - link a -> b: min(S_a, R_b);
    - diverge, first in first out: y = min(S, R_main / (1 - split), R_ramp / split) leave, so that
      a blocked ramp blocks the road; with a turning lane min((1 - split) S, R_main) and
      min(split S, R_ramp) do, each way for itself;
    - merge: all that is sent, where it fits; else mid(S_main, R - S_ramp, priority R), and the
      ramp gets the rest.

    Args:
        network: the roads.
        vehicles: in each cell, ``(cells,)``.
        waiting: who wants to enter at each source in this step, ``(sources,)``.
        time_step: hours; no cell may be shorter than free speed x time step.
        capacity: in place of the network's own, during incidents; vehicles an hour.

    Returns:
        What leaves and what enters each cell.

    Example:
        >>> flows = cell_flows(
        ...     RoadNetwork.straight(2), np.array([10.0, 0.0]), np.array([3.0]), time_step=0.004
        ... )
        >>> flows.out.round(2), flows.into.round(2)
        (array([8.67, 0.  ]), array([3.  , 8.67]))

    Source:
        Daganzo 1994 (links) and 1995 (merges and diverges).
    """
    most = (network.capacity if capacity is None else capacity) * time_step
    send = np.minimum(vehicles * (network.free_speed * time_step / network.length), most)
    room = network.jam_density * network.length - vehicles
    receive = np.minimum(room * (network.wave_speed * time_step / network.length), most)
    np.maximum(receive, 0.0, out=receive)

    out = np.zeros_like(vehicles)
    into = np.zeros_like(vehicles)
    start, end = network.links.T
    out[start] = into[end] = np.minimum(send[start], receive[end])

    start, main, ramp = network.diverges.T
    stay, turn = 1.0 - network.split, network.split
    to_main = np.minimum(stay * send[start], receive[main])
    to_ramp = np.minimum(turn * send[start], receive[ramp])
    blocked = np.minimum(to_main / stay, to_ramp / turn)
    into[main] = np.where(network.turning_lane, to_main, stay * blocked)
    into[ramp] = np.where(network.turning_lane, to_ramp, turn * blocked)
    out[start] = into[main] + into[ramp]

    main, ramp, end = network.merges.T
    space = receive[end]
    # min(S, max(R - S', p R)) is the mid of the three where they contest, and S where they don't.
    first = np.minimum(send[main], np.maximum(space - send[ramp], network.priority * space))
    second = np.minimum(send[ramp], space - first)
    out[main], out[ramp] = first, second
    into[end] = first + second

    into[network.sources] = np.minimum(waiting, receive[network.sources])
    out[network.sinks] = send[network.sinks]
    return CellFlows(out, into)


def transmit(
    network: RoadNetwork,
    demand: Float[np.ndarray, "intervals sources"],
    *,
    interval: float = 1 / 12,
    steps: int = 20,
    capacity: Float[np.ndarray, "intervals cells"] | None = None,
    initial: Float[np.ndarray, " cells"] | None = None,
    progress: bool = False,
) -> TrafficHistory:
    """Run the cell transmission model over time.

    Who cannot enter waits outside in a queue without bounds, so that no demand is lost.

    Args:
        network: the roads.
        demand: arrivals at each source, vehicles an hour, constant over an interval.
        interval: hours for each row of ``demand`` and of the answer.
        steps: time steps in an interval.
        capacity: vehicles an hour in each interval, in place of the network's own and not above it;
            incidents and bad weather are written so.
        initial: vehicles in each cell at the start; empty roads where None.
        progress: show a bar where it takes longer than a second.

    Returns:
        Speeds, flows and counts of every cell, and the totals of the network.

    Raises:
        ValueError: if the time step is too long for a cell (the Courant-Friedrichs-Lewy
            condition), a shape is wrong, or demand, capacity or the initial state out of range.

    Example:
        >>> history = transmit(RoadNetwork.straight(5), np.full((12, 1), 3000.0))
        >>> history.speed[-1].round(6)
        array([65., 65., 65., 65., 65.])
    """
    cells = len(network.length)
    vehicles = np.zeros(cells) if initial is None else initial.copy()
    time_step = interval / steps
    _check_run(network, demand, time_step, capacity, vehicles)
    waiting = np.zeros(len(network.sources))
    speed, flow, counts = (np.empty((len(demand), cells)) for _ in range(3))
    left, queued = np.empty(len(demand)), np.empty(len(demand))
    gone = 0.0
    for row, rates in enumerate(tqdm(demand, "traffic", disable=not progress, delay=1)):
        moved, present = np.zeros(cells), np.zeros(cells)
        limit = None if capacity is None else capacity[row]
        for _ in range(steps):
            waiting = waiting + rates * time_step
            out, into = cell_flows(network, vehicles, waiting, time_step, limit)
            present += vehicles
            moved += out
            waiting = waiting - into[network.sources]
            vehicles = vehicles + into - out
            gone += float(out[network.sinks].sum())
        spent = present * time_step
        speed[row] = np.divide(
            moved * network.length, spent, out=network.free_speed.copy(), where=spent > 1e-9
        )
        flow[row], counts[row] = moved / interval, vehicles
        left[row], queued[row] = gone, waiting.sum()
    arrived = np.cumsum(demand.sum(axis=1)) * interval
    return TrafficHistory(speed, flow, counts, arrived, left, queued)


def _check_run(
    network: RoadNetwork,
    demand: np.ndarray,
    time_step: float,
    capacity: np.ndarray | None,
    vehicles: np.ndarray,
) -> None:
    check_positive("interval / steps", time_step)
    fastest = np.maximum(network.free_speed, network.wave_speed)
    courant = float((fastest * time_step / network.length).max())
    if courant > 1 + 1e-9:
        raise ValueError(
            f"a time step of {time_step * 3600:g} s takes traffic {courant:.3g} cells far, expected"
            " at most one; raise `steps` or lengthen the cells."
        )
    if demand.ndim != 2 or demand.shape[1] != len(network.sources):
        raise ValueError(
            f"`demand` has shape {demand.shape}, expected (intervals, {len(network.sources)}), one "
            "column for each source."
        )
    if not (np.isfinite(demand) & (demand >= 0)).all():
        raise ValueError("`demand` has values below 0 or not finite, expected vehicles an hour.")
    most = network.jam_density * network.length
    if vehicles.shape != most.shape or not ((vehicles >= 0) & (vehicles <= most)).all():
        raise ValueError(
            f"`initial` of shape {vehicles.shape} is out of range, expected {most.shape} counts "
            "from 0 to jam density x length."
        )
    if capacity is None:
        return
    if capacity.shape != (len(demand), len(most)):
        raise ValueError(
            f"`capacity` has shape {capacity.shape}, expected {(len(demand), len(most))}, one row "
            "for each row of `demand` and one column for each cell."
        )
    if not ((capacity >= 0) & (capacity <= network.capacity)).all():
        raise ValueError("`capacity` is out of range, expected 0 to the network's own capacity.")
