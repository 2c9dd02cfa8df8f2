"""The cell transmission model of road traffic on a network of cells.

Units: miles, hours, vehicles. The made-up roads, demand and detectors are in `traffic_simulator`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

CELL_MILES = 0.3
LANE_CAPACITY = 2000.0  # vehicles an hour
LANE_JAM_DENSITY = 190.0  # vehicles a mile; with 65 miles an hour the wave speed is 12.6
_INTERVAL, _STEPS = 1 / 12, 20  # hours between measurements, and steps between them


class Roads(NamedTuple):
    """Road cells with a triangular fundamental diagram, and the ways between them.

    Flow rises with density at the free speed up to the capacity, then falls at the wave speed to
    zero at the jam density; both are proportional to the lanes.

    Args:
        free_speed: miles an hour.
        lanes: of each cell.
        entrance: lanes by which drivers enter each cell from outside.
        ways: from and to.
        share: of a cell's drivers who take a way; those who take none leave the network.

    Source: Daganzo, Transportation Research B 28 (1994) 269-287 and 29 (1995) 79-93.
    """

    free_speed: Float[np.ndarray, " cells"]
    lanes: Float[np.ndarray, " cells"]
    entrance: Float[np.ndarray, " cells"]
    ways: Int[np.ndarray, "2 ways"]
    share: Float[np.ndarray, " ways"]

    @property
    def capacity(self) -> Float[np.ndarray, " cells"]:
        """Vehicles an hour over all lanes."""
        return LANE_CAPACITY * self.lanes

    @property
    def most(self) -> Float[np.ndarray, " cells"]:
        """Vehicles in a cell at jam density."""
        return LANE_JAM_DENSITY * CELL_MILES * self.lanes

    @property
    def wave_speed(self) -> Float[np.ndarray, " cells"]:
        """How fast queues dissolve upstream, miles an hour."""
        return LANE_CAPACITY / (LANE_JAM_DENSITY - LANE_CAPACITY / self.free_speed)

    def steady_flow(
        self, demand: Float[np.ndarray, "*times cells"]
    ) -> Float[np.ndarray, "*times cells"]:
        """The flow through every cell, vehicles an hour, if no capacity were in the way."""
        balance = np.eye(len(self.lanes))
        np.subtract.at(balance, (self.ways[1], self.ways[0]), self.share)
        flow: np.ndarray = np.linalg.solve(balance, demand[..., None])[..., 0]
        return flow


class TrafficHistory(NamedTuple):
    """Edie's mean speed (miles an hour), flow out (vehicles an hour), and vehicles at the end."""

    speed: Float[np.ndarray, "intervals cells"]
    flow: Float[np.ndarray, "intervals cells"]
    vehicles: Float[np.ndarray, "intervals cells"]


def cell_flows(
    roads: Roads,
    vehicles: Float[np.ndarray, " cells"],
    waiting: Float[np.ndarray, " cells"],
    time_step: float,
    capacity: Float[np.ndarray, " cells"],
) -> tuple[Float[np.ndarray, " cells"], Float[np.ndarray, " cells"], Float[np.ndarray, " cells"]]:
    """Vehicles that leave each cell, and that drive and are let into it, in a step (hours).

    With S = min(v dt n / L, Q dt), what a cell can send, and R = min(Q dt, w dt (N - n / L)), what
    it can receive (free speed v, wave speed w, capacity Q, jam density N, length L), way i -> j
    carries ``share_ij S_i min(1, R_j / D_j)``, D_j being all that wants into cell j: where not all
    fit, ways and the entrance share the room in proportion. A blocked way does not block others.
    """
    limit = capacity * time_step
    send = np.minimum(vehicles * (roads.free_speed * time_step / CELL_MILES), limit)
    room = (roads.most - vehicles) * (roads.wave_speed * time_step / CELL_MILES)
    receive = np.maximum(np.minimum(room, limit), 0.0)
    (start, end), cells = roads.ways, len(vehicles)
    wanted = roads.share * send[start]
    outside = np.minimum(waiting, LANE_CAPACITY * roads.entrance * time_step)
    arriving = np.bincount(end, wanted, cells) + outside
    fits = np.minimum(1.0, receive / np.maximum(arriving, 1e-300))
    moved = wanted * fits[end]
    leaving = send - np.bincount(start, wanted, cells)  # the network, and nothing is in their way
    out = np.bincount(start, moved, cells) + np.maximum(leaving, 0.0)
    return out, np.bincount(end, moved, cells), outside * fits


def transmit(
    roads: Roads,
    demand: Float[np.ndarray, "intervals cells"],
    *,
    capacity: Float[np.ndarray, "intervals cells"] | None = None,
    initial: Float[np.ndarray, " cells"] | None = None,
    progress: bool = False,
) -> TrafficHistory:
    """Run the cell transmission model over time. Drivers who cannot enter wait outside.

    ``demand`` is arrivals at each cell in vehicles an hour, in intervals of five minutes.
    ``capacity``, at most the roads' own, replaces it during incidents; ``initial`` is the vehicles
    in each cell, none where None. A step is a twentieth of an interval, 15 seconds, which must be
    shorter than a cell takes at free speed.
    """
    time_step = _INTERVAL / _STEPS
    intervals, cells = demand.shape
    vehicles = np.zeros(cells) if initial is None else initial.copy()
    waiting = np.zeros(cells)
    speed, flow, counts = (np.empty((intervals, cells)) for _ in range(3))
    bar = tqdm(demand, "traffic", disable=None if progress else True, delay=1)
    for row, rates in enumerate(bar):
        moved, present = np.zeros(cells), np.zeros(cells)
        limit = roads.capacity if capacity is None else capacity[row]
        for _ in range(_STEPS):
            waiting = waiting + rates * time_step
            out, into, entered = cell_flows(roads, vehicles, waiting, time_step, limit)
            present += vehicles
            moved += out
            waiting = waiting - entered
            vehicles = vehicles + into + entered - out
        spent = present * time_step
        speed[row] = np.divide(
            moved * CELL_MILES, spent, out=roads.free_speed.copy(), where=spent > 1e-9
        )
        flow[row], counts[row] = moved / _INTERVAL, vehicles
    return TrafficHistory(speed, flow, counts)
