"""Simulated traffic: demand, incidents and detectors.

The roads are in `road_network`, the physics in `cell_transmission`.
"""

from datetime import datetime

import numpy as np
import pandas as pd
import torch
from scipy.signal import lfilter

from sdkd_plugin._checks import check_positive, check_positive_int, check_sizes
from sdkd_plugin.data.cell_transmission import TrafficHistory, transmit
from sdkd_plugin.data.reading import parse_time
from sdkd_plugin.data.road_network import Highways, build_highways, sensor_graph
from sdkd_plugin.data.sensors import TrafficData

_DAY = 288  # intervals of five minutes


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
    capacities that vary, and incidents, in which a random cell of the main road keeps 20 to 70 % of
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
    check_positive_int("seed", seed, minimum=0)
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
    roads, drivers, accidents, detectors = np.random.default_rng(seed).spawn(4)
    highways = build_highways(n_sensors, freeways, roads)
    arrivals = demand * _arrivals(highways, index, drivers)
    network = highways.network
    at_rest = np.minimum(network.steady_flow(arrivals[0]), network.capacity)
    history = transmit(
        network,
        arrivals,
        capacity=_capacity(highways, len(index), incidents_per_day, accidents),
        initial=at_rest / network.free_speed * network.length,
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


def _arrivals(highways: Highways, index: pd.DatetimeIndex, rng: np.random.Generator) -> np.ndarray:
    """Vehicles an hour that want to enter, ``(time, sources)``."""
    days, sources = len(index) // _DAY, len(highways.morning)
    hour = np.arange(_DAY)[None, :, None] / 12
    shift = rng.normal(0, 0.15, size=(days, 1, 1))  # a day is early or late as a whole
    waking = _rise(hour, 6.0, 0.5) * (1 - _rise(hour, 20.0, 0.9))
    morning = np.exp(-0.5 * np.square((hour - 7.9 - shift) / 1.1))
    evening = np.exp(-0.5 * np.square((hour - 17.2 - shift) / 1.6))
    usual = (highways.morning + highways.evening) / 2
    weekday = (
        (0.06 + 0.56 * waking) * usual
        + 0.42 * morning * highways.morning
        + 0.40 * evening * highways.evening
    )
    weekend = (0.08 + 0.72 * _rise(hour, 10.0, 1.0) * (1 - _rise(hour, 20.5, 1.2))) * usual
    is_weekend = (index[::_DAY].dayofweek >= 5)[:, None, None]
    mean = np.where(is_weekend, weekend, weekday)
    of_day = rng.lognormal(0, 0.04, size=(days, 1, 1))
    of_source = rng.lognormal(0, 0.06, size=(days, 1, sources))
    wander = 1 + 0.06 * _red_noise(days * _DAY, sources, 6.0, rng)
    return (mean * of_day * of_source).reshape(days * _DAY, sources) * np.maximum(wander, 0.2)


def _rise(hour: np.ndarray, middle: float, width: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(hour - middle) / width))


def _red_noise(steps: int, series: int, memory: float, rng: np.random.Generator) -> np.ndarray:
    """Unit variance, correlated over ``memory`` steps, ``(steps, series)``."""
    keep = np.exp(-1 / memory)
    noise = rng.normal(size=(steps, series))
    noise[1:] *= np.sqrt(1 - keep**2)
    return lfilter([1.0], [1.0, -keep], noise, axis=0)


def _capacity(
    highways: Highways, steps: int, incidents: float, rng: np.random.Generator
) -> np.ndarray:
    """Vehicles an hour that each cell lets through, ``(time, cells)``, with ``incidents`` a day."""
    cells = len(highways.mainline)
    # Drivers, weather and lane changes.
    factor = 1 - 0.05 * np.minimum(np.abs(_red_noise(steps, cells, 2.0, rng)), 4.0)
    count = rng.poisson(incidents * steps / _DAY)
    places = rng.choice(np.flatnonzero(highways.mainline), size=count)
    starts = rng.integers(steps, size=count)
    lengths = np.clip(rng.lognormal(np.log(6), 0.6, size=count).round(), 1, 48).astype(int)
    left = rng.uniform(0.2, 0.7, size=count)
    for place, start, length, share in zip(places, starts, lengths, left, strict=True):
        span = factor[start : start + length, place]
        np.minimum(span, share, out=span)
    return factor * highways.network.capacity


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
    noise = (scatter + drift) * speed / highways.network.free_speed[highways.sensors]
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
