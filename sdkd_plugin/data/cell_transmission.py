"""The cell transmission model of road traffic, on any network of merges and diverges.

Units: miles, hours, vehicles. The roads are in `road_network`, demand and detectors in
`traffic_simulator`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

_INTERVAL, _STEPS = 1 / 12, 20  # hours between measurements, and steps between them


@dataclass(frozen=True, eq=False, kw_only=True)
class RoadNetwork:
    """Road cells with a triangular fundamental diagram, and the junctions that join them.

    Flow rises with density at the free speed up to the capacity, then falls at the wave speed to
    zero at the jam density. Every cell has exactly one junction at either end.

    Args:
        length: miles.
        free_speed: miles an hour.
        capacity: vehicles an hour over all lanes.
        jam_density: vehicles a mile over all lanes.
        links: from and to.
        merges: from the main road, from the ramp, and to.
        priority: the share of a contested merge that the main road gets, in (0, 1).
        diverges: from, to the main road, and to the ramp.
        split: the share that takes the ramp, in (0, 1).
        turning_lane: true where neither way blocks the other; false for first in, first out.
        sources: cells that drivers enter from a queue outside.
        sinks: cells that drivers leave unhindered.

    Source: Daganzo, Transportation Research B 28 (1994) 269-287 and 29 (1995) 79-93.
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
    """Edie's mean speed (miles an hour), flow out (vehicles an hour), and vehicles at the end."""

    speed: Float[np.ndarray, "intervals cells"]
    flow: Float[np.ndarray, "intervals cells"]
    vehicles: Float[np.ndarray, "intervals cells"]


def cell_flows(
    network: RoadNetwork,
    vehicles: Float[np.ndarray, " cells"],
    waiting: Float[np.ndarray, " sources"],
    time_step: float,
    capacity: Float[np.ndarray, " cells"] | None = None,
) -> tuple[Float[np.ndarray, " cells"], Float[np.ndarray, " cells"]]:
    """Vehicles that leave and that enter each cell in one step, of ``time_step`` hours.

    With S = min(v dt n / L, Q dt), what a cell can send, and R = min(Q dt, w dt (N - n / L)), what
    it can receive (free speed v, wave speed w, capacity Q, jam density N, length L):

    - link a -> b: min(S_a, R_b);
    - diverge, first in first out: min(S, R_main / (1 - split), R_ramp / split) leave; with a
      turning lane min((1 - split) S, R_main) and min(split S, R_ramp);
    - merge: all that is sent, where it fits; else mid(S_main, R - S_ramp, priority R), and the
      ramp gets the rest.
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
    # min(S, max(R - S', p R)) is the mid of the three where not all fits, and S where it does.
    first = np.minimum(send[main], np.maximum(space - send[ramp], network.priority * space))
    second = np.minimum(send[ramp], space - first)
    out[main], out[ramp] = first, second
    into[end] = first + second

    into[network.sources] = np.minimum(waiting, receive[network.sources])
    out[network.sinks] = send[network.sinks]
    return out, into


def transmit(
    network: RoadNetwork,
    demand: Float[np.ndarray, "intervals sources"],
    *,
    capacity: Float[np.ndarray, "intervals cells"] | None = None,
    initial: Float[np.ndarray, " cells"] | None = None,
    progress: bool = False,
) -> TrafficHistory:
    """Run the cell transmission model over time. Drivers who cannot enter wait outside.

    ``demand`` is arrivals at each source in vehicles an hour, in intervals of five minutes.
    ``capacity``, at most the network's own, replaces it during incidents; ``initial`` counts
    vehicles in each cell, none where None. A step is a twentieth of an interval, which must be
    shorter than any cell takes at free speed or wave speed.
    """
    time_step = _INTERVAL / _STEPS
    intervals, cells = len(demand), len(network.length)
    vehicles = np.zeros(cells) if initial is None else initial.copy()
    waiting = np.zeros(len(network.sources))
    speed, flow, counts = (np.empty((intervals, cells)) for _ in range(3))
    bar = tqdm(demand, "traffic", disable=None if progress else True, delay=1)
    for row, rates in enumerate(bar):
        moved, present = np.zeros(cells), np.zeros(cells)
        limit = None if capacity is None else capacity[row]
        for _ in range(_STEPS):
            waiting = waiting + rates * time_step
            out, into = cell_flows(network, vehicles, waiting, time_step, limit)
            present += vehicles
            moved += out
            waiting = waiting - into[network.sources]
            vehicles = vehicles + into - out
        spent = present * time_step
        speed[row] = np.divide(
            moved * network.length, spent, out=network.free_speed.copy(), where=spent > 1e-9
        )
        flow[row], counts[row] = moved / _INTERVAL, vehicles
    return TrafficHistory(speed, flow, counts)
