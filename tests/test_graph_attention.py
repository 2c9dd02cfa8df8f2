"""Attention over nodes and time: exact, by landmarks, and which of them a model has."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from test_graph_models import EDGES, Contract, readings, shared_covariates
from torch import Tensor, nn
from torch.nn import functional as F

from sdkd_plugin import Bands, GraphTransform
from sdkd_plugin.adapters.tsl import SDKDTeacher, load_weights
from sdkd_plugin.model_folder import ModelCard, load_model, save_model
from sdkd_plugin.models import GraphAlterNet, graph_alternet
from sdkd_plugin.models.graph_alternet import AxisAttention, landmark_attention
from sdkd_plugin.models.registry import make_to_fit, shapes

SIZES = {"horizon": 3, "window": 6, "n_nodes": 7, "hidden_size": 8, "n_heads": 2}


class TestByLandmarks(Contract):
    """What holds for a teacher with exact attention holds with landmarks."""

    kind = GraphAlterNet
    options = {  # noqa: RUF012
        **{"n_heads": 2, "patch_size": 3, "decoder_size": 16, "dropout": 0.0},
        **{"attention": "landmarks", "n_landmarks": 3},
    }
    may_be_zero = ("exog_size", "emb_size")
    tapped_axes = 4

    def test_attention_reaches_nodes_without_a_path(self) -> None:
        x = readings().requires_grad_()
        out = self.build()(x, EDGES[:, :0], None, shared_covariates())
        (gradient,) = torch.autograd.grad(out[:, :, 0].sum(), x)
        assert (gradient.abs().sum((0, 1, 3)) > 0).all()

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"attention": "linear"}, "`attention` is 'linear', expected one of .*'landmarks'"),
            ({"n_landmarks": 0}, "`n_landmarks` is 0, expected an integer of at least 1"),
        ],
    )
    def test_bad_options_of_its_own(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.build(**options)

    def test_it_keeps_time_steps_and_samples_apart(self) -> None:
        torch.manual_seed(0)
        attend = AxisAttention(channels=8, heads=2, axis="nodes", n_landmarks=3).double()
        z = torch.randn(2, 3, 5, 8, dtype=torch.float64)
        whole = attend(z)
        for sample, step in ((0, 0), (1, 2)):
            part = z[sample : sample + 1, step : step + 1]
            torch.testing.assert_close(attend(part)[0, 0], whole[sample, step])


def operator(q: Tensor, k: Tensor, landmarks: Tensor | None) -> Tensor:
    """The matrix that attention multiplies values by."""
    eye = torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    if landmarks is None:
        return F.scaled_dot_product_attention(q, k, eye)
    return landmark_attention(q, k, eye, landmarks)


@pytest.mark.parametrize("sharpness", [1.0, 4.0], ids=["as made", "sharper"])
def test_attention_is_a_low_pass_filter_in_the_graph_fourier_basis(sharpness: float) -> None:
    # The latent is smooth over the graph, here a ring, plus noise.
    n, generator = 60, torch.Generator().manual_seed(0)
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    transform, bands = GraphTransform.from_edges(ring, None, n), Bands((0.1, 0.5))
    angle = 2 * torch.pi * torch.arange(n)[:, None] / n
    smooth = torch.cat([(k * angle).cos() for k in range(1, 9)] * 2, 1)
    z = 2 * smooth + torch.randn(1, 4, n, 16, generator=generator)
    q, k = (z @ (sharpness * torch.randn(16, 16, generator=generator) / 4) for _ in range(2))
    landmarks = torch.randn(1, 4, 8, 16, generator=generator)
    noise = torch.randn(4, n, 64, generator=generator)
    noise -= noise.mean(1, keepdim=True)
    gains = []
    for weights in (operator(q, k, None), operator(q, k, landmarks)):
        # An average: weights are positive, of sum 1, so that frequency 0 passes unchanged.
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, n))
        fields = (x[:, None] for x in (noise, weights[0] @ noise))
        before, after = (transform.sample_band_energy(x, bands).sum(0) for x in fields)
        gains.append((after / before).flatten())
        assert (gains[-1].diff() < 0).all()  # the higher the frequency, the less passes
    exact, by_landmarks = gains
    assert by_landmarks[-1] < exact[-1] < 1


def test_with_landmarks_time_is_linear_in_the_nodes() -> None:
    q = torch.randn(1, 1, 50_000, 4)  # exact weights would take 9 GiB and minutes
    landmarks = torch.randn(1, 1, 8, 4)
    assert landmark_attention(q, q, q, landmarks).shape == q.shape


@pytest.mark.parametrize(
    ("attention", "n_nodes", "shown"),
    [
        ("auto", 256, "over nodes, exact"),
        ("auto", 257, "over nodes, by 32 landmarks"),
        ("exact", 257, "over nodes, exact"),
        ("landmarks", 256, "over nodes, by 32 landmarks"),
    ],
)
def test_size_or_the_caller_chooses(attention: Any, n_nodes: int, shown: str) -> None:
    for kind in (GraphAlterNet, SDKDTeacher):
        text = repr(kind(**{**SIZES, "n_nodes": n_nodes}, attention=attention))
        assert shown in text
        assert "over time, exact" in text


def forecasts(*models: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 6, 7, 1, generator=torch.Generator().manual_seed(0))
    return [model.eval()(x, torch.tensor([[0, 1], [1, 2]])) for model in models]


def test_folders_and_checkpoints_from_before_there_were_landmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, old_tsl = GraphAlterNet(**SIZES), SDKDTeacher(**SIZES)
    save_model(tmp_path, old, ModelCard("GraphAlterNet", SIZES))
    torch.save(old_tsl.state_dict(), tmp_path / "old.ckpt")
    monkeypatch.setattr(graph_alternet, "EXACT_UP_TO", 6)
    assert "landmarks" in repr(GraphAlterNet(**SIZES))
    again, _ = load_model(tmp_path)
    assert torch.equal(*forecasts(old, again))
    new = SDKDTeacher(**SIZES)
    load_weights(new, tmp_path / "old.ckpt")
    assert torch.equal(*forecasts(old_tsl, new))
    # A file that fits in no way leaves the model as it was, landmarks included.
    other, before = SDKDTeacher(**SIZES), SDKDTeacher(**SIZES)
    before.load_state_dict(other.state_dict())
    torch.save({"network.position": torch.zeros(1)}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt, whose weights are not those"):
        load_weights(other, tmp_path / "bad.ckpt")
    assert torch.equal(*forecasts(before, other))


def test_landmarks_are_kept_wherever_size_would_choose_otherwise(tmp_path: Path) -> None:
    made = GraphAlterNet(**SIZES, attention="landmarks", n_landmarks=5)
    again = GraphAlterNet(**SIZES)
    random = torch.get_rng_state()
    again.load_state_dict(made.state_dict())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(*forecasts(made, again))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*landmarks"):
        GraphAlterNet(**SIZES, attention="exact").load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="other weights than the file holds"):
        make_to_fit("GraphAlterNet", {**SIZES, "attention": "exact"}, shapes(made))
    save_model(tmp_path, made, ModelCard("GraphAlterNet", {**SIZES, "n_landmarks": 5}))
    assert torch.equal(*forecasts(made, load_model(tmp_path)[0]))


class TestAttention:
    """Attention along one axis."""

    @pytest.mark.parametrize(("axis", "dim"), [("time", 1), ("nodes", 2)])
    def test_it_equals_torch_multi_head_attention(
        self, axis: Literal["time", "nodes"], dim: int
    ) -> None:
        ours = AxisAttention(channels=8, heads=2, axis=axis).double()
        theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        theirs.load_state_dict(
            {
                "in_proj_weight": ours.qkv.weight,
                "in_proj_bias": ours.qkv.bias,
                "out_proj.weight": ours.out.weight,
                "out_proj.bias": ours.out.bias,
            }
        )
        z = torch.randn(2, 3, 4, 8, dtype=torch.float64)
        sequences = ours.norm(z).movedim(dim, 2).flatten(0, 1)
        expected, _ = theirs(sequences, sequences, sequences)
        torch.testing.assert_close(ours(z), expected.unflatten(0, (2, -1)).movedim(2, dim))

    @pytest.mark.usefixtures("as_shipped")
    def test_bad_axis(self) -> None:
        with pytest.raises(ValueError, match=r"`axis` is 'node', expected one of.*'nodes'"):
            AxisAttention(channels=8, heads=2, axis="node")  # type: ignore[arg-type]
