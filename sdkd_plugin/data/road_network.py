"""Made-up motorways for the traffic simulator: crossing roads, ramps, interchanges and sensors.

What lives here: the layout (:func:`build_highways`) and the graph of its sensors
(:func:`sensor_graph`).
What doesn't: how traffic moves on it (``cell_transmission``) and who drives when
(``traffic_simulator``).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra

from sdkd_plugin.data.cell_transmission import RoadNetwork

CELL_MILES = 0.3
LANE_CAPACITY = 2000.0  # vehicles an hour
LANE_JAM_DENSITY = 190.0  # vehicles a mile; with 65 miles an hour the wave speed is 12.6
RAMP_RESERVE = 1.2
KERNEL_THRESHOLD = 0.1
KERNEL_REACH_MILES = 8.0


class Highways(NamedTuple):
    """A road network, where it lies, and what was planned for it.

    ``positions`` are miles east and north of the south-west corner; ``mainline`` is true for cells
    of a motorway and false for ramps; ``sensors`` are cells and ``sensor_ids`` their names, such as
    E1-07 for the seventh on the first road eastwards; ``morning`` and ``evening`` are the flows at
    the sources, vehicles an hour, that the lanes were planned for.
    """

    network: RoadNetwork
    positions: Float[np.ndarray, "cells 2"]
    mainline: Bool[np.ndarray, " cells"]
    sensors: Int[np.ndarray, " sensors"]
    sensor_ids: tuple[str, ...]
    morning: Float[np.ndarray, " sources"]
    evening: Float[np.ndarray, " sources"]


def build_highways(n_sensors: int, freeways: tuple[int, int], rng: np.random.Generator) -> Highways:
    """Draw motorways that cross each other, and plan their lanes for the flows to be expected.

    Each motorway has two carriageways with an exit and an entrance about every mile and a half, and
    at each crossing an interchange with all eight turns. A stretch between two interchanges has as
    many lanes as its mean peak flow asks for, so that where flows are above the mean, behind
    entrances, bottlenecks arise as they do on real roads.

    Args:
        n_sensors: detectors on the carriageways, as evenly as the cells allow.
        freeways: how many run east-west and how many north-south, at least one each.
        rng: where the chance comes from.

    Returns:
        The roads and their sensors.

    Example:
        >>> highways = build_highways(20, (1, 1), np.random.default_rng(0))
        >>> len(highways.sensors), highways.sensor_ids[0]
        (20, 'E1-01')
    """
    roads = [(way, number) for number in range(freeways[0]) for way in "EW"]
    roads += [(way, number) for number in range(freeways[1]) for way in "NS"]
    plan = _Plan(rng, max(24, 6 * (max(freeways) + 1), 2 * -(-n_sensors // len(roads))), freeways)
    for road in roads:
        plan.add_road(*road)
    for first in range(freeways[0]):
        for second in range(freeways[1]):
            plan.add_interchange(first, second)
    for road in roads:
        plan.add_ramps(road)
    sensors, names = [], []
    for order, (way, number) in enumerate(roads):
        count = n_sensors // len(roads) + (order < n_sensors % len(roads))
        # At least two cells a sensor: no two sensors fall into one.
        along = (np.arange(count) + rng.uniform(0.25, 0.75, size=count)) * plan.cells / count
        sensors += [plan.roads[way, number] + int(place) for place in along]
        names += [f"{way}{number + 1}-{place + 1:02d}" for place in range(count)]
    return Highways(
        network=plan.network(),
        positions=np.array(plan.positions),
        mainline=np.array(plan.stretch) >= 0,
        sensors=np.array(sensors, dtype=np.int64),
        sensor_ids=tuple(names),
        morning=np.array(plan.morning),
        evening=np.array(plan.evening),
    )


def sensor_graph(
    highways: Highways,
) -> tuple[Int[np.ndarray, "2 edges"], Float[np.ndarray, " edges"]]:
    """Join sensors by how far one drives from one to the other, as METR-LA's graph is made.

    w_ij = exp(-(d_ij / sigma)^2) where that is at least 0.1, else no edge; d_ij is the road
    distance in the direction of travel, sigma the standard deviation of all distances up to 8
    miles, as METR-LA's distances too are listed for near pairs only. Without self-loops.

    Args:
        highways: the roads and their sensors.

    Returns:
        Sources and targets, ``(2, edges)``, and weights in [0.1, 1].

    Example:
        >>> edge_index, weight = sensor_graph(build_highways(20, (1, 1), np.random.default_rng(0)))
        >>> bool(weight.min() >= 0.1), edge_index.shape[0]
        (True, 2)

    Source:
        Li et al., Diffusion Convolutional Recurrent Neural Network, ICLR 2018, section 4 and
        appendix E.1.
    """
    network = highways.network
    pairs, _ = network.edges()
    miles = network.length[pairs].mean(axis=1)
    cells = len(network.length)
    roads = coo_array((miles, (pairs[:, 0], pairs[:, 1])), shape=(cells, cells)).tocsr()
    distance = dijkstra(roads, indices=highways.sensors, limit=KERNEL_REACH_MILES)
    distance = distance[:, highways.sensors]
    np.fill_diagonal(distance, np.inf)
    near = np.isfinite(distance)
    if not near.any():
        return np.empty((2, 0), dtype=np.int64), np.empty(0)
    # A single distance, or equal ones, would make the kernel infinitely narrow.
    sigma = max(float(distance[near].std()), CELL_MILES)
    weight = np.exp(-np.square(distance / sigma))
    rows, columns = np.nonzero(weight >= KERNEL_THRESHOLD)
    return np.stack([rows, columns]).astype(np.int64), weight[rows, columns]


class _Plan:
    """The network while it is drawn: cells are numbered in the order in which they are added."""

    def __init__(self, rng: np.random.Generator, cells: int, freeways: tuple[int, int]) -> None:
        self.rng, self.cells, self.freeways = rng, cells, freeways
        self.roads: dict[tuple[str, int], int] = {}  # the first cell of each
        self.positions: list[tuple[float, float]] = []
        self.free_speed: list[float] = []
        self.stretch: list[int] = []  # -1 on ramps
        self.links: list[tuple[int, int]] = []
        self.merges: list[tuple[int, int, int]] = []
        self.diverges: list[tuple[int, int, int]] = []
        self.split: list[float] = []
        self.sources: list[int] = []
        self.sinks: list[int] = []
        self.morning: list[float] = []
        self.evening: list[float] = []

    def add_road(self, way: str, number: int) -> None:
        """A carriageway: its cells, its source and its sink; what joins the cells comes later."""
        east_west = way in "EW"
        across = self._crossing(number, self.freeways[0 if east_west else 1]) * CELL_MILES
        # The two directions lie 0.1 mile apart, traffic keeping to the right.
        across += 0.05 if way in "WN" else -0.05
        crossed = sorted(
            self._crossing(other, self.freeways[1 if east_west else 0], way)
            for other in range(self.freeways[1 if east_west else 0])
        )
        usual_speed = self.rng.uniform(63, 67)
        first = self.roads[way, number] = len(self.positions)
        for place in range(self.cells):
            along = (place + 0.5) * CELL_MILES
            along = along if way in "EN" else self.cells * CELL_MILES - along
            part = int(np.searchsorted(crossed, place, side="right"))
            self._add_cell(
                (along, across) if east_west else (across, along),
                float(np.clip(usual_speed + self.rng.normal(0, 1.0), 60, 70)),
                stretch=len(self.roads) * 100 + part,
            )
        self._add_source(first, along=0.0, low=6000.0, high=9000.0)
        self.sinks.append(first + self.cells - 1)

    def add_interchange(self, first: int, second: int) -> None:
        """Exits, entrances and the eight turns between an east-west and a north-south road."""
        exits, entrances = {}, {}
        for way in "EWNS":
            number, other, count = (
                (first, second, self.freeways[1])
                if way in "EW"
                else (second, first, self.freeways[0])
            )
            place = self.roads[way, number] + self._crossing(other, count, way)
            exits[way], entrances[way] = self._add_ramp(place), self._add_ramp(place)
            self._add_diverge(place - 2, place - 1, exits[way], low=0.15, high=0.30)
            self.merges.append((place, entrances[way], place + 1))
        turns = {
            (start, end): self._add_ramp(exits[start])
            for start, ends in (("E", "NS"), ("W", "NS"), ("N", "EW"), ("S", "EW"))
            for end in ends
        }
        for ways, others in (("EW", "NS"), ("NS", "EW")):
            for way in ways:
                left, right = (turns[way, other] for other in others)
                self._add_diverge(exits[way], left, right, low=0.35, high=0.65)
                self.merges.append((turns[others[0], way], turns[others[1], way], entrances[way]))

    def add_ramps(self, road: tuple[str, int]) -> None:
        """Exits and entrances by turns where there is room, and links everywhere else."""
        first = self.roads[road]
        last = first + self.cells - 1
        joined = {start for start, *_ in self.diverges} | {start for start, *_ in self.merges}
        following, exit_next = first + 2, True
        for cell in range(first, last):
            if cell in joined:
                continue
            crowded = any(near in joined for near in (cell - 1, cell + 1))
            if cell < following or crowded or cell > last - 3:
                self.links.append((cell, cell + 1))
                continue
            ramp = self._add_ramp(cell)
            if exit_next:
                self._add_diverge(cell, cell + 1, ramp, low=0.06, high=0.14)
                self.sinks.append(ramp)
            else:
                self.merges.append((cell, ramp, cell + 1))
                self._add_source(ramp, (cell - first) / self.cells, low=500.0, high=1400.0)
            exit_next = not exit_next
            following = cell + int(self.rng.integers(2, 4))

    def network(self) -> RoadNetwork:
        """The finished network, its lanes sized for the planned flows."""
        everything: dict[str, Any] = {
            "length": np.full(len(self.positions), CELL_MILES),
            "free_speed": np.array(self.free_speed),
            "links": np.array(self.links),
            "merges": np.array(self.merges),
            "diverges": np.array(self.diverges),
            "split": np.array(self.split),
            "turning_lane": np.isin(np.array(self.diverges)[:, 2], self.sinks),
            "sources": np.array(self.sources),
            "sinks": np.array(self.sinks),
        }
        even = {"priority": np.full(len(self.merges), 0.5)}
        lane = {
            "capacity": np.full(len(self.positions), LANE_CAPACITY),
            "jam_density": np.full(len(self.positions), LANE_JAM_DENSITY),
        }
        unlimited = RoadNetwork(**everything, **even, **lane)
        demand = np.array([self.morning, self.evening])
        lanes = self._lanes(unlimited.steady_flow(demand).max(axis=0))
        capacity = lane["capacity"] * lanes
        main, ramp, _ = everything["merges"].T
        return RoadNetwork(
            **everything,
            priority=capacity[main] / (capacity[main] + capacity[ramp]),
            capacity=capacity,
            jam_density=lane["jam_density"] * lanes,
        )

    def _lanes(self, flow: np.ndarray) -> np.ndarray:
        stretch = np.array(self.stretch)
        lanes = np.ceil(flow * RAMP_RESERVE / LANE_CAPACITY)
        for part in np.unique(stretch[stretch >= 0]):
            inside = stretch == part
            lanes[inside] = np.maximum(2, np.round(flow[inside].mean() / LANE_CAPACITY))
        return lanes

    def _crossing(self, number: int, count: int, way: str = "E") -> int:
        """How many cells of a road lie before its ``number``-th crossing of ``count``."""
        place = round(self.cells * (number + 1) / (count + 1))
        return place if way in "EN" else self.cells - place

    def _add_cell(self, position: tuple[float, float], free_speed: float, stretch: int) -> None:
        self.positions.append(position)
        self.free_speed.append(free_speed)
        self.stretch.append(stretch)

    def _add_ramp(self, near: int) -> int:
        east, north = np.array(self.positions[near]) + self.rng.uniform(-0.15, 0.15, size=2)
        self._add_cell((float(east), float(north)), float(self.rng.uniform(40, 50)), stretch=-1)
        return len(self.positions) - 1

    def _add_diverge(self, start: int, main: int, ramp: int, low: float, high: float) -> None:
        self.diverges.append((start, main, ramp))
        self.split.append(float(self.rng.uniform(low, high)))

    def _add_source(self, cell: int, along: float, low: float, high: float) -> None:
        """Demand at ``along`` of a road (0 start, 1 end): inwards mornings, outwards evenings."""
        peak, other = self.rng.uniform(low, high), self.rng.uniform(0.55, 0.85)
        self.sources.append(cell)
        self.morning.append(peak if along < 0.5 else peak * other)
        self.evening.append(peak * other if along < 0.5 else peak)
