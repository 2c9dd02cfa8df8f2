"""Simulated traffic: made-up motorways, demand, incidents and detectors.

The physics is in `cell_transmission`.
"""

from datetime import datetime
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.signal import lfilter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra

from sdkd_plugin._checks import check_positive, check_positive_int, check_seed, check_sizes
from sdkd_plugin._explained import explained
from sdkd_plugin.data.cell_transmission import (
    CELL_MILES,
    LANE_CAPACITY,
    Roads,
    TrafficHistory,
    transmit,
)
from sdkd_plugin.data.reading import parse_time
from sdkd_plugin.data.sensors import TrafficData

_DAY = 288  # intervals of five minutes
_KERNEL_THRESHOLD, _KERNEL_REACH = 0.1, 8.0  # weight, miles


@explained
def simulate_traffic(
    *,
    n_sensors: int = 200,
    days: int = 7,
    seed: int = 0,
    freeways: tuple[int, int] = (2, 2),
    demand: float = 1.0,
    incidents_per_day: float = 12.0,
    missing_rate: float = 0.08,
    start: str | datetime = "2024-01-08",
    progress: bool = True,
) -> TrafficData:
    """Simulate detector speeds on crossing motorways, every five minutes.

    The cell transmission model on a made-up network, with rush hours on weekdays, demand and
    capacities that vary, and incidents, in which a random cell keeps 20 to 70 % of
    its capacity for half an hour in the median. Detectors report mean speeds between 1 and 70 miles
    an hour, with noise and drift, and fall silent for an hour at a time, on average. Results on it
    do not replace measured traffic.

    Args:
        n_sensors: number of detectors.
        days: how long, from ``start`` at midnight.
        seed: fixes the roads, the demand, the incidents and the noise.
        freeways: how many motorways run east-west and how many north-south.
        demand: multiplies all demand; 0.5 flows freely all week, 1.2 is jammed for hours.
        incidents_per_day: mean number on the whole network.
        missing_rate: the share of readings masked out (METR-LA: 8 %); these are NaN.
        start: the first day, which fixes the weekends.
        progress: show a bar on a terminal after a second.

    Returns:
        Speeds in miles an hour and a directed sensor graph with the Gaussian kernel of road
        distances.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> data = simulate_traffic(n_sensors=12, days=1, freeways=(1, 1), progress=False)
        >>> data.speed.shape, data.source
        (torch.Size([288, 12]), 'simulated traffic (cell transmission model, seed 0)')
    """
    check_sizes(n_sensors=n_sensors, days=days)
    check_seed(seed)
    check_positive("demand", demand)
    check_positive("incidents_per_day", incidents_per_day, allow_zero=True)
    if not 0 <= missing_rate < 1:
        raise ValueError(
            f"`missing_rate` is {missing_rate!r}, expected a share of at least 0 and below 1."
        )
    for count in freeways:
        check_positive_int("freeways", count)
    first = parse_time("start", start).normalize()
    index = pd.date_range(first, periods=days * _DAY, freq="5min")
    # One stream each: another missing rate leaves roads, demand and incidents as they are.
    planning, drivers, accidents, detectors = np.random.default_rng(seed).spawn(4)
    highways = build_highways(n_sensors, freeways, planning)
    roads, arrivals = highways.roads, demand * _arrivals(highways, index, drivers)
    at_rest = np.minimum(roads.steady_flow(arrivals[0]), roads.capacity)
    history = transmit(
        roads,
        arrivals,
        capacity=_capacity(roads, len(index), incidents_per_day, accidents),
        initial=at_rest / roads.free_speed * CELL_MILES,
        progress=progress,
    )
    speed, mask = _detect(highways, history, missing_rate, detectors)
    edge_index, edge_weight = sensor_graph(highways)
    return TrafficData(
        speed=torch.from_numpy(speed.astype(np.float32)),
        mask=torch.from_numpy(mask),
        edge_index=torch.from_numpy(edge_index),
        edge_weight=torch.from_numpy(edge_weight.astype(np.float32)),
        node_ids=highways.sensor_ids,
        index=index,
        source=f"simulated traffic (cell transmission model, seed {seed})",
    )


class Highways(NamedTuple):
    """Roads, the cells with a sensor, the sensors' names, and the demand at both peaks.

    ``sensor_ids`` are such as E1-07, the seventh on the first road eastwards; ``demand`` is in
    vehicles an hour, in the morning and in the evening.
    """

    roads: Roads
    sensors: Int[np.ndarray, " sensors"]
    sensor_ids: tuple[str, ...]
    demand: Float[np.ndarray, "2 cells"]


def build_highways(n_sensors: int, freeways: tuple[int, int], rng: np.random.Generator) -> Highways:
    """Draw motorways that cross each other, and plan their lanes for the expected flows.

    Each motorway has two carriageways with exits and entrances by turns, and at each crossing all
    eight turns. A stretch between two crossings has lanes for its mean peak flow, so that
    bottlenecks arise behind entrances. Sensors are spread evenly.
    """
    roads = [(way, i) for way in "EW" for i in range(freeways[0])]
    roads += [(way, i) for way in "NS" for i in range(freeways[1])]
    # At least two cells a sensor: no two sensors are in one.
    n = max(24, 6 * (max(freeways) + 1), 2 * -(-n_sensors // len(roads)))
    first = {road: k * n for k, road in enumerate(roads)}
    cells = n * len(roads)

    def crossing(way: str, other: int) -> int:
        """The place where a road crosses another; those west- and southwards count backwards."""
        count = freeways[1 if way in "EW" else 0]
        place = round(n * (other + 1) / (count + 1))
        return place if way in "EN" else n - place

    ways, share = [], []
    left, demand = np.ones(cells), np.zeros((2, cells))  # drivers who go straight on
    stretch = np.zeros(cells, dtype=int)
    for way, number in roads:
        crossed = {crossing(way, i): i for i in range(freeways[1 if way in "EW" else 0])}
        start, exit_next, following = first[way, number], True, 2
        stretch[start : start + n] = start + np.searchsorted(sorted(crossed), np.arange(n))
        _add_demand(demand, start, 0.0, (6000.0, 9000.0), rng)
        for place in range(n - 2):
            if (other := crossed.get(place)) is not None:
                for turn in "NS" if way in "EW" else "EW":
                    ways.append((start + place, first[turn, other] + crossing(turn, number) + 1))
                    share.append(rng.uniform(0.06, 0.16))
                    left[start + place] -= share[-1]
            elif place >= following and not {place - 1, place + 1} & set(crossed):
                if exit_next:
                    left[start + place] -= rng.uniform(0.06, 0.14)
                else:
                    _add_demand(demand, start + place, place / n, (500.0, 1400.0), rng)
                exit_next, following = not exit_next, place + int(rng.integers(2, 4))
    straight = np.flatnonzero(np.arange(cells) % n < n - 1)
    ways += [(cell, cell + 1) for cell in straight.tolist()]
    usual = np.repeat(rng.uniform(63, 67, len(roads)), n)
    plan = Roads(
        free_speed=np.clip(usual + rng.normal(0, 1.0, cells), 60, 70),
        lanes=np.ones(cells),
        entrance=np.ones(cells),
        ways=np.array(ways).T,
        share=np.concatenate([share, left[straight]]),
    )
    flow = plan.steady_flow(demand).max(axis=0)
    mean = np.bincount(stretch, flow)[stretch] / np.bincount(stretch)[stretch]
    lanes = np.maximum(2.0, np.round(mean / LANE_CAPACITY))
    entrance = np.where(np.arange(cells) % n, 1.0, lanes)
    sensors, names = [], []
    for order, (way, number) in enumerate(roads):
        count = n_sensors // len(roads) + (order < n_sensors % len(roads))
        along = (np.arange(count) + rng.uniform(0.25, 0.75, size=count)) * n / count
        sensors += (first[way, number] + along.astype(int)).tolist()
        names += [f"{way}{number + 1}-{place + 1:02d}" for place in range(count)]
    finished = plan._replace(lanes=lanes, entrance=entrance)
    return Highways(finished, np.array(sensors), tuple(names), demand)


def _add_demand(
    demand: np.ndarray,
    cell: int,
    along: float,
    bounds: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Demand at ``along`` of a road (0 start, 1 end): inwards mornings, outwards evenings."""
    peak, other = rng.uniform(*bounds), rng.uniform(0.55, 0.85)
    demand[:, cell] = (peak, peak * other) if along < 0.5 else (peak * other, peak)


def sensor_graph(
    highways: Highways,
) -> tuple[Int[np.ndarray, "2 edges"], Float[np.ndarray, " edges"]]:
    """Edges and weights between sensors by road distance, as METR-LA's graph is made.

    w_ij = exp(-(d_ij / sigma)^2) where that is at least 0.1, else no edge; d_ij is the road
    distance in the direction of travel, sigma the standard deviation of those up to 8 miles.

    Source: Li et al., DCRNN, ICLR 2018, section 4 and appendix E.1.
    """
    ways, cells = highways.roads.ways, len(highways.roads.lanes)
    miles = np.full(ways.shape[1], CELL_MILES)
    graph = coo_array((miles, tuple(ways)), shape=(cells, cells)).tocsr()
    distance = dijkstra(graph, indices=highways.sensors, limit=_KERNEL_REACH)
    distance = distance[:, highways.sensors]
    np.fill_diagonal(distance, np.inf)
    near = np.isfinite(distance)
    if not near.any():
        return np.empty((2, 0), dtype=np.int64), np.empty(0)
    # A single distance, or equal ones, would make the kernel infinitely narrow.
    sigma = max(float(distance[near].std()), CELL_MILES)
    weight = np.exp(-np.square(distance / sigma))
    rows, columns = np.nonzero(weight >= _KERNEL_THRESHOLD)
    return np.stack([rows, columns]).astype(np.int64), weight[rows, columns]


def _arrivals(highways: Highways, index: pd.DatetimeIndex, rng: np.random.Generator) -> np.ndarray:
    """Vehicles an hour that want to enter, ``(time, cells)``."""
    days, (at_morning, at_evening) = len(index) // _DAY, highways.demand
    cells = len(at_morning)
    hour = np.arange(_DAY)[None, :, None] / 12
    shift = rng.normal(0, 0.15, size=(days, 1, 1))  # a day is early or late as a whole
    waking = _rise(hour, 6.0, 0.5) * (1 - _rise(hour, 20.0, 0.9))
    morning = np.exp(-0.5 * np.square((hour - 7.9 - shift) / 1.1))
    evening = np.exp(-0.5 * np.square((hour - 17.2 - shift) / 1.6))
    usual = (at_morning + at_evening) / 2
    weekday = (
        (0.06 + 0.56 * waking) * usual + 0.42 * morning * at_morning + 0.46 * evening * at_evening
    )
    weekend = (0.08 + 0.72 * _rise(hour, 10.0, 1.0) * (1 - _rise(hour, 20.5, 1.2))) * usual
    is_weekend = (index[::_DAY].dayofweek >= 5)[:, None, None]
    mean = np.where(is_weekend, weekend, weekday)
    of_day = rng.lognormal(0, 0.04, size=(days, 1, 1))
    of_entrance = rng.lognormal(0, 0.06, size=(days, 1, cells))
    wander = 1 + 0.06 * _red_noise(days * _DAY, cells, 6.0, rng)
    return (mean * of_day * of_entrance).reshape(days * _DAY, cells) * np.maximum(wander, 0.2)


def _rise(hour: np.ndarray, middle: float, width: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(hour - middle) / width))


def _red_noise(steps: int, series: int, memory: float, rng: np.random.Generator) -> np.ndarray:
    """Unit variance, correlated over ``memory`` steps, ``(steps, series)``."""
    keep = np.exp(-1 / memory)
    noise = rng.normal(size=(steps, series))
    noise[1:] *= np.sqrt(1 - keep**2)
    return lfilter([1.0], [1.0, -keep], noise, axis=0)


def _capacity(roads: Roads, steps: int, incidents: float, rng: np.random.Generator) -> np.ndarray:
    """Vehicles an hour that each cell lets through, ``(time, cells)``, with ``incidents`` a day."""
    cells = len(roads.lanes)
    # Drivers, weather and lane changes.
    factor = 1 - 0.05 * np.minimum(np.abs(_red_noise(steps, cells, 2.0, rng)), 4.0)
    count = rng.poisson(incidents * steps / _DAY)
    places = rng.integers(cells, size=count)
    starts = rng.integers(steps, size=count)
    lengths = np.clip(rng.lognormal(np.log(6), 0.6, size=count).round(), 1, 48).astype(int)
    left = rng.uniform(0.2, 0.7, size=count)
    for place, start, length, share in zip(places, starts, lengths, left, strict=True):
        span = factor[start : start + length, place]
        np.minimum(span, share, out=span)
    return factor * roads.capacity


def _detect(
    highways: Highways, history: TrafficHistory, missing_rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What the detectors report: noisy speeds, NaN where silent, and the mask."""
    speed = history.speed[:, highways.sensors]
    steps, sensors = speed.shape
    passed = history.flow[:, highways.sensors] / 12
    scatter = 9.0 / np.sqrt(np.maximum(passed, 1.0)) * rng.normal(size=speed.shape)
    drift = 1.5 * _red_noise(steps, sensors, 12.0, rng)
    # Drivers in a queue all have the same speed.
    noise = (scatter + drift) * speed / highways.roads.free_speed[highways.sensors]
    mask = ~_outages(steps, sensors, missing_rate, rng)
    return np.where(mask, np.clip(speed + noise, 1.0, 70.0), np.nan), mask


def _outages(steps: int, sensors: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Silent spells of an hour on average, a share ``rate`` of all readings: a Markov chain."""
    recover = 1 / 12
    fail = recover * rate / (1 - rate)
    chance = rng.uniform(size=(steps, sensors))
    silent = np.empty((steps, sensors), dtype=bool)
    silent[0] = chance[0] < rate
    for step in range(1, steps):
        silent[step] = np.where(silent[step - 1], chance[step] >= recover, chance[step] < fail)
    return silent
