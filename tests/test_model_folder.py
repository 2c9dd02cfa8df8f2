"""Model folders: round trips on both hosts, interrupted writes, and a hundred hostile ones."""

import hashlib
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import sdkd_plugin.adapters.neuralop
import sdkd_plugin.adapters.tsl  # noqa: F401 - registers the models
from sdkd_plugin import GraphTransform, GridTransform, model_folder
from sdkd_plugin.model_folder import (
    ModelCard,
    PhysicalUnits,
    describe_transform,
    has_model,
    load_card,
    load_model,
    save_model,
)

GRID = {"in_channels": 2, "out_channels": 3}
GRAPH = {"input_size": 1, "horizon": 3, "exog_size": 0}
FNO = {**GRID, "n_modes": [4, 4], "hidden_channels": 4, "n_layers": 1}
TSL = {**GRAPH, "output_size": 1, "hidden_size": 4}
SENSORS = {**GRAPH, "window": 6, "n_nodes": 4}
CARDS = [
    ModelCard("UNet", {**GRID, "width": 2}),
    ModelCard("ResNet", {**GRID, "width": 4}),
    ModelCard("MLPMixer", {**GRID, "shape": [32, 32]}),
    ModelCard("STAlterNet", {**GRID, "width": 4}),
    ModelCard("SimVP", {"in_channels": 2, "out_channels": 2, "width": 4}),
    ModelCard("GraphMixer", SENSORS),
    ModelCard("GraphAlterNet", SENSORS),
    ModelCard("neuralop.fno", FNO),
    ModelCard("neuralop.tfno", {**FNO, "rank": 0.5}),
    ModelCard("neuralop.sdkd_unet", GRID),
    ModelCard("tsl.sdkd_student", SENSORS),
    ModelCard("tsl.GRUGCNModel", {**TSL, "enc_layers": 1, "gcn_layers": 1}),
    ModelCard("tsl.gwnet", {**TSL, "n_nodes": 4}),
    ModelCard("tsl.TransformerModel", TSL),
]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.model)
def test_a_loaded_model_forecasts_the_same(card, tmp_path):
    model = card.make().eval()
    again, read = load_model(save_model(tmp_path / "model", model, card))
    assert type(again) is type(model)
    assert not again.training
    x = torch.randn(2, 2, 32, 32) if "in_channels" in card.arguments else torch.randn(2, 6, 4, 1)
    graph = {} if x.shape[1] == 2 else {"edge_index": torch.tensor([[0, 1], [1, 2]])}
    inputs = {k: v for k, v in graph.items() if "Transformer" not in card.model}
    assert torch.equal(model(x, **inputs), again(x, **inputs))
    assert replace(read, versions={}) == card


def test_a_card_says_what_physical_values_and_data_are(tmp_path):
    units = {"name": "K", "input": {"scale": 2.0, "offset": 1.0}, "output": {"scale": [3.0]}}
    transform = describe_transform(GridTransform((4, 6), "reflect"))
    assert transform == {
        "class": "GridTransform",
        "shape": [4, 6],
        "axes": [-2, -1],
        "boundary": "reflect",
    }
    ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graph = describe_transform(GraphTransform.from_edges(ring, None, 3))
    assert (graph["class"], graph["shape"], graph["method"]) == ("GraphTransform", [3], "exact")
    card = replace(CARDS[0], units=units, transform=transform, metrics={"mse": 0.1})
    save_model(tmp_path, card.make(), card)
    model, read = load_model(tmp_path)
    assert read == load_card(tmp_path)
    assert read.metrics == {"mse": 0.1}
    x = torch.randn(1, 2, 8, 8)
    expected = 3 * model((x - 1) / 2)
    torch.testing.assert_close(PhysicalUnits(model, read.units)(x), expected)
    with pytest.raises(ValueError, match=r"`units` has the input scale .*, expected no 0"):
        PhysicalUnits(model, {"input": {"scale": [1.0, 0.0]}})


def test_other_data_are_refused(tmp_path, as_shipped):
    card = replace(CARDS[0], data={"ids": ["a", "b"]}, units={"input": {"scale": 1.0}})
    save_model(tmp_path, card.make(), card)
    near = replace(card, units={"input": {"scale": 1.00001}})
    load_model(tmp_path, near)
    load_model(tmp_path, CARDS[0])
    for part, message in (
        ({"data": {"ids": ["a", "c"]}}, r"has data.ids\[1\] 'b', the data 'c': train one"),
        ({"data": {"ids": ["a"]}}, r"has len\(data.ids\) 2, the data 1"),
        ({"units": {"input": {"scale": 1.1}}}, r"has units.input.scale 1.0, the data 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, replace(card, **part))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (partial(ModelCard, 3), "`model` is of type int, expected str"),
        (partial(ModelCard, "UNet", [1]), "`arguments` is of type list, expected Mapping"),
        (partial(ModelCard, "UNet", {"f": nn.ReLU}), r"`arguments`.f is <class .* of which a card"),
        (partial(ModelCard, "UNet", {"x": float("nan")}), r"`arguments`.x is nan"),
        (lambda: ModelCard("UNett").make(), "`model` is 'UNett', expected .* Did you mean 'UNet'"),
        (lambda: ModelCard("UNet", {"width": 2}).make(), "which UNet refuses: .*in_channels"),
        (lambda: ModelCard("UNet", {"wide": 2}).make(), "`an argument of UNet` is 'wide'"),
        (lambda: ModelCard("tsl.os").make(), "`model.name` is 'os', expected one of"),
        (lambda: ModelCard("neuralop.os").make(), "`model` is 'os', expected one of"),
    ],
)
def test_bad_cards(card, message, as_shipped):
    with pytest.raises(ValueError, match=message):
        card()


def test_a_host_that_is_not_imported_is_named(monkeypatch):
    monkeypatch.setattr("sdkd_plugin.models.registry._HOSTS", {})
    with pytest.raises(ValueError, match=r"import sdkd_plugin.adapters.tsl first"):
        ModelCard("tsl.rnn").make()


def test_weights_that_the_card_does_not_make_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="make other weights than the file holds, at "):
        save_model(tmp_path, replace(CARDS[0], arguments={**GRID, "width": 4}).make(), CARDS[0])
    with pytest.raises(ValueError, match="float64"):
        save_model(tmp_path, CARDS[0].make().double(), CARDS[0])
    assert not has_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no card.yaml, expected what `save_model`"):
        load_model(tmp_path)


@pytest.mark.parametrize("at", ["replace", "unlink"])
def test_an_interrupted_save_leaves_the_old_model_or_the_new_one(at, tmp_path, monkeypatch):
    card, other = CARDS[0], ModelCard("UNet", {**GRID, "width": 4})
    save_model(tmp_path, card.make(), card)
    found, real = [], {"replace": os.replace, "unlink": Path.unlink}[at]
    for stop in range(4):
        calls = []

        def killed(*args: Any, calls: list = calls, stop: int = stop, **options: Any) -> Any:
            calls.append(args)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return real(*args, **options)

        monkeypatch.setattr(os if at == "replace" else Path, at, killed)
        with suppress(KeyboardInterrupt):
            save_model(tmp_path, other.make(), other)
        monkeypatch.setattr(os if at == "replace" else Path, at, real)
        found.append(load_model(tmp_path)[1].arguments["width"])
        assert found[-1] in (2, 4)
    assert 4 in found  # the last ones were complete
    save_model(tmp_path, card.make(), card)
    assert len(list(tmp_path.iterdir())) == 2  # nothing is left over


class _Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.folder,))


def signed(folder: Path, **changes: Any) -> None:
    """Change a card and make its checksum right again, as an attacker can."""
    path = folder / model_folder.CARD
    values = {**yaml.safe_load(path.read_text()), **changes}
    values.pop("checksum")
    text = yaml.safe_dump(values)
    path.write_text(f"{text}checksum: {hashlib.sha256(text.encode()).hexdigest()}\n")


def weights_of(folder: Path) -> Path:
    return next(folder.glob("weights-*"))


def replaced(folder: Path, content: bytes) -> None:
    """Other weights, with the right checksum."""
    weights_of(folder).unlink()
    checksum = hashlib.sha256(content).hexdigest()
    (folder / f"weights-{checksum[:16]}.safetensors").write_bytes(content)
    signed(folder, weights=checksum)


def tensors_changed(folder: Path, change: Callable[[dict], Any]) -> None:
    state = load_file(weights_of(folder))
    change(state)
    save_file(state, folder / "new")
    replaced(folder, (folder / "new").read_bytes())


def card_text(folder: Path, text: str | bytes) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (folder / model_folder.CARD).write_bytes(content)


def with_header(folder: Path, size: int, header: bytes) -> None:
    replaced(folder, size.to_bytes(8, "little") + header)


def hostile() -> dict[str, Callable[[Path, Path], Any]]:
    """A hundred ways to spoil the folder of a U-Net; the second path must not come to be."""
    cases: dict[str, Callable[[Path, Path], Any]] = {}
    rng = random.Random(0)  # noqa: S311
    for i in range(20):  # a byte of the card or of the weights is another

        def flip(f: Path, _: Path, i: int = i, place: float = rng.random()) -> None:
            path = weights_of(f) if i % 2 else f / model_folder.CARD
            content = bytearray(path.read_bytes())
            content[int(place * len(content))] ^= 1 << (i % 7)
            path.write_bytes(content)

        cases[f"flipped {i}"] = flip
    for i, share in enumerate((0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.97, 0.99)):

        def cut(f: Path, _: Path, i: int = i, share: float = share) -> None:
            path = f / model_folder.CARD if i % 2 else weights_of(f)
            content = path.read_bytes()
            path.write_bytes(content[: int(share * len(content))])

        def cut_signed(f: Path, _: Path, share: float = share) -> None:
            content = weights_of(f).read_bytes()
            replaced(f, content[: int(share * len(content))])

        cases |= {f"cut {share}": cut, f"cut and signed {share}": cut_signed}
    for protocol in range(6):

        def pickled(f: Path, mark: Path, protocol: int = protocol) -> None:
            replaced(f, pickle.dumps(_Evil(mark), protocol))

        def pickled_card(f: Path, mark: Path, protocol: int = protocol) -> None:
            card_text(f, pickle.dumps(_Evil(mark), protocol))

        cases |= {f"pickle {protocol}": pickled, f"card pickle {protocol}": pickled_card}

    def saved_by_torch(f: Path, mark: Path) -> None:
        torch.save(_Evil(mark), f / "evil.pt")
        replaced(f, (f / "evil.pt").read_bytes())

    cases["renamed torch file"] = saved_by_torch
    tags = ["!!python/object/apply:os.mkdir", "!!python/name:os.system ''", "!evil", "!!binary"]
    for tag in [*tags, "!!python/object/new:os.system", "!!timestamp", "!!set", "!!omap"]:
        value = "'2020-01-01'" if tag == "!!timestamp" else "[x]"
        if "name" in tag:
            value = ""
        cases[f"tag {tag}"] = lambda f, mark, t=tag, v=value: card_text(
            f, f"format: 2\nmodel: {t} {v.replace('x', str(mark))}\n"
        )
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    texts = {
        "laughs": laughs,
        "self": "format: &a [*a]",
        "merge": "a: &a {x: 1}\nb:\n  <<: *a",
        "deep": "format: " + "[" * 100_000,
        "deep flow": "{a: " * 5000,
        "huge": b"#" * (5 << 20),
        "list": "- 1",
        "empty": "",
        "nul": b"\0" * 100,
        "latin": b"format: \xff\xfe\xe9",
        "digits": "format: " + "9" * 100_000,
        "date": "format: 2020-01-01",
        "nan": "format: .nan",
        "two": "format: 2\n---\nformat: 2",
    }
    for name, text in texts.items():
        cases[f"text {name}"] = lambda f, _, t=text: card_text(f, t)
    for name in ("os.system", "builtins.eval", "../UNet", "nn.Linear", "UNet.__init__", "", "tsl.",
                 "tsl.BaseModel", "neuralop.BaseModel", "registry", "__all__"):  # fmt: skip
        cases[f"class {name}"] = lambda f, _, n=name: signed(f, model=n)
    sizes: dict[str, Any] = {
        "wide": {"width": 100_000_000},
        "wide list": {"width": [100_000_000]},
        "deep": {"depth": 10**9},
        "deep enough": {"depth": 900},
        "rather wide": {"width": 1000},
        "negative": {"width": -5},
        "no number": {"width": "os.system('x')"},
        "huge": {"width": 10**40},
        "infinite": {"in_channels": 1e308},
        "unknown": {"_target_": "os.system"},
        "private": {"__class__": "UNet"},
        "nested": {"width": {"__reduce__": ["os.mkdir"]}},
    }
    for name, size in sizes.items():
        cases[f"argument {name}"] = lambda f, _, s=size: signed(
            f, arguments={**GRID, "width": 2, **s}
        )
    # Models of the hosts that take their memory where one cannot see it.
    cases["host fno"] = lambda f, _: signed(
        f, model="neuralop.fno", arguments={**FNO, "hidden_channels": 1000, "n_modes": [1000] * 3}
    )
    cases["host gwnet"] = lambda f, _: signed(
        f, model="tsl.gwnet", arguments={**GRAPH, "n_nodes": 1000, "emb_size": 1000}
    )
    cases["host uqno"] = lambda f, _: signed(
        f, model="neuralop.uqno", arguments={"base_model": "os.system"}
    )
    for name in (
        "../../outside",
        "/etc/passwd",
        "a" * 63,
        "A" * 64,
        "..",
        "0" * 64,
        7,
        None,
        ["x"],
    ):
        cases[f"weights {name}"] = lambda f, _, n=name: signed(f, weights=n)
    headers = {
        "oversized": (1 << 62, b"{}"),
        "large": (90 << 20, b"{" + b" " * (1 << 20)),
        "no json": (8, b"os.mkdir"),
        "list": (2, b"[]"),
        "past the end": (60, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000]}}   '),
        "overflow": (73, b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],'
                         b'"data_offsets":[0,4]}}   '),
        "type": (61, b'{"a":{"dtype":"EVIL","shape":[1],"data_offsets":[0,4]}}      \0\0\0\0'),
        "empty": (2, b"{}"),
    }  # fmt: skip
    for name, (size, header) in headers.items():
        cases[f"header {name}"] = lambda f, _, s=size, h=header: with_header(f, s, h)
    first = "up.0.weight"
    changes: dict[str, Callable[[dict], Any]] = {
        "missing": lambda s: s.pop(next(iter(s))),
        "added": lambda s: s.update({first + "x": torch.zeros(1)}),
        "half": lambda s: s.update({k: v.half() for k, v in s.items()}),
        "flat": lambda s: s.update({k: v.flatten() for k, v in s.items()}),
        "expanded": lambda s: s.update({k: v[None] for k, v in s.items()}),
        "path": lambda s: s.update({"../../" + k: s.pop(k) for k in list(s)}),
        "integers": lambda s: s.update({k: v.long() for k, v in s.items()}),
    }
    for name, change in changes.items():
        cases[f"tensors {name}"] = lambda f, _, c=change: tensors_changed(f, c)
    cases |= {
        "format": lambda f, _: signed(f, format=1),
        "surplus": lambda f, _: signed(f, hook="os.system"),
        "units": lambda f, _: signed(f, units=["x"]),
        "unsigned": lambda f, _: card_text(
            f, (f / model_folder.CARD).read_text().replace("width: 2", "width: 3")
        ),
        "no weights": lambda f, _: weights_of(f).unlink(),
        "folder as weights": lambda f, _: (p := weights_of(f), p.unlink(), p.mkdir()),
        "pipe as weights": lambda f, _: (p := weights_of(f), p.unlink(), os.mkfifo(p)),
    }
    return cases


HOSTILE = hostile()


def test_there_are_a_hundred_hostile_folders():
    assert len(HOSTILE) >= 100


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = replace(CARDS[0], units={"input": {"scale": 1.0}})
    return save_model(tmp_path_factory.mktemp("good"), card.make(), card)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_and_nothing_of_it_runs(name, good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    HOSTILE[name](folder, tmp_path / "mark")
    before, start = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}, time.perf_counter()
    with pytest.raises(ValueError, match=r"\w"):
        load_model(folder)
    assert time.perf_counter() - start < 20
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
