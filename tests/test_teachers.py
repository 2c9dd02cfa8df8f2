"""Teachers: any callable model works or is refused with a reason, and its outputs in advance."""

import copy
import functools

import pytest
import torch
from small import (
    BANDS,
    LATENTS,
    X,
    Y,
    batch,
    make,
    make_loss,
    net,
    one_process,  # noqa: F401  # a fixture
    same,
    teacher_net,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sdkd_plugin import DistillationLoss, GridTransform, TeacherOutput, precompute
from sdkd_plugin.rollouts import Unrolled
from sdkd_plugin.teachers import FunctionTeacher, accepted_inputs, named_inputs

# What torch warns of while it scripts, traces and copies.
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore:`torch.jit.{name}` is deprecated" for name in ("script", "trace", "trace_method")),
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
)
NET = teacher_net().eval()


compiled = functools.partial(torch.compile, backend="eager")


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (X,)).module()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, X),
    "exported": exported,
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "nested": lambda model: nn.Sequential(exported(model), nn.Dropout(0.5)),
    "bound method": lambda model: model.forward,
    "partial": lambda model: functools.partial(lambda scale, x: scale * model(x), 1.0),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", WRAPPERS)
def test_any_callable_teaches_as_the_plain_module_does(name: str):
    expected = make(teacher=NET)
    teacher = WRAPPERS[name](copy.deepcopy(NET))
    distiller = make(teacher=teacher)
    for seed in range(2):
        torch.testing.assert_close(
            distiller.step(*batch(seed)).frequency, expected.step(*batch(seed)).frequency
        )
    model = distiller.train().loss.teachers[0]
    if isinstance(teacher, nn.Module):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert same(NET.state_dict().values(), teacher.state_dict().values())
        assert all(p.requires_grad for p in teacher.parameters())
        distiller.double()
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert {p.dtype for p in teacher.parameters()} == {torch.float32}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "name", ["scripted", "compiled", "compiled in place", "DataParallel", "DistributedDataParallel"]
)
def test_a_wrapped_student_trains_as_the_plain_one(name: str):
    plain = make(student=net())
    student = net()
    distiller = make(student=WRAPPERS[name](student))
    for one in (plain, distiller):
        one.step(X, Y).total.backward()
    expected = [p.grad for p in plain.student.parameters()]
    for mine, theirs in zip(distiller.student.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs)
    torch.testing.assert_close(distiller(X), plain(X))


def test_builtins_compiled_functions_and_reparametrised_modules_teach():
    loss = make_loss(teacher=torch.relu)
    torch.testing.assert_close(loss.teacher_outputs(X)[0].forecast, X.relu())
    decorated = make_loss(teacher=torch.compile(lambda x: 2 * x, backend="eager"))
    torch.testing.assert_close(decorated.teacher_outputs(X)[0].forecast, 2 * X)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 1))
    assert torch.equal(make_loss(teacher=normed).teacher_outputs(X)[0].forecast, normed(X))


def test_sparse_adjacencies_may_be_buffers():
    class Sparse(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(2, 3, 1)
            self.register_buffer("adjacency", torch.eye(3).to_sparse())

    terms = make(teacher=Sparse(), student=Sparse()).step(X, Y)
    assert terms.total.isfinite()


@torch.jit.script
def add(x: Tensor, edge_weight: Tensor) -> Tensor:
    return x + edge_weight


class Graph(nn.Module):
    def forward(self, x: Tensor, edge_index: Tensor, *, edge_weight: Tensor) -> Tensor:
        return x + edge_index + edge_weight


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Graph(), ({"edge_index", "edge_weight"}, False)),
        (nn.DataParallel(compiled(Graph())), ({"edge_index", "edge_weight"}, False)),
        (Unrolled(Graph(), 2), ({"edge_index", "edge_weight"}, False)),
        (torch.jit.script(nn.Bilinear(2, 2, 1)), ({"input2"}, False)),
        (FunctionTeacher(add), ({"edge_weight"}, False)),
        (FunctionTeacher(lambda x, edge_index=None: x), ({"edge_index"}, False)),
        (FunctionTeacher(lambda x, **inputs: x), (set(), True)),
        (FunctionTeacher(torch.relu), (set(), False)),
    ],
)
def test_the_inputs_that_a_model_accepts(model: nn.Module, expected: tuple):
    assert named_inputs(model) == expected
    assert accepted_inputs(model, {"other": 1}) == ({"other": 1} if expected[1] else {})


def test_an_exported_teacher_gets_its_further_inputs():
    example = (X, torch.ones(1), torch.ones(1))
    teacher = torch.export.export(Graph(), example[:2], {"edge_weight": example[2]}).module()
    (output,) = make_loss(teacher=teacher).teacher_outputs(
        X, edge_index=example[1], edge_weight=example[2], other=1
    )
    assert torch.equal(output.forecast, X + 1 + 1)


def test_a_teacher_exported_in_training_mode_is_refused():
    message = "`teacher` GraphModule was exported in training mode, expected eval mode: call"
    with pytest.raises(ValueError, match=message):
        make(teacher=exported(teacher_net()))
    with pytest.raises(ValueError, match="was exported in training mode"):
        make(teacher=nn.Sequential(exported(nn.Dropout(0.5)), nn.Conv2d(2, 3, 1)))


def test_a_teacher_that_cannot_be_copied_is_refused():
    teacher = nn.Conv2d(2, 3, 1)
    teacher.generator = (i for i in range(3))
    with pytest.raises(ValueError, match=r"`teacher` Conv2d cannot be copied \(.*generator"):
        make(teacher=teacher)


def assigned(model: nn.Module) -> nn.Module:
    student = net(7, regularised=True)
    student.load_state_dict(model.state_dict(), assign=True)
    return student


@pytest.mark.parametrize(
    "share",
    [
        lambda model: model,
        assigned,
        compiled,
        nn.DataParallel,
        lambda model: nn.Sequential(model, nn.Identity()),
        lambda model: model[0],
    ],
)
def test_a_student_that_shares_weights_with_a_teacher_is_refused(share: object):
    model = teacher_net()
    message = r"`teacher` and `student` share weights, expected .* give one a `copy.deepcopy`"
    with pytest.raises(ValueError, match=message):
        make(teacher=[net(), model], student=share(model))
    with pytest.raises(ValueError, match=message):
        make(teacher=share(model), student=model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "wrap", [torch.jit.script, WRAPPERS["traced"], exported, compiled, nn.DataParallel]
)
def test_taps_that_hooks_cannot_read_are_refused(wrap: object):
    message = r"the tap '0' of a \w+ cannot be read, expected a plain module or DistributedDataPar"
    with pytest.raises(ValueError, match=message):
        make_loss(teacher=wrap(copy.deepcopy(NET)), latents=LATENTS)
    loss = make_loss(latents=LATENTS)
    with pytest.raises(ValueError, match=message):
        loss.fit_latents(wrap(net().eval()), X)


@pytest.mark.usefixtures("one_process")
def test_taps_of_models_that_hooks_can_read():
    expected = make(teacher=NET, latents=LATENTS, example={"x": X}).step(X, Y).features
    parallel = DistributedDataParallel(copy.deepcopy(NET))
    for teacher in (parallel, compiled_in_place(copy.deepcopy(NET))):
        terms = make(teacher=teacher, latents=LATENTS, example={"x": X}).step(X, Y)
        assert terms.features == expected
    for student in (compiled_in_place(net()), DistributedDataParallel(net())):
        distiller = make(teacher=NET, student=student, latents=LATENTS, example={"x": X})
        for _ in range(2):
            assert distiller.step(X, Y).features == expected


class Pair(nn.Conv2d):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_that_returns_several_tensors_is_refused(role: str):
    with pytest.raises(ValueError, match="`Pair` returns a tuple, expected one tensor: give a mo"):
        make(**{role: Pair(2, 3, 1)}).step(X, Y)


def test_precomputed_outputs_equal_live_ones_bit_for_bit_and_in_order():
    graph_free = {"teacher": [NET, net(6, seed=4)], "transform": GridTransform(X.shape[2:])}
    loss = DistillationLoss(**graph_free, bands=BANDS, latents=LATENTS)
    parts = X.split([2, 2, 1])
    outputs = precompute(loss, ({"x": part} for part in parts))
    live = [loss.teacher_outputs(part) for part in parts]
    for i, output in enumerate(outputs):
        assert torch.equal(output.forecast, torch.cat([each[i].forecast for each in live]))
        for tap in ("0", "3"):
            assert torch.equal(output.latents[tap], torch.cat([e[i].latents[tap] for e in live]))
        assert not output.forecast.requires_grad
    rows = torch.tensor([4, 0, 0])
    chosen = outputs[0].select(rows)
    assert torch.equal(chosen.forecast, outputs[0].forecast[rows])
    assert torch.equal(chosen.latents["3"], outputs[0].latents["3"][rows])


def test_precompute_moves_batches_and_outputs(device: torch.device):
    loss = make_loss(teacher=Graph()).to(device)
    numbers = {"edge_index": torch.ones(1).to(device), "edge_weight": torch.ones(1).to(device)}
    (output,) = precompute(loss, [{"x": X.to(device), **numbers}])
    assert torch.equal(output.forecast, X + 1 + 1)
    moved = TeacherOutput(X, {"0": Y}).to(device)
    assert {moved.forecast.device.type, moved.latents["0"].device.type} == {device.type}
    with pytest.raises(ValueError, match="`batches` is empty, expected at least one batch"):
        precompute(loss, [])
