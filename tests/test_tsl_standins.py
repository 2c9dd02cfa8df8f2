"""The stand-ins for torch_scatter and torch_sparse: against loops, in TorchScript, in place."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import scipy.sparse
import torch
from torch import Tensor

from sdkd_plugin.adapters.tsl import STANDINS, _torch_scatter
from sdkd_plugin.adapters.tsl._host import install_standins

from tsl.nn.functional import sparse_softmax  # isort: skip  # after the adapter
from tsl.ops.connectivity import parse_connectivity  # isort: skip

ROOT = Path(__file__).parents[1]
REDUCTIONS = {"sum": torch.sum, "mean": torch.mean, "min": torch.amin, "max": torch.amax}
standins_only = pytest.mark.skipif(len(STANDINS) < 2, reason="a real package is built here")


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def reduced(x: Tensor, index: Tensor, dim: int, size: int, reduce: str) -> Tensor:
    """The entries of each group, picked out and reduced by PyTorch; 0 where there are none."""
    groups = []
    for i in range(size):
        group = x.index_select(dim, (index == i).nonzero()[:, 0])
        empty = group.shape[dim] == 0
        groups.append(group.sum(dim) if empty else REDUCTIONS[reduce](group, dim))
    return torch.stack(groups, dim)


def assert_same(got: Tensor, expected: Tensor, x: Tensor) -> None:
    """Values and gradients."""
    torch.testing.assert_close(got, expected)
    slopes = [
        torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (got, expected)
    ]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("scripted", [False, True], ids=["python", "torchscript"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_reduced_as_in_a_loop(seed: int, reduce: str, scripted: bool):
    scatter, segment = _torch_scatter.scatter, _torch_scatter.segment_csr
    if scripted:
        scatter, segment = torch.jit.script(scatter), torch.jit.script(segment)
    x = draw(seed, 3, 11, 2)
    index = torch.randint(0, 6, (11,), generator=torch.Generator().manual_seed(seed))
    expected = reduced(x, index, 1, 7, reduce)
    assert_same(scatter(x, index, 1, dim_size=7, reduce=reduce), expected, x)
    expanded = _torch_scatter.broadcast(index, x, -2)
    assert expanded.shape == x.shape
    assert_same(scatter(x, expanded, -2, dim_size=7, reduce=reduce), expected, x)
    grown = scatter(x, index, 1, reduce=reduce)
    assert torch.equal(grown, expected[:, : int(index.max()) + 1])
    runs = torch.tensor([[0, 4, 4, 9, 11]])
    of_run = torch.tensor([0] * 4 + [2] * 5 + [3] * 2)
    assert_same(segment(x, runs, reduce=reduce), reduced(x, of_run, 1, 4, reduce), x)
    back = _torch_scatter.gather_csr(x[:, :4], runs)
    assert torch.equal(back, x[:, of_run])


def test_nothing_is_reduced_to_nothing():
    none = torch.zeros(2, 0), torch.zeros(0, dtype=torch.long)
    assert _torch_scatter.scatter(*none).shape == (2, 0)
    assert torch.equal(_torch_scatter.scatter(*none, dim_size=3, reduce="max"), torch.zeros(2, 3))


@pytest.mark.parametrize("by", ["index", "ptr"])
def test_tsls_softmax_over_edges(by: str):
    x, index = draw(0, 2, 6, 3), torch.tensor([0, 0, 2, 2, 2, 3])
    groups = {
        "index": {"index": index, "num_nodes": 5},
        "ptr": {"ptr": torch.tensor([0, 2, 2, 5, 6])},
    }
    expected = torch.cat([x[:, index == i].softmax(1) for i in (0, 2, 3)], 1)
    got = sparse_softmax(x, **groups[by], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    # All edges of node 0 are masked: no attention, and no NaN in values or gradients.
    mask = (index == 0)[:, None].expand(6, 3)
    masked = sparse_softmax(x.masked_fill(mask, float("-inf")), **groups[by], dim=1)
    assert (masked[:, :2] == 0).all()
    torch.testing.assert_close(masked[:, 2:], expected[:, 2:], rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(masked.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x, i: _torch_scatter.scatter(x, i, reduce="mul"),
            "`reduce` is 'mul', expected sum",
        ),
        (lambda x, i: _torch_scatter.scatter(x, i, out=x), "`out` None; for more install torch_sc"),
        (lambda x, i: _torch_scatter.gather_csr(x, i.expand(2, 2)), "install torch_scatter"),
    ],
)
def test_what_scatter_lacks_is_refused(wrong, message: str):
    with pytest.raises(ValueError, match=message):
        wrong(torch.ones(2), torch.tensor([0, 1]))


@standins_only
def test_what_the_stand_ins_lack_is_named_with_the_package_to_install():
    for name in ("torch_scatter", "torch_sparse"):
        with pytest.raises(AttributeError, match=rf"`{name}.spspmm` .* install {name}\."):
            sys.modules[name].spspmm  # noqa: B018
    with pytest.raises(ImportError, match="needs the package torch_sparse: install it, or give"):
        sys.modules["torch_sparse"].SparseTensor(row=torch.tensor([0]), col=torch.tensor([0]))
    with pytest.raises(ImportError, match="needs the package torch_sparse"):
        parse_connectivity(scipy.sparse.eye(3, format="csr"))


@standins_only
def test_installing_again_changes_nothing():
    before = {name: sys.modules[name] for name in ("torch_scatter", "torch_sparse")}
    assert install_standins() == STANDINS
    assert {name: sys.modules[name] for name in before} == before


def run_python(code: str, *path: Path) -> list[str]:
    """What a fresh interpreter prints, with folders in front of its path and no compiler."""
    paths = [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@standins_only
@pytest.mark.parametrize("first", ["torch_geometric.nn", "sdkd_plugin.adapters.tsl"])
def test_all_of_tsl_is_importable_in_any_order_without_a_compiler(first: str):
    code = f"""
        import {first}, importlib, pkgutil
        from sdkd_plugin.adapters.tsl import experiment
        import tsl, torch_geometric.typing as pyg
        for module in pkgutil.walk_packages(tsl.__path__, "tsl."):
            importlib.import_module(module.name)
        print(pyg.WITH_TORCH_SCATTER, pyg.WITH_TORCH_SPARSE)
    """
    assert run_python(code) == ["False False"]


def test_a_real_package_is_left_alone_and_the_other_supplied(tmp_path: Path):
    # Another package of that name, complete enough for tsl; and one built for another PyTorch.
    package = tmp_path / "torch_scatter"
    package.mkdir()
    functions = Path(_torch_scatter.__file__).read_text()
    (package / "__init__.py").write_text(functions + '\n__version__ = "real"\n')
    (package / "utils.py").write_text("from torch_scatter import broadcast as broadcast\n")
    (tmp_path / "torch_sparse.py").write_text("raise OSError('undefined symbol')\n")
    code = """
        from sdkd_plugin.adapters.tsl import STANDINS
        import torch_scatter, torch_sparse
        print(STANDINS, torch_scatter.__version__, torch_sparse.__name__)
    """
    names = "('torch_sparse',) real sdkd_plugin.adapters.tsl._torch_sparse"
    assert run_python(code, tmp_path) == [names]
