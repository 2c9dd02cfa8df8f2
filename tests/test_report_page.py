"""A study's HTML page: whole without network or script; a browser shows it without complaint."""

import base64
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from sdkd_plugin import Bands, GraphTransform, GridTransform
from sdkd_plugin.report.page import Section, html_page
from sdkd_plugin.study import Arm, Result, Samples, Task, standard_arms, study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Page(HTMLParser):
    """The elements of a page, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def run(domain: torch.nn.Module, x: torch.Tensor, make, **options: object) -> Result:
    samples = Samples(x, 0.5 * x)
    parts = {"train": samples, "validation": samples, "test": samples}
    task = Task(**parts, transform=domain, bands=Bands.split(0.5), name="<b>task</b>", **options)
    arms = [*standard_arms(labels=0.5), Arm("adaptive", weighting="adaptive", labels=0.5)]
    sizes = {"seeds": 2, "steps": 6, "validations": 3, "batch_size": 3}
    return study(task, student=make, teacher=[make(), make()], arms=arms, **sizes)


@pytest.fixture(scope="module")
def on_a_plane() -> Result:
    x = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return run(GridTransform((8, 8)), x, partial(nn.Conv2d, 2, 2, 3, padding=1))


@pytest.fixture(scope="module")
def on_a_graph() -> Result:
    x = torch.randn(6, 3, 5, 1, generator=torch.Generator().manual_seed(0))
    ring = torch.stack([torch.arange(5), (torch.arange(5) + 1) % 5])
    transform = GraphTransform.from_edges(ring, None, 5)
    seen = torch.ones(6, 3, 5, 1, dtype=torch.bool)
    seen[:, :, 4] = False
    result = run(transform, x, partial(nn.Linear, 1, 1), positions=torch.rand(5, 2))
    test = Samples(x, torch.where(seen, x, torch.nan), seen)
    object.__setattr__(result.task, "test", test)
    return result


@pytest.mark.parametrize("name", ["on_a_plane", "on_a_graph"])
def test_a_page_is_whole(name, request):
    result = request.getfixturevalue(name)
    text = result.page()
    page = Page(text)
    assert page.open == []
    assert len(page.all("table")) == 2
    pictures = page.all("img")
    figures = result.figures()
    assert len(pictures) == len(figures) == 6
    assert all(len(picture["alt"]) > 40 for picture in pictures)
    for picture in pictures:
        kind, data = picture["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"</svg>" in base64.b64decode(data)
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.elements}
    assert "http" not in "".join(text.split("base64,")[::2]).replace("http-equiv", "")
    cells = {cell for cell in page.texts if cell}
    assert {arm.name for arm in result.arms} | {"teacher 1", "persistence"} - {
        "persistence"
    } < cells
    mse = result.rows[result.rows.model == "student alone"].mse
    assert any(cell.startswith(f"{mse.mean():.4f}"[:5]) and "±" in cell for cell in cells)


def test_a_picture_of_training_has_the_weights(on_a_plane):
    histories = {t.arm.name: t.history(1) for t in on_a_plane.trainings}
    assert all(history["step"] == [2, 4, 6] for history in histories.values())
    assert set(histories["student alone"]) == {"step", "validation error"}
    assert histories["plain-MSE distillation"]["weight_1"] == [1.0] * 3
    assert histories["adaptive"]["teacher_weight_1"] == [0.5] * 3
    assert len(set(histories["adaptive"]["weight_1"])) == 3
    for training in on_a_plane.trainings:
        kept = training.row(1)["validation"]
        assert min(training.history(1)["validation error"]) == kept
    titles = [axis.get_title(loc="left") for axis in on_a_plane.figures()["training"].axes]
    bands, teachers = ([f"weight of {each} {i}" for i in (0, 1)] for each in ("band", "teacher"))
    assert titles == ["validation error", *bands, *teachers]


def test_errors_by_step_are_those_of_the_frames(on_a_plane):
    task, (model, *_) = on_a_plane.task, on_a_plane.models("student alone")
    drawn = on_a_plane.figures()["steps"].axes[0]
    line = dict(zip(drawn.get_legend_handles_labels()[1], drawn.lines, strict=True))[
        "student alone"
    ]
    truth, forecast = task.physical(task.test.y), task.physical(task.forecast(model, task.test))
    norms = [x.flatten(2).norm(dim=2) for x in (forecast - truth, truth)]
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == pytest.approx((norms[0] / norms[1]).mean(0).tolist())


def test_sensors_without_readings_have_no_error(on_a_graph):
    figures = on_a_graph.figures()
    points = figures["sensors"].axes[0].collections[0]
    assert points.get_offsets().tolist() == pytest.approx(on_a_graph.task.positions.numpy())
    assert points.get_array()[4] == 0
    assert (points.get_array()[:4] > 0).all()
    assert "truth" not in figures["spectra"].axes[0].get_legend_handles_labels()[1]  # it has gaps


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("name", ["on_a_plane", "on_a_graph", "a_broken_page"])
def test_a_browser_shows_the_page(name, request, tmp_path):
    page = tmp_path / "report.html"
    if name == "a_broken_page":  # the test sees what a browser complains of
        page.write_text(html_page("Broken", [Section("None")]) + "<script>boom()</script>")
    else:
        page.write_text(request.getfixturevalue(name).page())
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [str(CHROMIUM), *options, f"--screenshot={shot}", "--window-size=900,2500", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if name == "a_broken_page":
        assert any("Content Security Policy" in line for line in complaints)
        return
    assert not complaints
    assert Path(shot).stat().st_size > 40_000  # an empty page has some 12 thousand bytes
