"""The grid models: one contract that each inherits, then what is each one's own."""

import inspect
import re
from functools import partial

import pytest
import torch
from model_contract import BATCH, ModelContract, n_parameters, tapped
from torch import Tensor, nn

from sdkd_plugin.models.blocks import AppendCoordinates, Upsample, group_norm
from sdkd_plugin.models.mlp_mixer import MLPMixer
from sdkd_plugin.models.resnet import ResNet
from sdkd_plugin.models.simvp import SimVP
from sdkd_plugin.models.stalternet import EvolutionBlock, STAlterNet, rotary_angles, rotate
from sdkd_plugin.models.unet import UNet

GRID = (16, 24)
IN, OUT = 4, 6


def fields(batch: int, channels: int = IN, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    """Draw random fields."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *grid, generator=generator)


class GridModelContract(ModelContract):
    """What every grid model owes besides. An implementation gives `halvings` too."""

    sizes = {"in_channels": IN, "out_channels": OUT, "width": 8, "depth": 2}  # noqa: RUF012

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        return (fields(BATCH, seed=seed),)

    @pytest.fixture
    def halvings(self) -> dict[str, int]:
        """Each tap's name, and how often its activation's grid was halved."""
        raise NotImplementedError

    @pytest.mark.parametrize("batch", [1, 3])
    def test_keeps_the_grid_and_maps_the_channels(self, make, batch):
        y = make()(fields(batch))
        assert y.shape == (batch, OUT, *GRID)
        assert bool(torch.isfinite(y).all())

    def test_keyword_only_with_defaults(self, make):
        _, *parameters = inspect.signature(type(make()).__init__).parameters.values()
        assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
        required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
        assert required <= {"in_channels", "out_channels", "shape"}

    def test_taps_catch_what_the_forecast_hangs_on(self, make, halvings):
        model = make()
        y, caught = tapped(model, fields(3))
        assert set(caught) == set(halvings)
        for name, activation in caught.items():
            expected = tuple(n // 2 ** halvings[name] for n in GRID)
            assert (activation.shape[0], *activation.shape[2:]) == (3, *expected), name
            (gradient,) = torch.autograd.grad(y.sum(), activation, retain_graph=True)
            assert gradient.abs().max() > 0, name

    def test_each_padding_is_another_model(self, make):
        forecasts = []
        for padding in ("periodic", "reflect", "zeros"):
            torch.manual_seed(0)
            forecasts.append(make(padding=padding)(fields(2)))
        for i in range(3):
            assert not torch.allclose(forecasts[i], forecasts[i - 1], atol=1e-4)

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize("x", [fields(2, channels=5), fields(1)[0]])
    def test_refuses_fields_of_another_shape(self, make, x):
        message = rf"`x` has shape {re.escape(str(tuple(x.shape)))}, expected \(batch, 4, .*times"
        with pytest.raises(ValueError, match=message):
            make()(x)

    @pytest.mark.usefixtures("as_shipped")
    def test_refuses_unknown_padding(self, make):
        with pytest.raises(ValueError, match=r"`padding` is 'periodical'.*'periodic'\?"):
            make(padding="periodical")


class ConvolutionalContract(GridModelContract):
    """What every grid model that is not bound to one grid owes besides."""

    @pytest.mark.parametrize("grid", [(17, 23), (19, 16), (32, 48)])
    def test_runs_on_other_grids(self, make, grid):
        assert make()(fields(2, grid=grid)).shape == (2, OUT, *grid)

    @pytest.mark.parametrize("padding", ["reflect", "zeros"])
    def test_runs_on_odd_bounded_grids(self, make, padding):
        y = make(padding=padding, coordinates=True)(fields(2, grid=(17, 23)))
        assert y.shape == (2, OUT, 17, 23)

    @pytest.mark.parametrize("padding", ["periodic", "reflect", "zeros"])
    def test_runs_on_the_smallest_grid_it_states(self, make, padding):
        model = make(padding=padding)
        n = model.smallest
        assert model(fields(2, grid=(n, n))).shape == (2, OUT, n, n)
        with pytest.raises(ValueError, match=f"expected at least {n} points an axis; give a finer"):
            model(fields(2, grid=(n - 1, n)))

    def test_periodic_model_commutes_with_shifts(self, make, halvings):
        step = 2 ** max(halvings.values())
        model, x = make(padding="periodic").double(), fields(2).double()
        shifts = (step, -3 * step)
        shifted = model(torch.roll(x, shifts, dims=(2, 3)))
        expected = torch.roll(model(x), shifts, dims=(2, 3))
        torch.testing.assert_close(shifted, expected, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize(
        "options", [{"padding": "zeros"}, {"padding": "reflect"}, {"coordinates": True}]
    )
    def test_other_models_know_where_they_are(self, make, halvings, options):
        step = 2 ** max(halvings.values())
        model, x = make(**options).double(), fields(2).double()
        shifted = model(torch.roll(x, step, dims=2))
        assert not torch.allclose(shifted, torch.roll(model(x), step, dims=2), atol=1e-3)


class TestSTAlterNet(ConvolutionalContract):
    sizes = {**GridModelContract.sizes, "heads": 2, "n_downsampling": 1, "mlp_ratio": 2}  # noqa: RUF012

    @pytest.fixture(params=["parallel", "serial"])
    def make(self, request):
        small = dict(in_channels=IN, out_channels=OUT, width=8, depth=2, heads=2, n_downsampling=1)
        return lambda **options: STAlterNet(**{**small, "order": request.param, **options})

    @pytest.fixture
    def halvings(self):
        return {"latent": 1, "latent_high": 1, "latent_low": 1}

    def test_latent_is_the_normalised_sum_of_its_branches(self, make):
        model = make()
        _, caught = tapped(model, fields(2))
        high, low = caught["latent_high"], caught["latent_low"]
        fused = nn.functional.layer_norm((high + low).movedim(1, -1), (16,)).movedim(-1, 1)
        torch.testing.assert_close(caught["latent"], fused, rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"width": 6}, r"`width \* 2\*\*n_downsampling` is 12.*multiple of"),
            ({"order": "paralel"}, "`order` is 'paralel'.*mean 'parallel'"),
        ],
    )
    def test_refuses_bad_arguments(self, make, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)


class TestSimVP(ConvolutionalContract):
    sizes = {**GridModelContract.sizes, "latent_width": 8, "n_downsampling": 1}  # noqa: RUF012

    @pytest.fixture(params=["inception", "gated"])
    def make(self, request):
        small = dict(
            in_channels=IN, out_channels=OUT, width=4, latent_width=8, depth=2, n_downsampling=1
        )
        return lambda **options: SimVP(**{**small, "translator": request.param, **options})

    @pytest.fixture
    def halvings(self):
        return {"latent": 1}

    def test_latent_has_all_forecast_frames(self, make):
        _, caught = tapped(make(), fields(2))
        assert caught["latent"].shape[1] == OUT * 4

    def test_encoder_sees_one_frame_of_all_its_variables(self, make):
        model, x = make(in_channels=6, in_frames=3, out_channels=8), fields(2, channels=6)
        assert (model.in_frames, model.out_frames) == (3, 4)
        seen = []
        model.encoder.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        assert model(x).shape == (2, 8, *GRID)
        expected = torch.stack([x[b, 2 * t : 2 * t + 2] for b in range(2) for t in range(3)])
        assert torch.equal(seen[0], expected)

    @pytest.mark.parametrize(
        ("n_in", "n_out", "source"),
        [(3, 3, [0, 1, 2]), (4, 2, [2, 3]), (2, 5, [0, 1, 1, 1, 1])],
    )
    def test_forecast_frames_take_their_input_frames_skip(self, make, n_in, n_out, source):
        model = make(in_channels=n_in, out_channels=n_out)
        skips = []
        model.encoder.register_forward_hook(lambda _module, _inputs, out: skips.append(out[1]))
        model.decoder.register_forward_pre_hook(lambda _module, inputs: skips.append(inputs[1]))
        model(fields(2, channels=n_in))
        encoded, taken = (skip.unflatten(0, (2, -1)) for skip in skips)
        assert torch.equal(taken, encoded[:, source])

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"in_frames": 3}, r"`in_channels` is 4.*multiple of 3 \(`in_frames`\)"),
            ({"in_frames": 1}, "`out_channels` is 6.*multiple of 4 .*`out_frames`"),
            ({"out_frames": 5}, r"`out_channels` is 6.*of 5 \(`out_frames`\)"),
            ({"out_frames": 0}, "`out_frames` is 0"),
            ({"in_frames": -2}, "`in_frames` is -2"),
            ({"translator": "gate"}, "`translator` is 'gate'.*mean 'gated'"),
        ],
    )
    def test_refuses_bad_arguments(self, make, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)


class TestUNet(ConvolutionalContract):
    @pytest.fixture
    def make(self):
        return lambda **options: UNet(
            **{"in_channels": IN, "out_channels": OUT, "width": 6, **options}
        )

    @pytest.fixture
    def halvings(self):
        return {"latent": 2}


class TestResNet(ConvolutionalContract):
    @pytest.fixture(params=[True, False], ids=["downsampled", "full"])
    def make(self, request):
        small = dict(in_channels=IN, out_channels=OUT, width=8, depth=2, downsample=request.param)
        return lambda **options: ResNet(**{**small, **options})

    @pytest.fixture
    def halvings(self, make):
        return {"latent": 1 if make().up else 0}


class TestMLPMixer(GridModelContract):
    sizes = {**GridModelContract.sizes, "patch": 4, "mlp_ratio": 4}  # noqa: RUF012

    @pytest.fixture
    def make(self):
        small = dict(in_channels=IN, out_channels=OUT, shape=GRID, width=16, depth=2)
        return lambda **options: MLPMixer(**{**small, **options})

    @pytest.fixture
    def halvings(self):
        return {"latent": 2}

    def test_sees_the_whole_grid(self, make):
        model, x = make().double(), fields(1).double().requires_grad_()
        model(x)[0, 0, 0, 0].backward()
        assert bool((x.grad.abs().amax((0, 1)) > 0).all())

    def test_refuses_another_grid(self, make):
        with pytest.raises(ValueError, match=r"`x` has shape \(24, 16\), expected \(16, 24\)"):
            make()(fields(2, grid=(24, 16)))

    @pytest.mark.usefixtures("as_shipped")
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shape": (16, 18)}, r"`shape\[1\]` is 18, expected a multiple of 4 \(`pat"),
            ({"shape": (0, 16)}, r"`shape\[0\]` is 0"),
            ({"shape": (16,)}, r"`shape` is \(16,\), expected the two sizes"),
        ],
    )
    def test_refuses_bad_arguments(self, make, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_each_order_feeds_attention_its_own_input():
    z = fields(1, channels=16, grid=(4, 6))
    for order in ("parallel", "serial"):
        block = EvolutionBlock(16, heads=2, mlp_ratio=2, order=order, padding="zeros")
        seen = []
        block.attention.register_forward_pre_hook(
            lambda _module, inputs, seen=seen: seen.append(inputs[0])
        )
        block(z)
        assert torch.equal(seen[0], z if order == "parallel" else block.convolution(z))


def test_rotary_logits_depend_on_the_distance_on_the_torus():
    n, width = 6, 8
    like = torch.zeros((), dtype=torch.float64)
    angles = rotary_angles(n, n, width, like, padding="periodic")
    query, key = (fields(1, 1, (1, width), seed=s).double() for s in (0, 1))
    turned_queries = rotate(query.expand(1, 1, n * n, width), angles)
    turned_keys = rotate(key.expand(1, 1, n * n, width), angles)
    logits = (turned_queries @ turned_keys.transpose(2, 3)).reshape(n, n, n, n)
    for shift in [(1, 0), (0, 2), (5, 3)]:
        both = torch.roll(logits, (*shift, *shift), dims=(0, 1, 2, 3))
        torch.testing.assert_close(both, logits, rtol=1e-10, atol=1e-12)
    # Not because they depend on nothing.
    assert logits[0, 0].std() > 0.1


def test_rotary_angles_of_a_coarse_grid_are_among_those_of_a_fine_one():
    like = torch.zeros((), dtype=torch.float64)
    coarse = rotary_angles(4, 6, 8, like, padding="periodic").reshape(4, 6, 4)
    fine = rotary_angles(8, 12, 8, like, padding="periodic").reshape(8, 12, 4)
    torch.testing.assert_close(coarse, fine[::2, ::2])


def test_upsample_with_zeros_is_the_plain_transposed_convolution():
    up = Upsample(3, 2, padding="zeros").double()
    plain = nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1, bias=False).double()
    plain.load_state_dict(up.conv.state_dict())
    x = fields(2, 3, (5, 7)).double()
    expected = nn.functional.gelu(up.norm(plain(x)))
    torch.testing.assert_close(up(x, (10, 14)), expected, rtol=1e-12, atol=1e-12)


def test_coordinates_are_the_lowest_wave_of_each_basis():
    periodic = AppendCoordinates("periodic")(torch.zeros(1, 1, 4, 2))[0, 1:]
    torch.testing.assert_close(periodic[0, :, 0], torch.tensor([1.0, 0.0, -1.0, 0.0]))
    torch.testing.assert_close(periodic[1, :, 1], torch.tensor([0.0, 1.0, 0.0, -1.0]))
    torch.testing.assert_close(periodic[2, 0], torch.tensor([1.0, -1.0]))
    bounded = AppendCoordinates("zeros")(torch.zeros(1, 1, 2, 3))[0, 1:]
    torch.testing.assert_close(bounded[0, :, 0], torch.tensor([0.5**0.5, -(0.5**0.5)]))
    torch.testing.assert_close(bounded[1, 0], torch.tensor([0.75**0.5, 0.0, -(0.75**0.5)]))


@pytest.mark.parametrize("channels", range(4, 65))
def test_groups_never_hold_one_channel(channels):
    groups = group_norm(channels).num_groups
    assert channels // groups >= 4
    assert groups <= 8


@pytest.mark.parametrize(
    ("student", "narrow", "wide"),
    [
        (UNet, 6, 106),
        (ResNet, 14, 238),
        (partial(MLPMixer, shape=(64, 64)), 13, 434),
    ],
)
def test_students_scale_from_20_thousand_to_5_million(student, narrow, wide):
    build = partial(student, in_channels=10, out_channels=10)
    assert n_parameters(build(width=narrow)) <= 20_000
    assert n_parameters(build(width=wide)) >= 5_000_000
    assert 50_000 <= n_parameters(build()) <= 100_000


def test_default_teacher_has_one_to_three_million_parameters():
    assert 1e6 <= n_parameters(STAlterNet(in_channels=10, out_channels=10)) <= 3e6


@pytest.mark.slow
# torch's own exporter, on copying its tree specs.
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning")
@pytest.mark.parametrize(
    "student",
    [
        UNet(in_channels=3, out_channels=2, padding="periodic", coordinates=True),
        UNet(in_channels=3, out_channels=2, padding="reflect"),
        ResNet(in_channels=3, out_channels=2),
        MLPMixer(in_channels=3, out_channels=2, shape=(16, 12)),
    ],
    ids=["unet-periodic", "unet-reflect", "resnet", "mixer"],
)
def test_student_forecasts_the_same_in_onnx(student, tmp_path):
    onnx_runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "student.onnx"
    example = fields(2, channels=3, grid=(16, 12))
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        student.eval(), (example,), dynamo=True, dynamic_shapes={"x": {0: batch}}, verbose=False
    )
    program.save(path)
    session = onnx_runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    for size in (1, 5):
        x = fields(size, channels=3, grid=(16, 12), seed=size)
        (y,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), student(x).detach(), rtol=0, atol=1e-4)
