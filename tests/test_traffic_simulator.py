"""The cell transmission model against known answers, and the simulated traffic built on it."""

import random

import numpy as np
import pytest
import torch
from jaxtyping import config

from sdkd_plugin.data.cell_transmission import CELL_MILES, Roads, cell_flows, transmit
from sdkd_plugin.data.traffic_simulator import build_highways, sensor_graph, simulate_traffic

STEP = 1 / 240  # hours: 15 seconds
WAVE = 2000 / (190 - 2000 / 65)


def straight(cells, lanes=3.0, free_speed=65.0):
    """A road without ramps: drivers enter the first of equal cells in a row."""
    order = np.arange(cells)
    ways = np.stack([order[:-1], order[1:]])
    speed, lanes = np.full(cells, free_speed), np.full(cells, lanes)
    return Roads(speed, lanes, lanes, ways, np.ones(cells - 1))


def demand(cells, inflow, intervals=96):
    return np.eye(1, cells) * np.full((intervals, 1), inflow)


def bottleneck(at=40, capacity=3600.0):
    """A straight road on which cell ``at`` lets only ``capacity`` through, for 96 intervals."""
    roads = straight(60)
    limit = np.tile(roads.capacity, (96, 1))
    limit[:, at] = capacity
    return roads, limit


def highways(n_sensors=40, freeways=(2, 1), seed=0):
    return build_highways(n_sensors, freeways, np.random.default_rng(seed))


class TestKnownAnswers:
    def test_low_demand_flows_at_free_speed(self):
        plan = highways()
        wanted = np.tile(np.where(plan.demand[0] > 0, 200.0, 0.0), (24, 1))
        history = transmit(plan.roads, wanted)
        np.testing.assert_allclose(history.speed[-1], plan.roads.free_speed, rtol=1e-9)
        steady = plan.roads.steady_flow(wanted[0])
        np.testing.assert_allclose(history.flow[-1], steady, rtol=2e-3, atol=0.5)

    def test_at_courant_number_one_a_platoon_moves_one_cell_a_step_unchanged(self):
        roads = straight(6, free_speed=CELL_MILES / STEP)
        vehicles = platoon = np.array([10.0, 0, 0, 0, 0, 0])
        for place in range(5):
            out, into, _ = cell_flows(roads, vehicles, np.zeros(6), STEP, roads.capacity)
            vehicles = vehicles + into - out
            np.testing.assert_allclose(vehicles, np.roll(platoon, place + 1))

    @pytest.mark.parametrize("inflow", [4500.0, 5400.0])
    def test_queue_behind_bottleneck_grows_at_the_rankine_hugoniot_speed(self, inflow):
        least = 3600.0
        roads, limit = bottleneck(capacity=least)
        history = transmit(roads, demand(60, inflow), capacity=limit)
        density = history.vehicles / CELL_MILES
        free = inflow / 65
        queued = 570 - least / WAVE
        expected = (least - inflow) / (queued - free)
        np.testing.assert_allclose(density[-1, 38:40], queued, rtol=1e-6)
        np.testing.assert_allclose(density[-1, 41:], least / 65, rtol=1e-6)
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
        roads = straight(60)
        history = transmit(
            roads, demand(60, 0.0, 10), initial=np.where(np.arange(60) < 50, roads.most, 0.0)
        )
        density = history.vehicles / CELL_MILES
        middle = (570 + 6000 / 65) / 2
        rows = np.arange(4, 10)
        fronts = [
            np.interp(-middle, -density[row, :50], np.arange(50)) * CELL_MILES for row in rows
        ]
        measured = np.polyfit((rows + 1) / 12, fronts, 1)[0]
        assert measured == pytest.approx(-WAVE, rel=0.02)

    @pytest.mark.parametrize("space", [30.0, 18.0, 6.0])
    def test_ways_into_a_full_cell_share_its_room_in_proportion(self, space):
        # Cells 0 (15 vehicles) and 1 (5) merge into 2, where a driver (4) waits outside.
        speed = np.full(3, CELL_MILES / STEP)
        ways, lanes = np.array([[0, 1], [2, 2]]), np.full(3, 4.0)
        roads = Roads(speed, lanes, lanes, ways, np.ones(2))
        room = space / (roads.wave_speed[2] * STEP / CELL_MILES)
        vehicles = np.array([15.0, 5.0, roads.most[2] - room])
        out, into, entered = cell_flows(
            roads, vehicles, np.array([0, 0, 4.0]), STEP, roads.capacity
        )
        fits = min(1.0, space / 24)
        np.testing.assert_allclose([*out[:2], entered[2]], np.array([15, 5, 4]) * fits, rtol=1e-9)
        assert into[2] == pytest.approx(20 * fits)

    def test_a_blocked_turn_does_not_block_the_road_or_the_exit(self):
        # Of cell 0 half stay, a quarter turn into a jam, and a quarter leave the network.
        speed = np.full(3, CELL_MILES / STEP)
        ways, lanes = np.array([[0, 0], [1, 2]]), np.full(3, 4.0)
        roads = Roads(speed, lanes, lanes, ways, np.array([0.5, 0.25]))
        vehicles = np.array([16.0, 0.0, roads.most[2]])
        out, into, _ = cell_flows(roads, vehicles, np.zeros(3), STEP, roads.capacity)
        np.testing.assert_allclose(into, [0, 8, 0])
        assert out[0] == pytest.approx(12)

    def test_incident_slows_upstream_and_not_downstream(self):
        roads, limit = bottleneck(at=30, capacity=2000.0)
        limit[:24] = limit[60:] = roads.capacity
        calm = transmit(roads, demand(60, 5000.0))
        history = transmit(roads, demand(60, 5000.0), capacity=limit)
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
        roads = highways(seed=seed).roads
        staying = np.bincount(roads.ways[0], roads.share, len(roads.lanes))
        for _ in range(50):
            # Empty, full and in between.
            vehicles = roads.most * np.clip(rng.uniform(-0.5, 1.5, size=len(roads.most)), 0, 1)
            capacity = roads.capacity * rng.uniform(0, 1, size=len(roads.most))
            waiting = rng.uniform(0, 200, size=len(roads.most))
            out, into, entered = cell_flows(roads, vehicles, waiting, STEP, capacity)
            send = np.minimum(vehicles * (roads.free_speed * STEP / CELL_MILES), capacity * STEP)
            exits = ((1 - staying) * send).sum()
            assert into.sum() == pytest.approx(out.sum() - exits, abs=1e-9)
            assert min(out.min(), into.min(), entered.min()) >= 0
            assert (out <= send + 1e-9).all()
            assert (into + entered <= capacity * STEP + 1e-9).all()
            assert (entered <= waiting).all()
            after = vehicles + into + entered - out
            assert (after >= -1e-9).all()
            assert (after <= roads.most + 1e-9).all()

    def test_a_run_never_exceeds_capacity(self):
        rng = np.random.default_rng(1)
        roads = highways().roads
        wanted = rng.uniform(0, 4000, size=(48, len(roads.lanes)))
        limit = roads.capacity * rng.uniform(0.3, 1, size=wanted.shape)
        history = transmit(roads, wanted, capacity=limit, initial=0.1 * roads.most)
        assert (history.flow <= limit * (1 + 1e-12)).all()
        assert (history.speed <= roads.free_speed * (1 + 1e-9)).all()


class TestRoads:
    @pytest.mark.parametrize(
        ("n_sensors", "freeways"), [(1, (1, 1)), (7, (3, 2)), (20, (1, 1)), (207, (2, 2))]
    )
    def test_sensors_lie_on_cells_of_their_own(self, n_sensors, freeways):
        plan = highways(n_sensors, freeways)
        assert len(set(plan.sensors.tolist())) == n_sensors
        assert len(set(plan.sensor_ids)) == n_sensors
        assert plan.sensors.max() < len(plan.roads.lanes)

    def test_roads_that_are_full_everywhere_empty_again(self):
        # Crossing motorways close loops, which would lock for good if nobody could leave them.
        roads = highways(24, (2, 2)).roads
        history = transmit(roads, np.zeros((8 * 12, len(roads.lanes))), initial=roads.most)
        assert history.vehicles[-1].sum() < 1e-3 * roads.most.sum()

    def test_graph_is_the_directed_kernel_of_road_distance(self):
        plan = highways(40, (1, 1))
        edge_index, weight = sensor_graph(plan)
        edges = {(a, b): w for a, b, w in zip(*edge_index.tolist(), weight.tolist(), strict=True)}
        assert all(a != b for a, b in edges)
        assert min(edges.values()) >= 0.1
        assert max(edges.values()) < 1
        # On one carriageway the road distance is the difference of the cells, one way only.
        cells = plan.sensors[:10]
        ahead = (cells[None, :] - cells[:, None]) * CELL_MILES
        sigma = CELL_MILES * np.sqrt(-((cells[1] - cells[0]) ** 2) / np.log(edges[0, 1]))
        assert 1.0 < sigma < 4.0
        for a in range(10):
            for b in range(10):
                expected = np.exp(-((ahead[a, b] / sigma) ** 2)) if ahead[a, b] > 0 else 0.0
                expected = expected if expected >= 0.1 else 0.0
                assert edges.get((a, b), 0.0) == pytest.approx(expected, abs=1e-9)
        roads_joined = {(plan.sensor_ids[a][0], plan.sensor_ids[b][0]) for a, b in edges}
        assert ("E", "N") in roads_joined  # by the crossing
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
