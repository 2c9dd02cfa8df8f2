"""Made-up motorways for the traffic simulator: crossing roads, ramps, interchanges and sensors."""

from collections import defaultdict
from dataclasses import replace
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
    """A road network, and what was planned for it.

    ``mainline`` is false for ramps; ``sensor_ids`` are such as E1-07, the seventh on the first road
    eastwards; ``morning`` and ``evening`` are the planned flows in, vehicles an hour.
    """

    network: RoadNetwork
    mainline: Bool[np.ndarray, " cells"]
    sensors: Int[np.ndarray, " sensors"]
    sensor_ids: tuple[str, ...]
    morning: Float[np.ndarray, " sources"]
    evening: Float[np.ndarray, " sources"]


def build_highways(n_sensors: int, freeways: tuple[int, int], rng: np.random.Generator) -> Highways:
    """Draw motorways that cross each other, and plan their lanes for the expected flows.

    Each motorway has two carriageways with exits and entrances by turns, and at each crossing an
    interchange with all eight turns. A stretch between two interchanges has lanes for its mean peak
    flow, so that bottlenecks arise behind entrances. Sensors are spread evenly over all.
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
    morning, evening = np.array(plan.demand).T
    return Highways(
        network=plan.network(),
        mainline=np.array(plan.stretch) >= 0,
        sensors=np.array(sensors, dtype=np.int64),
        sensor_ids=tuple(names),
        morning=morning,
        evening=evening,
    )


def sensor_graph(
    highways: Highways,
) -> tuple[Int[np.ndarray, "2 edges"], Float[np.ndarray, " edges"]]:
    """Edges and weights between sensors by road distance, as METR-LA's graph is made.

    w_ij = exp(-(d_ij / sigma)^2) where that is at least 0.1, else no edge; d_ij is the road
    distance in the direction of travel, sigma the standard deviation of those up to 8 miles.

    Source: Li et al., DCRNN, ICLR 2018, section 4 and appendix E.1.
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
        self.stretch: list[int] = []  # of each cell, -1 on ramps
        self.demand: list[tuple[float, float]] = []  # in the morning and in the evening
        self.parts: defaultdict[str, list[Any]] = defaultdict(list)

    def add_road(self, way: str, number: int) -> None:
        """A carriageway: its cells, its source and its sink, not yet joined."""
        crossing = self.freeways[1 if way in "EW" else 0]
        crossed = sorted(self._crossing(other, crossing, way) for other in range(crossing))
        usual_speed = self.rng.uniform(63, 67)
        first = self.roads[way, number] = len(self.stretch)
        for place in range(self.cells):
            self._add_cell(
                float(np.clip(usual_speed + self.rng.normal(0, 1.0), 60, 70)),
                len(self.roads) * 100 + int(np.searchsorted(crossed, place, side="right")),
            )
        self._add_source(first, along=0.0, low=6000.0, high=9000.0)
        self.parts["sinks"].append(first + self.cells - 1)

    def add_interchange(self, first: int, second: int) -> None:
        """Exits, entrances and the eight turns between an east-west and a north-south road."""
        exits, entrances = {}, {}
        for way in "EWNS":
            number, other = (first, second) if way in "EW" else (second, first)
            count = self.freeways[1 if way in "EW" else 0]
            place = self.roads[way, number] + self._crossing(other, count, way)
            exits[way], entrances[way] = self._add_ramp(), self._add_ramp()
            self._add_diverge(place - 2, place - 1, exits[way], low=0.15, high=0.30)
            self.parts["merges"].append((place, entrances[way], place + 1))
        turns = {
            (start, end): self._add_ramp()
            for start, ends in (("E", "NS"), ("W", "NS"), ("N", "EW"), ("S", "EW"))
            for end in ends
        }
        for ways, (left, right) in (("EW", "NS"), ("NS", "EW")):
            for way in ways:
                ramps = turns[way, left], turns[way, right]
                self._add_diverge(exits[way], *ramps, low=0.35, high=0.65)
                self.parts["merges"].append((turns[left, way], turns[right, way], entrances[way]))

    def add_ramps(self, road: tuple[str, int]) -> None:
        """Exits and entrances by turns where there is room, and links everywhere else."""
        first = self.roads[road]
        last = first + self.cells - 1
        joined = {start for start, *_ in self.parts["diverges"] + self.parts["merges"]}
        following, exit_next = first + 2, True
        for cell in range(first, last):
            if cell in joined:
                continue
            crowded = cell - 1 in joined or cell + 1 in joined
            if cell < following or crowded or cell > last - 3:
                self.parts["links"].append((cell, cell + 1))
                continue
            ramp = self._add_ramp()
            if exit_next:
                self._add_diverge(cell, cell + 1, ramp, low=0.06, high=0.14)
                self.parts["sinks"].append(ramp)
            else:
                self.parts["merges"].append((cell, ramp, cell + 1))
                self._add_source(ramp, (cell - first) / self.cells, low=500.0, high=1400.0)
            exit_next = not exit_next
            following = cell + int(self.rng.integers(2, 4))

    def network(self) -> RoadNetwork:
        """The finished network, its lanes sized for the planned flows."""
        parts = {name: np.array(each) for name, each in self.parts.items()}
        cells, stretch = len(self.stretch), np.array(self.stretch)
        one_lane = RoadNetwork(
            **parts,
            length=np.full(cells, CELL_MILES),
            capacity=np.full(cells, LANE_CAPACITY),
            jam_density=np.full(cells, LANE_JAM_DENSITY),
            priority=np.full(len(parts["merges"]), 0.5),
            turning_lane=np.isin(parts["diverges"][:, 2], parts["sinks"]),
        )
        flow = one_lane.steady_flow(np.array(self.demand).T).max(axis=0)
        lanes = np.ceil(flow * RAMP_RESERVE / LANE_CAPACITY)
        for part in np.unique(stretch[stretch >= 0]):
            inside = stretch == part
            lanes[inside] = np.maximum(2, np.round(flow[inside].mean() / LANE_CAPACITY))
        main, ramp, _ = parts["merges"].T
        return replace(
            one_lane,
            priority=lanes[main] / (lanes[main] + lanes[ramp]),
            capacity=LANE_CAPACITY * lanes,
            jam_density=LANE_JAM_DENSITY * lanes,
        )

    def _crossing(self, number: int, count: int, way: str = "E") -> int:
        """How many cells of a road lie before its ``number``-th crossing of ``count``."""
        place = round(self.cells * (number + 1) / (count + 1))
        return place if way in "EN" else self.cells - place

    def _add_cell(self, free_speed: float, stretch: int) -> None:
        self.stretch.append(stretch)
        self.parts["free_speed"].append(free_speed)

    def _add_ramp(self) -> int:
        self.rng.random(2)  # unused; without these two a seed would give other traffic than before
        self._add_cell(float(self.rng.uniform(40, 50)), stretch=-1)
        return len(self.stretch) - 1

    def _add_diverge(self, start: int, main: int, ramp: int, low: float, high: float) -> None:
        self.parts["diverges"].append((start, main, ramp))
        self.parts["split"].append(self.rng.uniform(low, high))

    def _add_source(self, cell: int, along: float, low: float, high: float) -> None:
        """Demand at ``along`` of a road (0 start, 1 end): inwards mornings, outwards evenings."""
        peak, other = self.rng.uniform(low, high), self.rng.uniform(0.55, 0.85)
        self.parts["sources"].append(cell)
        self.demand.append((peak, peak * other) if along < 0.5 else (peak * other, peak))
