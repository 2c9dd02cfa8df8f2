"""The pictures of the pages, computed: drawn by the build but for the one of the README.

python docs/pictures.py     # draws docs/what_it_does.svg anew: a minute on one core
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from sdkd_plugin import Bands, GraphTransform, GridTransform, SDKDDistiller
from sdkd_plugin.data import navier_stokes
from sdkd_plugin.models import UNet
from sdkd_plugin.spectral.grid import Boundary

README = Path(__file__).with_name("what_it_does.svg")
LOW, HIGH = "#0969da", "#d1660f"
BANDS = Bands.split(0.25)


def draw(folder: Path) -> None:
    """Draw what is not there yet; remove the folder to draw all anew."""
    folder.mkdir(exist_ok=True)
    for picture in (bands_of_a_grid, bands_of_a_graph, responses, boundaries):
        path = folder / f"{picture.__name__}.svg"
        if not path.exists():
            _save(picture(), path)


def bands_of_a_grid() -> Figure:
    """A field of turbulence, and its two bands."""
    field = navier_stokes(
        1, resolution=64, solver_resolution=64, duration=10.0, viscosity=1e-4, cache=False
    )[:, -1:]
    transform = GridTransform((64, 64))
    parts = [transform.filter(field, _mask(band)) for band in (0, 1)]
    figure, axes = _row(3)
    titles = ("a field", "its low band: below 0.25", "its high band: from 0.25")
    for axis, image, title in zip(axes, [field, *parts], titles, strict=True):
        _image(axis, image[0, 0], title)
    return figure


def bands_of_a_graph() -> Figure:
    """Three eigenvectors of a road-like graph."""
    generator = np.random.default_rng(3)
    places = generator.uniform(size=(60, 2))
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    near = np.argsort(distance, axis=1)[:, 1:4]
    source = torch.from_numpy(np.repeat(np.arange(60), 3))
    edges = torch.stack([source, torch.from_numpy(near.ravel())])
    transform = GraphTransform.from_edges(edges, torch.ones(edges.shape[1]), 60)
    figure, axes = _row(3)
    frequencies = transform.basis.frequencies
    for axis, k in zip(axes, (2, 12, 59), strict=True):
        coefficients = torch.zeros(1, 60, 1)
        coefficients[0, k] = 1
        wave = transform.basis.inverse(coefficients)[0, :, 0].float()
        for i, j in edges.T.tolist():
            axis.plot(*places[[i, j]].T, color="0.75", lw=0.8, zorder=1)
        limit = float(wave.abs().max())
        axis.scatter(
            places[:, 0],
            places[:, 1],
            c=wave,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            s=28,
            zorder=2,
        )
        axis.set_title(f"frequency {float(frequencies[k]):.2f}", fontsize=10)
        axis.set_axis_off()
    return figure


def responses() -> Figure:
    """How bands divide the frequencies, and what weights make of them."""
    frequency = torch.linspace(0, 1, 401)
    choices: dict[str, tuple[Bands, list[float]]] = {
        'Bands.split(0.25), "fixed"': (BANDS, [1.0, 2.0]),
        "Bands.split(0.25, transition=0.1)": (Bands.split(0.25, transition=0.1), [1.0, 2.0]),
        "Bands.dyadic(4), numbers": (Bands.dyadic(4), [1.0, 1.5, 2.0, 3.0]),
    }
    figure, axes = _row(3, height=2.2)
    for axis, (title, (bands, weights)) in zip(axes, choices.items(), strict=True):
        shares = bands(frequency)
        response = torch.tensor(weights) @ shares.float()
        axis.plot(frequency, response, color="0.2", lw=2)
        for i, share in enumerate(shares):
            axis.fill_between(frequency, share * weights[i], alpha=0.25)
        axis.set(title=title, xlabel="frequency", ylim=(0, 3.3), xlim=(0, 1))
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("weight")
    return figure


def boundaries() -> Figure:
    """The spectrum of data that do not wrap around, by both transforms."""
    x = torch.linspace(0, 1, 64)
    field = (1.5 * x**2 + 0.3 * torch.cos(3 * torch.pi * x))[None, None]
    figure, axes = _row(2, height=2.4)
    axes[0].plot(torch.cat([x, 1 + x]), field.repeat(1, 1, 2)[0, 0], color=HIGH, label="periodic")
    axes[0].plot(
        torch.cat([x, 1 + x]),
        torch.cat([field, field.flip(-1)], -1)[0, 0],
        color=LOW,
        ls="--",
        label="reflect",
    )
    axes[0].axvspan(1, 2, color="0.93")
    axes[0].set(title="what each takes to lie beyond the edge", xlim=(0, 2), xlabel="place")
    colours: dict[Boundary, str] = {"periodic": HIGH, "reflect": LOW}
    for boundary, colour in colours.items():
        transform = GridTransform((64,), boundary)
        energy = transform(field)[0, 0].abs().square()
        axes[1].semilogy(transform.frequencies, energy, ".", color=colour, label=boundary)
    axes[1].set(title="energy at each frequency", xlabel="frequency", ylim=(1e-9, None))
    for axis in axes:
        axis.legend(fontsize=8)
        axis.title.set_fontsize(10)
    return figure


def what_it_does() -> Figure:
    """A teacher's and a student's forecast, their difference, and its bands, before and after."""
    torch.manual_seed(0)
    trajectories = navier_stokes(
        90, resolution=32, solver_resolution=64, duration=12.0, viscosity=1e-3, cache=False
    )
    trajectories = trajectories / trajectories.std()
    x, y = trajectories[:, :6], trajectories[:, 6:]
    transform, example = GridTransform((32, 32)), x[-1:]
    teacher = UNet(in_channels=6, out_channels=6, width=24)
    _train(teacher, lambda rows: (teacher(x[rows]) - y[rows]).square().mean(), 600)
    student = UNet(in_channels=6, out_channels=6, width=4)
    distiller = SDKDDistiller(teacher, student, transform, BANDS)
    energies = []
    for steps in (40, 400):
        _train(distiller, lambda rows: distiller.step(x[rows]).total, steps)
        with torch.no_grad():
            theirs, mine = teacher.eval()(example), student(example)
        images = [f[0, -1] for f in (theirs, mine, mine - theirs)]
        energies.append(
            transform.sample_band_energy(mine - theirs, Bands.dyadic(5))[0] / y[0].numel()
        )
        if len(energies) == 1:
            shown = images
    figure = Figure(figsize=(10, 2.5), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    titles = ("teacher's forecast", "student's forecast", "difference")
    for axis, image, title in zip(axes, shown, titles, strict=False):
        _image(axis, image, title)
    places = np.arange(5)
    for shift, energy, label, colour in (
        (-0.2, energies[0], "after 40 steps", "0.7"),
        (0.2, energies[1], "after 440", HIGH),
    ):
        axes[3].bar(places + shift, energy, 0.4, label=label, color=colour)
    axes[3].set(yscale="log", title="difference by frequency", xticks=places)
    axes[3].set_xticklabels(["mean ...", "", "", "", "... finest"], fontsize=8)
    axes[3].title.set_fontsize(10)
    axes[3].legend(fontsize=8)
    return figure


def _train(model: nn.Module, loss: Callable[[Tensor], Tensor], steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        value = loss(torch.randint(80, (8,)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def _mask(band: int) -> Callable[[Tensor], Tensor]:
    return lambda frequency: BANDS(frequency)[band].sqrt()


def _row(n: int, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, list(figure.subplots(1, n))


def _image(axis: Axes, field: Tensor, title: str) -> None:
    limit = float(field.abs().max())
    axis.imshow(field, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": "sdkd_plugin"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    _save(what_it_does(), README)
