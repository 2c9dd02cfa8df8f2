"""The cell transmission model against known answers, and the simulated traffic built on it."""

import random

import numpy as np
import pytest
import torch
from jaxtyping import config

from sdkd_plugin.data.cell_transmission import RoadNetwork, cell_flows, transmit
from sdkd_plugin.data.road_network import (
    CELL_MILES,
    KERNEL_REACH_MILES,
    build_highways,
    sensor_graph,
)
from sdkd_plugin.data.traffic_simulator import simulate_traffic

STEP = 1 / 240  # hours: 15 seconds


def straight(cells, **change):
    """A road without ramps: a source, equal cells in a row, a sink."""
    order = np.arange(cells)
    numbers = {"length": 0.3, "free_speed": 65.0, "capacity": 6000.0, "jam_density": 570.0} | change
    junctions = {
        "links": np.stack([order[:-1], order[1:]], axis=1),
        "merges": np.empty((0, 3), int),
        "priority": np.empty(0),
        "diverges": np.empty((0, 3), int),
        "split": np.empty(0),
        "turning_lane": np.empty(0, bool),
        "sources": order[:1],
        "sinks": order[-1:],
    }
    return RoadNetwork(**{name: np.full(cells, n) for name, n in numbers.items()}, **junctions)


def one_junction(**junction):
    """Three cells that meet; whichever ends are free become sources and sinks."""
    merge = "priority" in junction
    ends = {"sources": [0, 1], "sinks": [2]} if merge else {"sources": [0], "sinks": [1, 2]}
    parts = {"merges" if merge else "diverges": [[0, 1, 2]], **ends, **junction}
    arrays = {name: np.array(part if name[-1] == "s" else [part]) for name, part in parts.items()}
    road = straight(3, free_speed=60.0, capacity=8000.0 if merge else 6000.0, jam_density=600.0)
    return RoadNetwork(**vars(road) | {"links": np.empty((0, 2), int)} | arrays)


def bottleneck(cells=60, at=40, capacity=3600.0):
    """A straight road on which cell ``at`` lets only ``capacity`` through, for 96 intervals."""
    network = straight(cells)
    limit = np.tile(network.capacity, (96, 1))
    limit[:, at] = capacity
    return network, limit


def highways(n_sensors=40, freeways=(2, 1), seed=0):
    return build_highways(n_sensors, freeways, np.random.default_rng(seed))


class TestKnownAnswers:
    def test_low_demand_flows_at_free_speed(self):
        network = highways().network
        demand = np.full((24, len(network.sources)), 200.0)
        history = transmit(network, demand)
        np.testing.assert_allclose(history.speed[-1], network.free_speed, rtol=1e-9)
        np.testing.assert_allclose(
            history.flow[-1], network.steady_flow(demand[0]), rtol=2e-3, atol=0.5
        )

    def test_at_courant_number_one_a_platoon_moves_one_cell_a_step_unchanged(self):
        network = straight(6, length=0.25, free_speed=60.0)
        vehicles = np.array([10.0, 0, 0, 0, 0, 0])
        for place in range(5):
            out, into = cell_flows(network, vehicles, np.zeros(1), STEP)
            vehicles = vehicles + into - out
            np.testing.assert_allclose(vehicles, np.roll([10.0, 0, 0, 0, 0, 0], place + 1))

    @pytest.mark.parametrize("inflow", [4500.0, 5400.0])
    def test_queue_behind_bottleneck_grows_at_the_rankine_hugoniot_speed(self, inflow):
        least = 3600.0
        network, limit = bottleneck(capacity=least)
        history = transmit(network, np.full((96, 1), inflow), capacity=limit)
        density = history.vehicles / network.length
        free = inflow / network.free_speed[0]
        wave = 6000 / (570 - 6000 / 65)
        queued = 570 - least / wave
        expected = (least - inflow) / (queued - free)
        np.testing.assert_allclose(density[-1, 38:40], queued, rtol=1e-6)
        np.testing.assert_allclose(density[-1, 41:], least / network.free_speed[0], rtol=1e-6)
        # The front is where density passes the middle of both sides, between cell centres. It is
        # followed over 30 of the 40 cells upstream.
        rows = np.arange(6, int(30 * CELL_MILES / -expected * 12))
        fronts = []
        for row in rows:
            cell = np.argmax(density[row] > (free + queued) / 2)
            low, high = density[row, cell - 1], density[row, cell]
            part = ((free + queued) / 2 - low) / (high - low)
            fronts.append((cell - 1 + part + 0.5) * CELL_MILES)
        measured = np.polyfit((rows + 1) / 12, fronts, 1)[0]
        assert measured == pytest.approx(expected, rel=0.01)

    def test_queue_dissolves_at_the_wave_speed(self):
        network = straight(60)
        jam = network.jam_density * network.length
        vehicles = np.where(np.arange(60) < 50, jam, 0.0)
        history = transmit(network, np.zeros((10, 1)), initial=vehicles)
        density = history.vehicles / network.length
        middle = (network.jam_density[0] + network.capacity[0] / network.free_speed[0]) / 2
        rows = np.arange(4, 10)
        fronts = [
            np.interp(-middle, -density[row, :50], np.arange(50)) * CELL_MILES for row in rows
        ]
        measured = np.polyfit((rows + 1) / 12, fronts, 1)[0]
        wave = 6000 / (570 - 6000 / 65)  # the road's, from its capacity, jam density, free speed
        assert measured == pytest.approx(-wave, rel=0.02)

    @pytest.mark.parametrize(
        ("counts", "space", "expected"),
        [
            ((10.0, 8.0), 25.0, (10.0, 8.0)),  # all fit
            ((20.0, 20.0), 16.0, (12.0, 4.0)),  # both contest: 3 to 1
            ((20.0, 2.0), 16.0, (14.0, 2.0)),  # the ramp needs less than its share
            ((5.0, 20.0), 16.0, (5.0, 11.0)),  # the road needs less than its share
        ],
    )
    def test_merge_follows_daganzo(self, counts, space, expected):
        # Speed 60, cells of a quarter mile: all of a cell can leave in one step.
        network = one_junction(priority=0.75)
        moves = 60.0 * STEP / 0.3
        room = space / (network.wave_speed[2] * STEP / 0.3)
        vehicles = np.array([counts[0] / moves, counts[1] / moves, 600.0 * 0.3 - room])
        out, into = cell_flows(network, vehicles, np.zeros(2), STEP)
        np.testing.assert_allclose(out[:2], expected, rtol=1e-9)
        assert into[2] == pytest.approx(sum(expected))

    @pytest.mark.parametrize(
        ("turning_lane", "space", "expected"),
        [
            (False, (99.0, 1.0), (3.0, 1.0)),
            (False, (3.0, 99.0), (3.0, 1.0)),
            (True, (99.0, 1.0), (15.0, 1.0)),
            (True, (3.0, 99.0), (3.0, 5.0)),
            (False, (99.0, 99.0), (15.0, 5.0)),
            (True, (99.0, 99.0), (15.0, 5.0)),
        ],
    )
    def test_one_full_way_blocks_the_other_unless_there_is_a_turning_lane(
        self, turning_lane, space, expected
    ):
        network = one_junction(split=0.25, turning_lane=turning_lane)
        room = np.array(space) / (network.wave_speed[1:] * STEP / 0.3)
        vehicles = np.array([20.0 / (60.0 * STEP / 0.3), *np.maximum(600.0 * 0.3 - room, 0)])
        out, into = cell_flows(network, vehicles, np.zeros(1), STEP)
        np.testing.assert_allclose(into[1:], expected, rtol=1e-9)
        assert out[0] == pytest.approx(sum(expected))

    def test_incident_slows_upstream_and_not_downstream(self):
        network, limit = bottleneck(at=30, capacity=2000.0)
        limit[:24] = limit[60:] = network.capacity
        calm = transmit(network, np.full((96, 1), 5000.0))
        history = transmit(network, np.full((96, 1), 5000.0), capacity=limit)
        np.testing.assert_allclose(calm.speed, 65.0, rtol=1e-9)
        np.testing.assert_allclose(history.speed[:, 31:], 65.0, rtol=1e-9)
        assert history.speed[59, 25:30].max() < 10
        # Its queue has not come this far by then, and it is gone at the end.
        np.testing.assert_allclose(history.speed[:24], 65.0, rtol=1e-9)
        np.testing.assert_allclose(history.speed[-1], 65.0, rtol=1e-6)


class TestInvariants:
    @pytest.mark.parametrize("seed", range(5))
    def test_every_step_conserves_vehicles_and_keeps_bounds(self, seed):
        rng = np.random.default_rng(seed)
        network = highways(seed=seed).network
        most = network.jam_density * network.length
        for _ in range(50):
            # Empty, full and in between.
            vehicles = most * np.clip(rng.uniform(-0.5, 1.5, size=len(most)), 0, 1)
            capacity = network.capacity * rng.uniform(0, 1, size=len(most))
            waiting = rng.uniform(0, 200, size=len(network.sources))
            out, into = cell_flows(network, vehicles, waiting, STEP, capacity)
            inside = out.sum() - out[network.sinks].sum()
            assert into.sum() - into[network.sources].sum() == pytest.approx(inside, abs=1e-9)
            assert (out >= 0).all()
            assert (into >= 0).all()
            assert (out <= np.minimum(vehicles, capacity * STEP) + 1e-9).all()
            assert (into <= capacity * STEP + 1e-9).all()
            assert (into[network.sources] <= waiting).all()
            after = vehicles + into - out
            assert (after >= -1e-9).all()
            assert (after <= most + 1e-9).all()

    def test_a_run_never_exceeds_capacity(self):
        rng = np.random.default_rng(1)
        network = highways().network
        demand = rng.uniform(0, 4000, size=(48, len(network.sources)))
        limit = network.capacity * rng.uniform(0.3, 1, size=(48, len(network.capacity)))
        initial = 0.1 * network.jam_density * network.length
        history = transmit(network, demand, capacity=limit, initial=initial)
        assert (history.flow <= limit * (1 + 1e-12)).all()
        assert (history.speed <= network.free_speed * (1 + 1e-9)).all()


class TestRoads:
    @pytest.mark.parametrize(
        ("n_sensors", "freeways"), [(1, (1, 1)), (7, (3, 2)), (20, (1, 1)), (207, (2, 2))]
    )
    def test_sensors_lie_on_cells_of_their_own_on_main_roads(self, n_sensors, freeways):
        roads = highways(n_sensors, freeways)
        assert len(set(roads.sensors.tolist())) == n_sensors
        assert len(set(roads.sensor_ids)) == n_sensors
        assert roads.mainline[roads.sensors].all()
        assert not roads.mainline[roads.network.sinks].all()

    @pytest.mark.usefixtures("as_shipped")
    def test_roads_that_are_full_everywhere_empty_again(self):
        # Crossing motorways close loops, which would lock for good if nobody could leave them.
        roads = highways(24, (2, 2)).network
        full = roads.jam_density * roads.length
        history = transmit(roads, np.zeros((8 * 12, len(roads.sources))), initial=full)
        assert history.vehicles[-1].sum() < 1e-3 * full.sum()
        locked = RoadNetwork(**{**vars(roads), "turning_lane": np.zeros(len(roads.split), bool)})
        history = transmit(locked, np.zeros((8 * 12, len(roads.sources))), initial=full)
        assert history.vehicles[-1].sum() > 0.1 * full.sum()

    def test_graph_is_the_directed_kernel_of_road_distance(self):
        roads = highways(40, (1, 1))
        edge_index, weight = sensor_graph(roads)
        edges = {(a, b): w for a, b, w in zip(*edge_index.tolist(), weight.tolist(), strict=True)}
        assert all(a != b for a, b in edges)
        assert min(edges.values()) >= 0.1
        assert max(edges.values()) < 1
        # On one carriageway the road distance is the difference of the cells, one way only.
        cells = roads.sensors[:10]
        ahead = (cells[None, :] - cells[:, None]) * CELL_MILES
        sigma = CELL_MILES * np.sqrt(-((cells[1] - cells[0]) ** 2) / np.log(edges[0, 1]))
        assert 1.0 < sigma < KERNEL_REACH_MILES / 2
        for a in range(10):
            for b in range(10):
                expected = np.exp(-((ahead[a, b] / sigma) ** 2)) if ahead[a, b] > 0 else 0.0
                expected = expected if expected >= 0.1 else 0.0
                assert edges.get((a, b), 0.0) == pytest.approx(expected, abs=1e-9)
        roads_joined = {(roads.sensor_ids[a][0], roads.sensor_ids[b][0]) for a, b in edges}
        assert ("E", "N") in roads_joined  # by the interchange
        assert ("E", "W") not in roads_joined  # nobody turns round


@pytest.fixture(scope="module")
def week():
    # Shape checks at each of forty thousand steps would take longer than the steps.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "jaxtyping_disable", True)
        return simulate_traffic(n_sensors=60, days=7, freeways=(1, 1), progress=False)


class TestSimulatedTraffic:
    def test_looks_like_traffic(self, week):
        speed = week.filled()
        weekday = torch.tensor(week.index.dayofweek < 5)
        hour = torch.tensor(week.index.hour)

        def mean(hours, days):
            return float(speed[torch.isin(hour, torch.tensor(hours)) & days].mean())

        night = mean([1, 2, 3], weekday)
        assert 60 < night < 68
        assert mean([8], weekday) < night - 7
        assert mean([17], weekday) < night - 7
        assert mean([8], ~weekday) > night - 3
        # Some sensors nearly stand still at a rush hour, most of the week all drive.
        assert float(speed.min()) < 15
        assert 0.02 < float((speed < 40).float().mean()) < 0.2

    def test_missing_readings_come_in_spells_at_the_rate_asked_for(self, week):
        silent = ~week.mask
        assert float(silent.float().mean()) == pytest.approx(0.08, abs=0.015)
        assert week.speed[silent].isnan().all()
        assert week.speed[week.mask].min() >= 1
        assert week.speed[week.mask].max() <= 70
        spells = (silent[1:] & ~silent[:-1]).sum() + silent[0].sum()
        assert 9 < float(silent.sum() / spells) < 15

    # beartype, which checks types under pytest, draws from `random` itself.
    @pytest.mark.usefixtures("as_shipped")
    def test_seed_fixes_everything_and_global_random_state_is_untouched(self):
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
        options = {"n_sensors": 12, "days": 1, "freeways": (1, 1), "progress": False}
        first, again = simulate_traffic(seed=3, **options), simulate_traffic(seed=3, **options)
        torch.testing.assert_close(first.speed, again.speed, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(first.edge_weight, again.edge_weight)
        other = simulate_traffic(seed=4, **options)
        assert not torch.equal(first.filled(), other.filled())
        assert torch.equal(torch_state, torch.get_rng_state())
        assert python_state == random.getstate()
        assert numpy_state == np.random.get_state()[1].tolist()  # noqa: NPY002

    @pytest.mark.usefixtures("as_shipped")
    def test_missing_rate_changes_nothing_else(self):
        options = {"n_sensors": 100, "days": 1, "freeways": (1, 1), "progress": False}
        whole = simulate_traffic(missing_rate=0.0, **options)
        gappy = simulate_traffic(missing_rate=0.3, **options)
        assert whole.mask.all()
        assert float(gappy.mask.float().mean()) == pytest.approx(0.7, abs=0.04)
        assert torch.equal(whole.speed[gappy.mask], gappy.speed[gappy.mask])

    @pytest.mark.usefixtures("as_shipped")
    def test_incidents_slow_traffic_that_flows_freely_without_them(self):
        options = {"n_sensors": 40, "days": 1, "freeways": (1, 1), "demand": 0.75}
        options |= {"missing_rate": 0.0, "progress": False}
        calm = simulate_traffic(incidents_per_day=0.0, **options)
        struck = simulate_traffic(incidents_per_day=60.0, **options)
        assert float((calm.speed < 40).float().mean()) == 0
        assert float((struck.speed < 40).float().mean()) > 0.005


@pytest.mark.usefixtures("as_shipped")
class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"n_sensors": 0}, "`n_sensors` is 0, expected an integer of at least 1"),
            ({"days": -1}, "`days` is -1"),
            ({"seed": -1}, "`seed` is -1, expected an integer of at least 0"),
            ({"demand": float("nan")}, "`demand` is nan, expected a finite number above 0"),
            ({"incidents_per_day": -2.0}, "`incidents_per_day` is -2.0"),
            ({"missing_rate": 1.0}, "`missing_rate` is 1.0, expected a share"),
            ({"freeways": (0, 2)}, "`freeways` is 0"),
            ({"start": "some day"}, "`start` is 'some day', expected a time such as"),
        ],
    )
    def test_options_out_of_range_are_refused(self, options, match):
        with pytest.raises(ValueError, match=match):
            simulate_traffic(**options)
