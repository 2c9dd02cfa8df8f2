"""What settings describe: a task, a student, teachers. Names come from lists, nothing is run."""

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from sdkd_plugin import DistillationLoss, SDKDDistiller, study
from sdkd_plugin._checks import check_choice, check_type
from sdkd_plugin._plain import check_archive, check_plain, load_plain, read_yaml, reading
from sdkd_plugin.data import find_traffic, read_csv_pair, read_los_loop, simulate_traffic
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
from sdkd_plugin.spectral import Bands, GraphTransform, GridTransform
from sdkd_plugin.study import Arm, Task

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
_DISTILLATION = sorted(
    {name for kind in (SDKDDistiller, DistillationLoss, Arm) for name in signature(kind).parameters}
    - {"teacher", "student", "transform", "bands", "example", "options", "name", "model", "base"}
)


def read_settings(source: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of a file, of a run's folder, or of the package by name, with the overrides."""
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
    """Options given as key=value, lists as tuples."""
    return _tuples(_merged({}, {}, overrides))


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


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
    options = _tuples(settings["task"])
    make, bands = TASKS[options.pop("name")], options.pop("bands", None)
    try:
        task = make(**options)
    except TypeError as error:
        raise ValueError(f"`task` has {sorted(options)}: {error}.") from error
    return task if bands is None else replace(task, bands=Bands(bands))


def longer_task(settings: Mapping[str, Any], steps: int) -> Task:
    """The task with the truth of several forecasts in a row, for roll-outs."""
    options = settings["task"]
    frames = options.get("frames", signature(TASKS[options["name"]]).parameters["frames"].default)
    longer = {**options, "frames": [frames[0], frames[1] * steps]}
    task = make_task({**settings, "task": longer})
    if task.train.inputs:
        raise ValueError(
            f"`--rollout` is given, but the further inputs {sorted(task.train.inputs)} of "
            f"{task.name} would not move on: expected a task on a grid."
        )
    return task


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
            side: {"scale": _plain(scale), "offset": _plain(offset)}
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


def _plain(value: float | Tensor) -> Any:
    return value.tolist() if isinstance(value, Tensor) else float(value)


def student_of(settings: Mapping[str, Any], task: Task) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the student, with the sizes of the task's data and its boundary."""
    name, arguments = _complete("student", settings["student"], task)
    padding = signature(model_class(name)).parameters.get("padding")
    if padding is not None and isinstance(task.transform, GridTransform):
        boundary = task.transform.boundary
        if boundary != padding.default:
            arguments = {"padding": boundary, **arguments}
    return name, arguments


def made(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A new model; imports the adapter of its host."""
    _import_host(name)
    return make_model(name, arguments)


def _import_host(name: str) -> None:
    host = name.partition(".")[0]
    if host != name and host in ("neuralop", "tsl"):
        importlib.import_module(f"sdkd_plugin.adapters.{host}")


def _complete(part: str, given: Mapping[str, Any], task: Task) -> tuple[str, dict[str, Any]]:
    for option in given:
        check_choice(f"an option of {part}", option, ["model", "arguments", "path"])
    name = given.get("model")
    check_type(f"{part}.model", name, str, "such as UNet")
    _import_host(str(name))
    x, y, u = task.train.x, task.train.y, task.train.inputs.get("u")
    sizes: dict[str, Any] = {"in_channels": x.shape[1], "out_channels": y.shape[1]}
    more: dict[str, Any] = {"shape": list(x.shape[2:])}
    if isinstance(task.transform, GraphTransform):
        sizes = {"window": x.shape[1], "horizon": y.shape[1], "n_nodes": x.shape[2]}
        sizes |= {"input_size": x.shape[3], "output_size": y.shape[3]}
        more = {"exog_size": 0 if u is None else u.shape[-1]}
    taken = signature(model_class(str(name))).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        sizes = {key: value for key, value in {**sizes, **more}.items() if key in taken}
    return str(name), {**sizes, **(given.get("arguments") or {})}


def listed(teacher: Any) -> list[Any]:
    """What settings name as ``teacher``: none, one or a list."""
    return teacher if isinstance(teacher, list) else [] if teacher is None else [teacher]


def teachers_of(settings: Mapping[str, Any], task: Task) -> list[nn.Module]:
    """The trained teachers, none if the settings name none."""
    return [load_any(each, task)[0] for each in listed(settings["teacher"])]


def load_any(given: Any, task: Task) -> tuple[nn.Module, str]:
    """A saved model that reads and forecasts in the task's units, and its name.

    ``given`` is a model folder, or a mapping with the ``path`` of a checkpoint and, as there is no
    card, ``model`` and ``arguments``; its units are taken to be the task's.
    """
    if not isinstance(given, dict):
        if Path(given).is_file():
            raise ValueError(
                f"{given} is a file, expected the folder of a model, or, for a checkpoint of a "
                "host, {path: FILE, model: NAME, arguments: {...}}."
            )
        model, card = saved(given)
        ours = card_of(task, card.model, {})
        try:
            replace(card, data={}).check_fits(replace(ours, data={}))
        except ValueError:  # normalised by other numbers
            model = in_task_units(model, card.units, ours.units)
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


def in_task_units(
    model: nn.Module, own: Mapping[str, Any], task: Mapping[str, Any]
) -> PhysicalUnits:
    """A model with the units of its own card, for data with those of the task's card."""
    inverse = {}
    for side in ("input", "output"):
        scale, offset = (torch.tensor(task[side][part]) for part in ("scale", "offset"))
        inverse[side] = {"scale": 1 / scale, "offset": -offset / scale}
    return PhysicalUnits(PhysicalUnits(model, own), inverse)


class _Nothing:
    """Stands for whatever a checkpoint names that is no tensor."""

    def __init__(self, *args: Any) -> None:
        pass


def checkpoint_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a host's checkpoint by name. What else it names is not looked up or run."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a checkpoint of the teacher.")
    with reading(path, "a checkpoint"):
        check_archive(path)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(_Nothing, name) for name in named]
        with torch.serialization.safe_globals(stand_ins):
            stored = load_plain(path, "cpu")
        stored = stored.get("state_dict", stored)
        weights = {str(k): v for k, v in stored.items() if isinstance(v, Tensor)}
    if not weights:
        raise ValueError(f"{path} holds no weights by name, expected a checkpoint.")
    own = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    return own or weights


def distillation_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a distilled arm."""
    options = dict(settings["distillation"])
    for option in options:
        check_choice("an option of distillation", option, _DISTILLATION)
    pairs: Iterable[Any] = options.pop("latents", ())
    try:
        return options | ({"latents": tuple(LatentPair(**p) for p in pairs)} if pairs else {})
    except TypeError as error:
        raise ValueError(f"distillation.latents: {error}.") from error
