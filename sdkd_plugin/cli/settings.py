"""What settings describe: a task, a student, teachers. Names come from lists, nothing is run."""

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from sdkd_plugin import study
from sdkd_plugin._checks import check_choice, check_type
from sdkd_plugin._plain import UNREADABLE, check_archive, load_plain
from sdkd_plugin.data import find_traffic, read_csv_pair, read_los_loop, simulate_traffic
from sdkd_plugin.data.plain_yaml import check_plain, read_yaml
from sdkd_plugin.data.traffic import Missing
from sdkd_plugin.losses import LatentPair
from sdkd_plugin.model_folder import (
    ModelCard,
    PhysicalUnits,
    describe_transform,
    has_model,
    load_model,
)
from sdkd_plugin.models.registry import make_model, model_class
from sdkd_plugin.spectral import Bands, GraphTransform
from sdkd_plugin.study import Task
from sdkd_plugin.teachers import accepted_inputs

SHIPPED = Path(__file__).parents[1] / "conf/cli"
FILE = "settings.yaml"
_PARTS: dict[str, Any] = {
    "task": {},
    "teacher": None,
    "student": {},
    "training": {},
    "distillation": {},
    "export": {},
    "benchmark": {},
    "model": None,
    "out": None,
    "jobs": 1,
    "device": "cpu",
    "command": None,
}


def read_settings(source: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of a file, of a run's folder, or of the package by name, and changes to them.

    Args:
        source: path or name.
        overrides: such as ``training.steps=100``.

    Raises:
        FileNotFoundError, ValueError: if there are none, or something in them is unknown.
    """
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        shipped = sorted(each.stem for each in SHIPPED.glob("*.yaml"))
        path = SHIPPED / f"{source}.yaml"
        if source not in shipped:
            raise FileNotFoundError(
                f"SETTINGS is {source!r}, expected a YAML file, the folder of a run, or one of "
                f"{shipped}."
            )
    given = _merged(_PARTS, read_yaml(path), overrides)
    for name in given:
        check_choice("a setting", name, _PARTS)
    for name, default in _PARTS.items():
        if isinstance(default, dict):
            check_type(f"{name} in the settings", given[name], dict, "names and values")
    check_choice("task.name", given["task"].get("name"), TASKS)
    given["out"] = str(given["out"] or f"runs/{given['task']['name']}")
    return given


def read_options(overrides: Sequence[str]) -> dict[str, Any]:
    """Options given as key=value."""
    return _merged({}, {}, overrides)


def _merged(
    defaults: Mapping[str, Any], given: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    for each in overrides:
        if "=" not in each or each.startswith("="):
            raise ValueError(f"{each!r} is no change of settings, expected key=value.")
    try:
        merged = OmegaConf.merge(dict(defaults), dict(given), OmegaConf.from_dotlist([*overrides]))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"the settings cannot be read: {error}") from error
    return {str(name): check_plain(value, str(name)) for name, value in values.items()}


def traffic(
    data: str | None = None,
    *,
    start: str | None = None,
    missing: Missing = "none",
    freq: str = "5min",
    frames: tuple[int, int] = (12, 12),
    **simulator: Any,
) -> Task:
    """Traffic of a folder, as for `find_traffic`, or simulated with options of its own."""
    if data is None:
        return study.traffic_task(simulate_traffic(**simulator), frames=frames)
    if simulator:
        raise ValueError(f"task has {sorted(simulator)}, which are for simulated traffic: no data.")
    found = find_traffic(data)
    if found.kind == "los_loop":
        return study.traffic_task(read_los_loop(found.folder), frames=frames)
    if found.adjacency is None or start is None:
        raise ValueError(
            f"task.data {data} holds {found.kind}, expected a pair *speed*.csv and *adj*.csv with "
            "task.start, the time of the first row."
        )
    options: Any = {"start": start, "missing": missing, "freq": freq}
    return study.traffic_task(read_csv_pair(found.speed, found.adjacency, **options), frames=frames)


TASKS: dict[str, Callable[..., Task]] = {
    "apebench": study.apebench_task,
    "navier_stokes": study.navier_stokes_task,
    "rayleigh_benard": study.rayleigh_benard_task,
    "traffic": traffic,
    "taxibj": study.taxibj_task,
    "weatherbench": study.weatherbench_task,
}


def make_task(settings: Mapping[str, Any]) -> Task:
    """The task that settings name."""
    options = dict(settings["task"])
    make, bands = TASKS[options.pop("name")], options.pop("bands", None)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        task = make(**options)
    except TypeError as error:
        raise ValueError(f"`task` has {sorted(options)}: {error}.") from error
    return task if bands is None else replace(task, bands=Bands(tuple(bands)))


def card_of(task: Task, model: str, arguments: Mapping[str, Any], **parts: Any) -> ModelCard:
    """The card of a model that fits a task."""
    examples = {"x": task.train.x, "y": task.train.y, **task.train.inputs}
    output = (task.scale, task.offset)
    units = {"input": output, "output": output, **task.units}
    return ModelCard(
        model,
        arguments,
        transform=describe_transform(task.transform),
        units={
            side: {"scale": _listed(scale), "offset": _listed(offset)}
            for side, (scale, offset) in units.items()
        },
        data={
            "task": task.name,
            "source": task.source,
            "fingerprint": task.identity,
            "shapes": {name: list(value.shape[1:]) for name, value in examples.items()},
        },
        **parts,
    )


def _listed(value: float | Tensor) -> Any:
    return value.tolist() if isinstance(value, Tensor) else float(value)


def student_of(settings: Mapping[str, Any], task: Task) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the student, with the sizes of the task's data."""
    return _complete("student", settings["student"], task)


def made(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A new model; imports the adapter of its host."""
    _import_host(name)
    return make_model(name, arguments)


def _import_host(name: str) -> None:
    host = name.partition(".")[0]
    if host != name and host in ("neuralop", "tsl"):
        importlib.import_module(f"sdkd_plugin.adapters.{host}")


def _complete(part: str, given: Mapping[str, Any], task: Task) -> tuple[str, dict[str, Any]]:
    name = given.get("model")
    check_type(f"{part}.model", name, str, "such as UNet")
    for option in given:
        check_choice(f"an option of {part}", option, ["model", "arguments", "path"])
    _import_host(str(name))
    x, y, u = task.train.x, task.train.y, task.train.inputs.get("u")
    sizes = {"in_channels": x.shape[1], "out_channels": y.shape[1]}
    more: dict[str, Any] = {"shape": list(x.shape[2:])}
    if isinstance(task.transform, GraphTransform):
        sizes = {"window": x.shape[1], "horizon": y.shape[1], "n_nodes": x.shape[2]}
        sizes |= {"input_size": x.shape[3], "output_size": y.shape[3]}
        more = {"exog_size": 0 if u is None else u.shape[-1]}
    taken = inspect.signature(model_class(str(name))).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        known = sizes
    else:
        names = {each.name for each in taken}
        known = {key: value for key, value in {**sizes, **more}.items() if key in names}
    return str(name), {**known, **(given.get("arguments") or {})}


def teachers_of(settings: Mapping[str, Any], task: Task) -> list[nn.Module]:
    """The trained teachers, none if the settings name none."""
    given = settings["teacher"]
    several = given if isinstance(given, list) else [] if given is None else [given]
    return [load_any(each, task)[0] for each in several]


def load_any(given: Any, task: Task) -> tuple[nn.Module, str]:
    """A saved model that reads and forecasts in the task's units, and its name.

    Args:
        given: a model folder, or a mapping with the ``path`` of a checkpoint and, as there is no
            card, ``model`` and ``arguments``; its units are taken to be the task's.
        task: whose shapes it must have.
    """
    if not isinstance(given, dict):
        model, card = saved(given)
        ours = card_of(task, card.model, {})
        try:
            replace(card, data={}).check_fits(replace(ours, data={}))
        except ValueError:  # normalised by other numbers
            model = InTaskUnits(model, card.units, ours.units)
        return model, str(given)
    if "path" not in given:
        raise ValueError(f"a teacher has {sorted(given)}, expected path, model and arguments.")
    name, arguments = _complete("teacher", given, task)
    model, weights = made(name, arguments), checkpoint_weights(given["path"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{given['path']} does not hold a {name}: {error}") from error
    return model.eval(), str(given["path"])


def saved(folder: str | os.PathLike[str]) -> tuple[nn.Module, ModelCard]:
    """A model folder's model and card; imports the adapter of its host."""
    if has_model(folder):
        _import_host(str(read_yaml(Path(folder, "card.yaml")).get("model", "")))
    return load_model(folder)


class InTaskUnits(nn.Module):
    """A model of other units, for data that have the task's.

    Args:
        model: of its own normalisation.
        own: units of its card.
        task: units of the task's card.
    """

    def __init__(self, model: nn.Module, own: Mapping[str, Any], task: Mapping[str, Any]) -> None:
        super().__init__()
        self.physical = PhysicalUnits(model, own)
        taps: dict[str, str] = getattr(model, "taps", {})
        self.taps = {name: f"physical.model.{path}" for name, path in taps.items()}
        for name, side in (("x", "input"), ("y", "output")):
            for part in ("scale", "offset"):
                self.register_buffer(f"{name}_{part}", torch.tensor(task[side][part]))

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Forecast in the task's units."""
        number = self.get_buffer
        given = accepted_inputs(self.physical.model, inputs)
        y = self.physical(number("x_scale") * x + number("x_offset"), **given)
        return (y - number("y_offset")) / number("y_scale")


class _Nothing:
    """Stands for whatever a checkpoint names that is no tensor."""

    def __init__(self, *args: Any) -> None:
        pass


def checkpoint_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a host's checkpoint by name. What else it names is not looked up or run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds no weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a checkpoint of the teacher.")
    try:
        check_archive(path)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(_Nothing, name) for name in named]
        with torch.serialization.safe_globals(stand_ins):
            stored = load_plain(path, "cpu")
        stored = stored.get("state_dict", stored)
        weights = {str(k): v for k, v in stored.items() if isinstance(v, Tensor)}
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}).") from error
    if not weights:
        raise ValueError(f"{path} holds no weights by name, expected a checkpoint.")
    own = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    return own or weights


def distillation_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a distilled arm."""
    options = dict(settings["distillation"])
    pairs: Iterable[Any] = options.pop("latents", ())
    try:
        return options | ({"latents": tuple(LatentPair(**p) for p in pairs)} if pairs else {})
    except TypeError as error:
        raise ValueError(f"distillation.latents: {error}.") from error
