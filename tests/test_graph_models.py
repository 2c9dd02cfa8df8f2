"""The graph models: one contract that each inherits, then what is each one's own."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_contract import BATCH, ModelContract, n_parameters, tapped
from torch import Tensor, nn

from sdkd_plugin.models import graph_blocks
from sdkd_plugin.models.graph_alternet import AttentionBranch, GraphAlterNet
from sdkd_plugin.models.graph_blocks import NodeEmbedding, Propagation
from sdkd_plugin.models.graph_mixer import GraphMixer

WINDOW, HORIZON, NODES, EXOG = 7, 5, 6, 2

# Directed; node 5 has no edges, node 1 a self loop, and the edge from 0 to 1 is there twice.
EDGES = torch.tensor([[0, 0, 1, 2, 3, 4, 1, 2], [1, 1, 2, 3, 4, 0, 1, 0]])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.3, 1.0, 0.7, 5.0, 0.4])


FORMS = ("dense", "sparse", "messages")


def propagate_by(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small graphs propagate as large ones do, or as they do when they are compiled."""
    monkeypatch.setattr(graph_blocks, "DENSE_UP_TO", NODES if form == "dense" else 0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: form == "messages")


def readings(batch: int = BATCH, features: int = 1, seed: int = 0) -> Tensor:
    """Draw random windows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, WINDOW, NODES, features, generator=generator)


def shared_covariates(batch: int = BATCH, seed: int = 1) -> Tensor:
    """Draw random covariates that all nodes share."""
    return torch.randn(batch, WINDOW, EXOG, generator=torch.Generator().manual_seed(seed))


class Contract(ModelContract):
    """What holds for every graph model. An implementation gives `kind` and its smallest options."""

    kind: Callable[..., nn.Module]
    options: dict[str, Any]
    tapped_axes: int
    sizes = {  # noqa: RUF012
        **{"horizon": HORIZON, "window": WINDOW, "n_nodes": NODES, "exog_size": EXOG},
        **{"input_size": 1, "hidden_size": 16, "emb_size": 4, "n_layers": 1, "hops": 1},
    }

    @pytest.fixture
    def make(self) -> Callable[..., nn.Module]:
        return lambda **options: type(self).kind(**{**self.sizes, **self.options, **options})

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        return readings(seed=seed), EDGES, WEIGHTS, shared_covariates()

    def build(self, **options: Any) -> Any:
        """Build the model with the sizes of this file, in eval mode."""
        torch.manual_seed(0)
        return type(self).kind(**{**self.sizes, **self.options, **options}).eval()

    @pytest.mark.parametrize("features", [(1, None, 1), (3, None, 3), (3, 2, 2)])
    def test_shapes(self, features: tuple[int, int | None, int]) -> None:
        read, forecast, expected = features
        model = self.build(input_size=read, output_size=forecast, residual=forecast is None)
        out = model(readings(features=read), EDGES, WEIGHTS, shared_covariates())
        assert out.shape == (BATCH, HORIZON, NODES, expected)

    def test_options_that_turn_parts_off(self) -> None:
        model = self.build(exog_size=0, emb_size=0)
        assert model(readings(), EDGES).shape == (BATCH, HORIZON, NODES, 1)
        assert "embedding.weight" not in model.state_dict()

    def test_taps_are_modules_with_nodes_then_channels_last(self) -> None:
        model = self.build()
        _, caught = tapped(model, *self.inputs())
        assert "latent" in caught
        assert caught.keys() == model.taps.keys()
        for activation in caught.values():
            assert activation.ndim == self.tapped_axes
            assert activation.shape[0] == BATCH
            assert activation.shape[-2:] == (NODES, self.sizes["hidden_size"])

    def test_the_forecast_is_a_function_of_the_latent_and_the_last_reading(self) -> None:
        model = self.build()
        path = model.taps["latent"]
        first, second = readings(seed=2), readings(seed=3)
        kept: list[Tensor] = []
        handle = model.get_submodule(path).register_forward_hook(lambda *a: kept.append(a[2]))
        u = shared_covariates()
        change = model(first, EDGES, WEIGHTS, u) - first[:, -1:]
        handle.remove()
        model.get_submodule(path).register_forward_hook(lambda *_: kept[0])
        torch.testing.assert_close(model(second, EDGES, WEIGHTS, u) - second[:, -1:], change)

    def test_residual_adds_the_last_reading(self) -> None:
        model, plain = self.build(), self.build(residual=False)
        plain.load_state_dict(model.state_dict())
        x, u = readings(), shared_covariates()
        torch.testing.assert_close(
            model(x, EDGES, WEIGHTS, u), x[:, -1:] + plain(x, EDGES, WEIGHTS, u)
        )

    def test_which_inputs_matter(self) -> None:
        model, (x, edges, weights, u) = self.build(), self.inputs()
        kept = edges[0] != edges[1]
        out, unweighted = model(x, edges, weights, u), model(x, edges, None, u)
        for same, expected in [
            ((x, edges, 7 * weights, u), out),
            ((x, edges[:, kept], weights[kept], u), out),
            ((x, edges, weights, u[:, :, None].expand(-1, -1, NODES, -1)), out),
            ((x, edges, torch.ones_like(weights), u), unweighted),
        ]:
            torch.testing.assert_close(model(*same), expected)
        for other in [
            (x, edges, None, u),
            (x, edges.flip(0), weights, u),
            (x, edges[:, :5], weights[:5], u),
            (x, edges, weights, u + 1),
        ]:
            assert not torch.allclose(model(*other), out)

    def test_permutation_equivariance(self) -> None:
        model, (x, edges, weights, u) = self.build(), self.inputs()
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        place = torch.argsort(order)
        permuted = copy.deepcopy(model)
        with torch.no_grad():
            permuted.embedding.weight.copy_(model.embedding.weight[order])
        expected = model(x, edges, weights, u)[:, :, order]
        given = (x[:, :, order], place[edges], weights, u)
        torch.testing.assert_close(permuted(*given), expected)
        assert not torch.allclose(model(*given), expected)

    def test_isolated_nodes_and_empty_graphs_are_finite(self) -> None:
        model, u = self.build(), shared_covariates()
        x = readings().requires_grad_()
        for edges, weights in [
            (EDGES, WEIGHTS),
            (EDGES, torch.zeros_like(WEIGHTS)),
            (EDGES[:, :0], WEIGHTS[:0]),
        ]:
            out = model(x, edges, weights, u)
            (gradient,) = torch.autograd.grad(out.sum(), x)
            assert torch.isfinite(out).all()
            assert torch.isfinite(gradient).all()

    def test_it_learns_a_delayed_copy_of_a_neighbour(self) -> None:
        # Node i repeats what its predecessor on a ring read one window earlier: only the edges say.
        ring = torch.stack([torch.arange(NODES), torch.arange(1, NODES + 1) % NODES])
        x = readings(batch=16, seed=4)
        y = x[:, :HORIZON].roll(1, dims=2)
        model = self.build(exog_size=0, residual=False)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            loss = (model(x, ring) - y).square().mean()
            loss.backward()
            optimiser.step()
        assert loss.item() < 0.1 * y.var().item()

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(1, WINDOW, NODES)}, r"`x` has shape \(1, 7, 6\).*unsqueeze"),
            ({"x": torch.zeros(1, 4, NODES, 1)}, "`x` has 4 time steps, expected 7.*`window=7`"),
            ({"x": torch.zeros(1, WINDOW, 2, 1)}, "`x` has 2 nodes, expected 6.*`n_nodes=6`"),
            ({"x": torch.zeros(1, WINDOW, NODES, 9)}, "`x` has 9 features.*`input_size=1`"),
            ({"u": None}, "`u` is None, expected covariates.*`exog_size=2`"),
            ({"u": torch.zeros(1, WINDOW, 5)}, r"`u` has shape \(1, 7, 5\), .*s \(1, 7, 2\)"),
            ({"u": torch.zeros(1, WINDOW, 3, EXOG)}, r"`u` has shape .*\(1, 7, 6, 2\)"),
            ({"edge_index": None}, "`edge_index` is None"),
            ({"edge_index": EDGES.T}, r"`edge_index` has shape \(8, 2\), expected \(2, edges\)"),
            ({"edge_index": EDGES + 2}, "`edge_index` has indices from 2 to 6, expected 0 to 5"),
            ({"edge_index": EDGES - 1}, "`edge_index` has indices from -1 to 3"),
            ({"edge_weight": WEIGHTS[:3]}, r"`edge_weight` has shape \(3,\), expected \(8,\)"),
            ({"edge_weight": -WEIGHTS}, "`edge_weight` has values from -5 .*at least 0"),
            ({"edge_weight": WEIGHTS * float("nan")}, "`edge_weight` has values from nan"),
            ({"edge_weight": WEIGHTS / 0}, "`edge_weight` has values from inf .*finite"),
        ],
    )
    def test_bad_batches(self, change: dict[str, Tensor | None], message: str) -> None:
        good = {"x": readings(1), "edge_index": EDGES, "edge_weight": WEIGHTS}
        good["u"] = shared_covariates(1)
        with pytest.raises(ValueError, match=message):
            self.build()(**(good | change))

    def test_covariates_nobody_asked_for(self) -> None:
        with pytest.raises(ValueError, match=r"`u` has shape .*expected None.*`exog_size=0`"):
            self.build(exog_size=0)(readings(), EDGES, u=shared_covariates())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"exog_size": -1}, "`exog_size` is -1, expected an integer of at least 0"),
            ({"output_size": 0}, "`output_size` is 0, expected an integer of at least 1"),
            ({"dropout": "a lot"}, "`dropout` is 'a lot', expected a number"),
            ({"dropout": 1.0}, r"`dropout` is 1.0, expected a number in \[0, 1\)"),
            ({"emb_dropout": -0.1}, "`emb_dropout` is -0.1"),
            ({"output_size": 2}, "`output_size` is 2 and `input_size` is 1.*`residual=False`"),
        ],
    )
    @pytest.mark.usefixtures("as_shipped")
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.build(**options)


class TestGraphMixer(Contract):
    """The student."""

    kind = GraphMixer
    options: dict[str, Any] = {}  # noqa: RUF012
    may_be_zero = ("exog_size", "emb_size", "hops")
    tapped_axes = 3

    def test_hops_is_how_far_a_forecast_looks(self) -> None:
        # On the path 0 -> 1 -> ... -> 5, node 5 sees the nodes up to `hops` behind it.
        path = torch.stack([torch.arange(NODES - 1), torch.arange(1, NODES)])
        for hops in range(4):
            x = readings().requires_grad_()
            out = self.build(hops=hops, exog_size=0)(x, path)
            (gradient,) = torch.autograd.grad(out[:, :, -1].sum(), x)
            seen = gradient.abs().sum((0, 1, 3)) > 0
            assert seen.tolist() == [i >= NODES - 1 - hops for i in range(NODES)]

    def test_without_hops_no_edges_are_needed(self) -> None:
        model = self.build(hops=0)
        u = shared_covariates()
        torch.testing.assert_close(model(readings(), u=u), model(readings(), EDGES, WEIGHTS, u))

    def test_sizes_from_one_to_a_hundred_thousand(self) -> None:
        build = partial(GraphMixer, window=12, horizon=12, n_nodes=207, exog_size=2)
        assert n_parameters(build(hidden_size=8, emb_size=0, n_layers=1, hops=0)) < 1_000
        assert n_parameters(build()) < 9_000
        assert n_parameters(build(hidden_size=128, emb_size=16, n_layers=2)) < 100_000

    # torch's exporter uses a class that torch itself deprecates.
    @pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
    @pytest.mark.parametrize("hops", [0, 1])
    def test_onnx(self, tmp_path: Path, hops: int) -> None:
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        model = self.build(hops=hops)
        inputs = {"x": readings(), "u": shared_covariates()}
        free = torch.export.Dim.DYNAMIC
        dynamic: dict[str, Any] = {"x": {0: free}, "u": {0: free}}
        if hops:
            inputs |= {"edge_index": EDGES, "edge_weight": WEIGHTS}
            dynamic |= {"edge_index": {1: free}, "edge_weight": {0: free}}
        file = tmp_path / "student.onnx"
        names = {"dynamic_shapes": dynamic, "output_names": ["forecast"]}
        torch.onnx.export(model, kwargs=inputs, f=file, dynamo=True, verbose=False, **names)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        assert sorted(i.name for i in session.get_inputs()) == sorted(inputs)
        # Another batch size and another graph than at export.
        inputs |= {"x": readings(5, seed=8), "u": shared_covariates(5, seed=9)}
        if hops:
            inputs |= {"edge_index": EDGES[:, :6], "edge_weight": WEIGHTS[:6]}
        (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        np.testing.assert_allclose(got, model(**inputs).detach().numpy(), atol=1e-4)


class TestGraphAlterNet(Contract):
    """The teacher."""

    kind = GraphAlterNet
    options = {"n_heads": 2, "patch_size": 3, "decoder_size": 16, "dropout": 0.0}  # noqa: RUF012
    may_be_zero = ("exog_size", "emb_size")
    tapped_axes = 4

    def test_the_latent_is_the_normalised_sum_of_the_last_blocks_branches(self) -> None:
        model = self.build(n_layers=3)
        assert model.taps["latent"] == "blocks.2"
        _, caught = tapped(model, *self.inputs())
        total = caught["latent_high"] + caught["latent_low"]
        fused = nn.functional.layer_norm(total, total.shape[-1:])
        torch.testing.assert_close(caught["latent"], fused)

    def test_windows_that_are_no_multiple_of_a_patch_repeat_the_first_step(self) -> None:
        x, u = readings(), shared_covariates()
        uneven, even = self.build(), self.build(window=9)
        even.load_state_dict(uneven.state_dict())
        longer = [torch.cat([part[:, :1], part[:, :1], part], 1) for part in (x, u)]
        torch.testing.assert_close(
            uneven(x, EDGES, WEIGHTS, u), even(longer[0], EDGES, WEIGHTS, longer[1])
        )

    def test_attention_reaches_nodes_without_a_path(self) -> None:
        model = self.build()
        x = readings().requires_grad_()
        out = model(x, EDGES[:, :0], None, shared_covariates())
        (gradient,) = torch.autograd.grad(out[:, :, 0].sum(), x)
        assert (gradient.abs().sum((0, 1, 3)) > 0).all()

    def test_attention_keeps_time_steps_apart_over_nodes_and_nodes_apart_over_time(self) -> None:
        branch = AttentionBranch(channels=8, heads=2).eval()
        z = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(0))
        z.requires_grad_()
        nn.init.zeros_(branch.over_time.out.weight)
        (gradient,) = torch.autograd.grad(branch(z)[0, 1, 2].sum(), z)
        assert (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0].unique().tolist() == [1]
        branch = AttentionBranch(channels=8, heads=2).eval()
        nn.init.zeros_(branch.over_nodes.out.weight)
        (gradient,) = torch.autograd.grad(branch(z)[0, 1, 2].sum(), z)
        assert (gradient[0].abs().sum(-1) > 0).nonzero()[:, 1].unique().tolist() == [2]

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_heads": 3}, "`hidden_size` is 16, expected a multiple of `n_heads=3`"),
            ({"n_heads": 0}, "`n_heads` is 0"),
            ({"patch_size": 0}, "`patch_size` is 0"),
            ({"decoder_size": 0}, "`decoder_size` is 0"),
            ({"hops": 0}, "`hops` is 0, expected an integer of at least 1"),
        ],
    )
    def test_bad_options_of_its_own(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.build(**options)


class TestBlocks:
    """What both models share."""

    @pytest.mark.parametrize("form", FORMS)
    def test_propagation_is_the_weighted_mean_over_incoming_edges(
        self, monkeypatch: pytest.MonkeyPatch, form: str
    ) -> None:
        propagate_by(form, monkeypatch)
        x = torch.arange(NODES, dtype=torch.float64)[:, None] + 1
        expected = torch.zeros(NODES, 1, dtype=torch.float64)
        for node in range(NODES):
            into = (EDGES[1] == node) & (EDGES[0] != node)
            if into.any():
                w = WEIGHTS[into].double()
                expected[node] = (w[:, None] * x[EDGES[0][into]]).sum() / w.sum()
        step = Propagation.over(EDGES, WEIGHTS, NODES, dtype=torch.float64)
        torch.testing.assert_close(step(x), expected)
        stacked = torch.stack([x, 2 * x])[:, None]
        torch.testing.assert_close(step(stacked), torch.stack([expected, 2 * expected])[:, None])
        kinds = {"dense": torch.strided, "sparse": torch.sparse_coo, "messages": None}
        assert (step.matrix if step.matrix is None else step.matrix.layout) == kinds[form]

    @pytest.mark.parametrize("form", FORMS)
    def test_gradcheck(self, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
        propagate_by(form, monkeypatch)
        x = readings(1).double()[0].requires_grad_()
        weight = WEIGHTS.double().requires_grad_()

        def propagated(x: Tensor, weight: Tensor) -> Tensor:
            return Propagation.over(EDGES, weight, NODES, dtype=torch.float64)(x)

        assert torch.autograd.gradcheck(propagated, (x, weight))

    def test_large_graphs_cost_memory_linear_in_edges(self) -> None:
        nodes = 200_000  # a dense adjacency matrix would take 149 GiB
        ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
        x = torch.randn(nodes, 2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Propagation.over(ring, None, nodes)(x), x.roll(1, 0))

    def test_few_edges_among_many_nodes_make_a_sparse_matrix(self) -> None:
        nodes = 300
        ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
        x = readings(2).new_zeros(2, nodes, 3).normal_()
        sparse = Propagation.over(ring, None, nodes)
        full = Propagation.over(torch.ones(nodes, nodes).nonzero().T, None, nodes)
        assert (sparse.matrix.is_sparse, full.matrix.is_sparse) == (True, False)
        torch.testing.assert_close(sparse(x), x.roll(1, 1))
        torch.testing.assert_close(full(x), (x.sum(1, keepdim=True) - x) / (nodes - 1))

    def test_embeddings_are_dropped_whole_and_only_in_training(self) -> None:
        embedding = NodeEmbedding(2000, 3, dropout=0.25)
        assert torch.equal(embedding.eval()(), embedding.weight)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dropped = embedding.train()()
        gone = (dropped == 0).all(1)
        assert 0.2 < gone.float().mean() < 0.3
        torch.testing.assert_close(dropped[~gone], embedding.weight[~gone] / 0.75)
