"""Graphs as they are: disjoint batches, directed and broken graphs, sensors that come and go."""

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transform_contract import TransformContract
from tsl_parts import trainer

from sdkd_plugin import Bands, DistillationLoss, GraphTransform, LatentPair
from sdkd_plugin.adapters.tsl import (
    DisjointGraphs,
    DistillationPredictor,
    OnSensors,
    SDKDStudent,
    SharedSensors,
    match_sensors,
)

from tsl.data import SpatioTemporalDataset  # isort: skip
from tsl.data.loader import DisjointGraphLoader, StaticGraphLoader  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip
from tsl.nn.models import GRUGCNModel  # isort: skip

BANDS = Bands.split(0.4)
# Directed, of two components, with an isolated node at the end.
EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 4]])
WEIGHT = torch.tensor([1.0, 0.5, 0.2, 0.7])
NODES = 6
SAME = (0.0, 1.0)
FIT = {"loss_fn": MaskedMAE(), "optim_class": torch.optim.SGD, "optim_kwargs": {"lr": 0.1}}


def graph(edges: Tensor = EDGES, weight: Tensor | None = WEIGHT, n: int = NODES, **options):
    return GraphTransform.from_edges(edges, weight, n, **options)


def dataset(n: int = NODES, edges: Tensor = EDGES, weight: Tensor = WEIGHT, **covariates: Tensor):
    generator = torch.Generator().manual_seed(n)
    index = pd.date_range("2012-03-01", periods=20, freq="5min")
    return SpatioTemporalDataset(
        target=pd.DataFrame(torch.randn(20, n, generator=generator).numpy(), index=index),
        mask=(torch.rand(20, n, 1, generator=generator) > 0.2).numpy(),
        connectivity=(edges, weight),
        covariates=covariates or None,
        window=6,
        horizon=3,
    )


def gru(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return GRUGCNModel(1, 8, 1, 3, exog_size=0, enc_layers=1, gcn_layers=1)


def mixer(n: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return SDKDStudent(input_size=1, window=6, horizon=3, n_nodes=n, hidden_size=8, emb_size=4)


def fit(loss: DistillationLoss, learner: nn.Module, batches: Any) -> dict[str, Tensor]:
    run = trainer(1, limit_train_batches=2, limit_val_batches=1)
    run.fit(DistillationPredictor(loss, model=learner, **FIT), batches, batches)
    return run.callback_metrics


# Disjoint batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gru, lambda seed: mixer(NODES, seed)])
def test_disjoint_batches_of_one_graph_train_as_static_ones(make):
    learners, logged = [make(0), make(0)], []
    for learner, (loader, of_batch) in zip(
        learners,
        [
            (StaticGraphLoader(dataset(), batch_size=4), graph()),
            (DisjointGraphLoader(dataset(), batch_size=4, force_batch=True), DisjointGraphs()),
        ],
        strict=True,
    ):
        logged.append(fit(DistillationLoss(make(9), of_batch, BANDS), learner, loader))
    assert logged[0].keys() == logged[1].keys()
    for name, value in logged[0].items():
        torch.testing.assert_close(logged[1][name], value, rtol=1e-5, atol=1e-6)
    before = make(0).state_dict()
    for name, value in learners[0].state_dict().items():
        torch.testing.assert_close(learners[1].state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(v, before[k]) for k, v in learners[0].state_dict().items())


def test_a_graph_met_again_is_not_decomposed_again(monkeypatch):
    made = []
    original = GraphTransform.from_edges
    monkeypatch.setattr(
        GraphTransform, "from_edges", lambda *a, **k: made.append(a) or original(*a, **k)
    )
    graphs = DisjointGraphs(keep=2)

    def meet(*sizes: int) -> int:
        made.clear()
        starts = torch.tensor([0, *sizes]).cumsum(0)
        edges = torch.stack([starts[:-1], starts[:-1] + 1])
        graphs.set_graphs(edges, None, starts)
        return len(made)

    assert meet(2, 2, 3, 2) == 2
    assert meet(3, 2) == 0
    assert meet(4) == 1
    assert meet(2) == 0  # the last met but one
    assert meet(3) == 1  # forgotten


def test_batches_that_do_not_fit_the_transform_are_refused():
    batches = DisjointGraphLoader(dataset(), batch_size=4, force_batch=True)
    one = DistillationLoss(gru(9), graph(), BANDS)
    with pytest.raises(ValueError, match=r"4 disjoint graphs .* expected transform=DisjointGraphs"):
        DistillationPredictor(one, model=gru(0), **FIT).training_step(next(iter(batches)), 0)
    flat = next(iter(DisjointGraphLoader(dataset(), batch_size=4)))
    many = DistillationLoss(gru(9), DisjointGraphs(), BANDS)
    with pytest.raises(ValueError, match=r"shape \(6, 24, 1\), .* force_batch=True"):
        DistillationPredictor(many, model=gru(0), **FIT).training_step(flat, 0)
    latents = DistillationLoss(mixer(NODES), DisjointGraphs(), latents=[LatentPair()])
    with pytest.raises(ValueError, match=r"latents on .* cannot be distilled over DisjointGraphs"):
        latents.fit_latents(mixer(NODES), torch.zeros(1, 6, NODES, 1), edge_index=EDGES)


def test_disjoint_graphs_refuse(as_shipped):
    graphs = DisjointGraphs()
    with pytest.raises(ValueError, match="no graphs are set: call `set_graphs`"):
        graphs.sample_band_energy(torch.zeros(1, 2, 1), BANDS)
    with pytest.raises(ValueError, match="`edge_index` has 1 edges from one graph to another"):
        graphs.set_graphs(torch.tensor([[0, 2], [1, 1]]), None, torch.tensor([0, 2, 4]))
    graphs.set_graphs(torch.tensor([[0], [1]]), None, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="`response` is a tensor, expected a function"):
        graphs.filter(torch.zeros(1, 4, 1), torch.ones(4))
    with pytest.raises(ValueError, match="`keep` is 0, expected an integer of at least 1"):
        DisjointGraphs(keep=0)
    wrong = DisjointGraphs(symmetrization="sum")
    with pytest.raises(ValueError, match="`symmetrization` is 'sum', expected one of"):
        wrong.set_graphs(torch.tensor([[0], [1]]), None, torch.tensor([0, 2]))


# Graphs as they are -----------------------------------------------------------------------------


@pytest.mark.parametrize("symmetrization", ["mean", "max"])
def test_directed_broken_graphs_are_learned_on(symmetrization):
    loss = DistillationLoss(mixer(NODES, seed=9), graph(symmetrization=symmetrization), BANDS)
    logged = fit(loss, mixer(NODES), StaticGraphLoader(dataset(), batch_size=4))
    assert all(value.isfinite() for value in logged.values())
    assert logged["train_kd_band_0"] > 0
    # An isolated sensor is of frequency 0, and is pulled to its teacher like the others.
    d = torch.zeros(1, 3, NODES, 1)
    d[:, :, -1] = 2.0
    energy = loss.transform.sample_band_energy(d, BANDS)
    torch.testing.assert_close(energy, torch.tensor([[12.0, 0.0]]))
    with pytest.raises(ValueError, match="`edge_index` is a directed graph: choose symmetrization"):
        graph(symmetrization="refuse")


# Sensors that come and go -----------------------------------------------------------------------


def test_sensors_are_matched_by_id():
    match = match_sensors([400001, 400017, 400030], ["400030", "400001"])
    assert match.teacher.tolist() == [2, 0]
    assert match.student.tolist() == [0, 1]
    match = match_sensors("abc", "xcya", unknown="ignore")
    assert match.teacher.tolist() == [2, 0]
    assert match.student.tolist() == [1, 3]


def test_other_sensors_are_refused(as_shipped):
    with pytest.raises(ValueError, match=r"2 of 3 sensors that the teacher does not know, .*'x'"):
        match_sensors("abc", "xay")
    with pytest.raises(ValueError, match=r"2 of 2 sensors that the teacher does not know"):
        match_sensors("abc", "xy", unknown="ignore")
    with pytest.raises(ValueError, match=r"`teacher_ids` has \['a'\] more than once"):
        match_sensors("aab", "a")
    with pytest.raises(ValueError, match=r"`student_ids` has \['b'\] more than once"):
        match_sensors("ab", "bb")
    with pytest.raises(ValueError, match="`unknown` is 'drop', expected one of"):
        match_sensors("ab", "b", unknown="drop")


def test_a_teacher_speaks_to_a_student_with_dropped_sensors():
    wise, places = mixer(NODES, seed=9), torch.tensor([4, 0, 2])
    ids = "abcdef"
    match = match_sensors(ids, [ids[i] for i in places])
    wrapped = OnSensors(wise, match, NODES, 3, SAME, SAME, EDGES, WEIGHT)
    full = torch.randn(20, NODES, 1, generator=torch.Generator().manual_seed(1))
    pair = torch.tensor([[1, 2], [2, 1]])
    data = dataset(3, pair, torch.ones(2), teacher_x=full)
    # A model of tsl: pytest's type checks hide from tsl which inputs one of ours takes.
    loss = DistillationLoss(wrapped, graph(pair, None, 3), BANDS, weighting=(1.0, 1.0))
    batch = next(iter(StaticGraphLoader(data, batch_size=4)))
    with torch.no_grad():
        expected = wise(full.unfold(0, 6, 1)[:4].movedim(-1, 1), EDGES, WEIGHT)[:, :, places]
        x = batch.input.x
        torch.testing.assert_close(wrapped(x, teacher_x=batch.input.teacher_x), expected)
    logged = fit(loss, gru(0), StaticGraphLoader(data, batch_size=4))
    assert logged["train_kd_band_0"] > 0
    with pytest.raises(ValueError, match="has 3 of the teacher's 6 sensors: add the window"):
        wrapped(x)
    with pytest.raises(ValueError, match=r"`sensors of teacher_x` has shape \(3,\), expected"):
        wrapped(x, teacher_x=x)


def test_a_student_with_added_sensors_hears_of_the_shared_ones_only():
    wise = mixer(NODES, seed=9)
    mine = ["f", "new", "e", "d", "c", "b", "a"]
    match = match_sensors("abcdef", mine, unknown="ignore")
    wrapped = OnSensors(wise, match, NODES, len(mine), SAME, SAME, EDGES, WEIGHT)
    x = torch.randn(4, 6, len(mine), 1, generator=torch.Generator().manual_seed(0))
    own = torch.stack([x[:, :, mine.index(name)] for name in "abcdef"], 2)
    with torch.no_grad():
        answer, expected = wrapped(x), wise(own, EDGES, WEIGHT)
    for i, name in enumerate("abcdef"):
        torch.testing.assert_close(answer[:, :, mine.index(name)], expected[:, :, i])
    order = torch.arange(NODES).flip(0)  # the shared sensors, as the student has them
    shared = SharedSensors(graph(order[EDGES]), match.student, len(mine))
    learner = mixer(len(mine))
    loss = DistillationLoss(wrapped, shared, BANDS, weighting=(1.0, 1.0))
    DistillationPredictor(loss, model=learner, **FIT)  # accepts it
    edges = torch.tensor([[1], [0]])
    batch = next(iter(StaticGraphLoader(dataset(len(mine), edges, torch.ones(1)), batch_size=4)))
    inputs = dict(batch.input.items())
    forecast = learner(**inputs).detach().requires_grad_()
    terms = loss(forecast, **inputs)
    with torch.no_grad():
        difference = (forecast - wrapped(inputs["x"]))[:, :, match.student]
    torch.testing.assert_close(terms.total, difference.square().mean())
    (gradient,) = torch.autograd.grad(terms.total, forecast)
    assert (gradient[:, :, 1] == 0).all()
    assert (gradient[:, :, match.student] != 0).all()
    assert shared.filter(forecast, lambda f: f * 0 + 1)[:, :, 1].abs().max() == 0
    with pytest.raises(ValueError, match=r"6 of the student's 7 sensors .* SharedSensors\("):
        DistillationPredictor(
            DistillationLoss(wrapped, graph(n=len(mine)), BANDS), model=learner, **FIT
        )


def test_wrappers_refuse_what_does_not_fit():
    match = match_sensors("abc", "ca")
    with pytest.raises(ValueError, match="`n_teacher` is 2, expected an integer of at least 3"):
        OnSensors(mixer(3), match, 2, 2, SAME, SAME, EDGES[:, :2])
    wrapped = OnSensors(mixer(3), match, 3, 2, SAME, SAME, EDGES[:, :2])
    x = torch.zeros(1, 6, 3, 1)
    with pytest.raises(ValueError, match=r"`u` has shape \(1, 6, 2, 1\), .* all sensors share"):
        wrapped(x[:, :, :2], teacher_x=x, u=torch.zeros(1, 6, 2, 1))
    pair = graph(torch.tensor([[0], [1]]), None, 2)
    with pytest.raises(ValueError, match=r"`transform` has shape \(2,\), expected \(3,\)"):
        SharedSensors(pair, torch.tensor([0, 1, 2]), 4)
    with pytest.raises(ValueError, match=r"`places` is \[0, 4\], expected nodes from 0 to 3"):
        SharedSensors(pair, torch.tensor([0, 4]), 4)


def test_a_teacher_of_other_units_reads_and_answers_in_its_own():
    """Two scalers: in miles an hour teacher alone and wrapped forecast the same."""
    match = match_sensors("abc", "ca")
    teacher = mixer(3)
    own, given = (50.0, 10.0), (60.0, 4.0)
    wrapped = OnSensors(teacher, match, 3, 2, own, given, EDGES[:, :2])
    speeds = 40 + 20 * torch.rand(2, 6, 3, 1, generator=torch.Generator().manual_seed(0))
    x = ((speeds - given[0]) / given[1])[:, :, [2, 0]]
    told = wrapped(x, (speeds - given[0]) / given[1]) * given[1] + given[0]
    alone = teacher((speeds - own[0]) / own[1], EDGES[:, :2]) * own[1] + own[0]
    torch.testing.assert_close(told, alone[:, :, [2, 0]], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"`student_scaler\[1\]` is 0.0, expected a finite number"):
        OnSensors(teacher, match, 3, 2, own, (60.0, 0.0), EDGES[:, :2])


@pytest.mark.parametrize("options", [{"teacher_bound": 0.0}, {"aggregation": "camkd"}])
def test_what_judges_by_samples_does_not_go_with_disjoint_graphs(options: dict):
    loss = DistillationLoss(mixer(3), DisjointGraphs(), **options)
    with pytest.raises(ValueError, match="compare teachers on all sensors of a sample"):
        DistillationPredictor(loss, model=mixer(3), **FIT)


# Both as transforms ------------------------------------------------------------------------------


class TestDisjointGraphs(TransformContract):
    """Two equal graphs, another one, and a single node."""

    @pytest.fixture
    def transform(self, device: torch.device) -> DisjointGraphs:
        graphs = DisjointGraphs(dtype=torch.float64)
        edges = torch.cat([EDGES, EDGES + NODES, torch.tensor([[12, 13], [13, 14]])], 1).to(device)
        weight = torch.cat([WEIGHT, WEIGHT, torch.ones(2)]).to(device)
        graphs.set_graphs(edges, weight, torch.tensor([0, 6, 12, 15, 16]))
        return graphs

    def test_each_graph_is_filtered_by_its_own_frequencies(self, transform, make_field):
        x = make_field(2, 3)
        third = graph(torch.tensor([[0, 1], [1, 2]]), None, 3, dtype=torch.float64)
        filtered = transform.filter(x, self.response)
        expected = third.filter(x[..., 12:15, :], self.response)
        torch.testing.assert_close(filtered[..., 12:15, :], expected)
        torch.testing.assert_close(filtered[..., 15:, :], x[..., 15:, :])  # a node is its mean


class TestSharedSensors(TransformContract):
    """All sensors, in another order; of sensors that are not shared: see above."""

    places = torch.tensor([3, 1, 0, 5, 4, 2])

    @pytest.fixture
    def transform(self, device: torch.device) -> SharedSensors:
        own = graph(dtype=torch.float64)
        return SharedSensors(own, self.places, NODES).to(device)

    def test_the_order_of_the_graph_is_found(self, transform, make_field):
        x, own = make_field(2, 3).cpu(), graph(dtype=torch.float64)
        filtered = transform.cpu().filter(x, self.response)[..., self.places, :]
        torch.testing.assert_close(filtered, own.filter(x[..., self.places, :], self.response))
