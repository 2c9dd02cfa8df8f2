"""What the commands do, each a few calls of the library; a dict of plain values comes back."""

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch

from sdkd_plugin._checks import check_choice
from sdkd_plugin._files import atomic_path, check_writable
from sdkd_plugin._plain import plain_text
from sdkd_plugin.cli import settings as described
from sdkd_plugin.data import navier_stokes, rayleigh_benard, simulate_traffic
from sdkd_plugin.export import export_model, quantize_onnx
from sdkd_plugin.model_folder import has_model, save_model
from sdkd_plugin.report import (
    check_folder,
    choose_device,
    format_table,
    parameter_count,
    rollout_curves,
    rollout_scores,
)
from sdkd_plugin.report.figures import accuracy_latency
from sdkd_plugin.report.speed import Form, measure_speed
from sdkd_plugin.rollouts import Unrolled
from sdkd_plugin.study import Arm, Result, Samples, Task, standard_arms, study

Found = dict[str, Any]
STUDENT = "student"
_TRAINING = [
    name
    for name in inspect.signature(study).parameters
    if name not in ("task", "student", "teacher", "arms", "folder", "jobs", "device")
]
_BENCHMARK = ["batch_sizes", "forms", "threads", "seconds"]


def study_run(command: str, source: str, overrides: Sequence[str], resume: bool) -> Found:
    """Train what a study or a distillation lacks, and write what came out."""
    settings = described.read_settings(source, [*overrides, f"command={command}"])
    out = Path(settings["out"])
    check_folder(out)
    record = out / described.FILE
    if record.is_file() and not resume:
        raise ValueError(f"{out} holds a run already: go on with --resume, or name another `out`.")
    result = _result(settings, record)
    student = described.student_of(settings, result.task)
    found: Found = {
        "out": str(out),
        "student": dict(zip(("model", "arguments"), student, strict=True)),
    }
    if command == "distill":
        found["model"] = str(_save(settings, result, student, out / STUDENT))
    else:
        result.write(out)
    said = f"Written to {found.get('model', out)}."
    padding = student[1].get("padding")
    if padding is not None and "padding" not in (settings["student"].get("arguments") or {}):
        said = (
            f"The student has padding={padding}, as the task's grid; student.arguments.padding "
            f"names another.\n{said}"
        )
    return {**found, "rows": _plain(result.rows), "text": f"{result.report()}\n{said}"}


def _result(settings: dict[str, Any], record: Path | None = None) -> Result:
    """The study of settings; what is kept is used again. Writes a ``record`` before it trains."""
    training, distillation = settings["training"], described.distillation_of(settings)
    for option in training:
        check_choice("an option of training", option, _TRAINING)
    device = choose_device(settings["device"])
    task = described.make_task(settings)
    name, arguments = described.student_of(settings, task)
    teachers = described.teachers_of(settings, task)
    if settings["command"] == "distill":
        options = distillation if teachers else {"kd_weight": 0}
        arms = [Arm(STUDENT, **options)]
        training = {"seeds": 1, **training}
    else:
        weighting = distillation.pop("weighting", "fixed")
        arms = standard_arms(task.bands.n_bands, weightings=[weighting], **distillation)
    make = partial(described.made, name, arguments)
    make()  # what is wrong with it is said before anything is written
    if record is not None:
        with atomic_path(record) as path:
            path.write_text(plain_text(settings), encoding="utf-8")
    options = {"jobs": settings["jobs"], "device": device, **training}
    kept = Path(settings["out"]) / "models"
    try:
        return study(task, student=make, teacher=teachers, arms=arms, folder=kept, **options)
    except ValueError:
        if record is not None and not kept.is_dir():  # refused: there is no run to go on with
            record.unlink()
        raise


def _save(
    settings: dict[str, Any], result: Result, student: tuple[str, dict[str, Any]], folder: Path
) -> Path:
    """The first seed's student as a model folder."""
    row = result.rows[result.rows.model == STUDENT].iloc[0]
    scores = {key: float(row[key]) for key in result.task.scores(result.task.test.y)}
    training = {key: settings[key] for key in ("training", "distillation", "teacher")}
    training |= {"seconds": float(row.seconds), "protocol": str(row.protocol)}
    card = described.card_of(
        result.task,
        *student,
        training=training,
        metrics={**scores, "validation": float(row.validation)},
    )
    return save_model(folder, result.models(STUDENT)[0], card)


def _student(settings: dict[str, Any]) -> Any:
    """Where the student of settings is: ``model``, or that of the run."""
    return settings["model"] or str(Path(settings["out"], STUDENT))


def evaluate(source: str, overrides: Sequence[str], steps: int | None = None) -> Found:
    """Scores of baselines, teachers and the student on the test samples, and of their roll-outs."""
    settings = described.read_settings(source, overrides)
    task = described.make_task(settings)
    far = None if steps is None else described.longer_task(settings, steps)
    rows = [{"model": k, **task.scores(f(task.test))} for k, f in task.baselines.items()]
    rollouts = []
    for each in [*described.listed(settings["teacher"]), _student(settings)]:
        model, name = described.load_any(each, task)
        scores = task.scores(task.forecast(model, task.test))
        rows.append({"model": name, "parameters": parameter_count(model), **scores})
        if far is not None and steps is not None:
            rollouts.append({"model": name, **_rollout(model, far, steps)})
    tables = {"rows": pd.DataFrame(rows), "rollouts": pd.DataFrame(rollouts)}
    text = _markdown(tables["rows"])
    if rollouts:
        text += f"\n\nRoll-outs of {steps} forecasts, each made from the one before:\n\n"
        text += _markdown(tables["rollouts"])
    plain = {name: _plain(table) for name, table in tables.items()}
    return {"task": task.name, "measure": task.measure, **plain, "text": text}


def _rollout(model: torch.nn.Module, task: Task, steps: int) -> dict[str, float]:
    """Scores of a roll-out, in physical units."""
    forecast = task.physical(task.forecast(Unrolled(model, steps), task.test))
    truth = task.physical(task.test.y)
    each, whole = (x.unflatten(1, (steps, -1)) for x in (forecast, truth))
    curve = rollout_curves(each, whole, task.transform, task.bands)["nRMSE"].mean(0)
    scores = rollout_scores(each, whole, task.transform, task.bands)
    return scores | {f"nRMSE_{i}": float(value) for i, value in enumerate(curve, 1)}


def export(source: str, overrides: Sequence[str]) -> Found:
    """A file of the student that runs without this package, and its error against the student."""
    settings = described.read_settings(source, overrides)
    options = {"format": "onnx", "int8": False, **settings["export"]}
    for option in options:
        check_choice("an option of export", option, ["format", "int8"])
    check_choice("export.format", options["format"], ["onnx", "pt2"])
    if options["int8"] and options["format"] != "onnx":
        raise ValueError("export.int8 is true, expected export.format=onnx with it.")
    task, folder = described.make_task(settings), _student(settings)
    model, card = described.saved(folder)
    (x_scale, x_offset), (y_scale, y_offset) = (
        [torch.tensor(card.units[side][part]) for part in ("scale", "offset")]
        for side in ("input", "output")
    )

    def physical(part: Samples) -> list[dict[str, Any]]:
        batches = task.batches(part.select(slice(200)))
        return [{**batch, "x": x_scale * batch["x"] + x_offset} for batch in batches]

    file = Path(settings["out"], f"student.{options['format']}")
    samples = physical(task.train)
    error = export_model(
        model, samples[0], file, x_units=(x_scale, x_offset), y_units=(y_scale, y_offset)
    )
    text = f"{file}: {file.stat().st_size:,} bytes; its forecasts differ from the student's by at "
    found: Found = {"file": str(file), "bytes": file.stat().st_size, "error": error}
    text += f"most {error:.1e} (relative L2). Inputs and forecasts are in physical units."
    if options["int8"]:
        small = file.with_suffix(".int8.onnx")
        int8 = quantize_onnx(file, small, samples, physical(task.validation))
        found |= {"int8_file": str(small), "int8_bytes": int8.bytes_after, "int8_error": int8.error}
        text += f"\n{small}: {int8.bytes_after:,} bytes; differs by {int8.error:.1%} on validation."
    return {**found, "text": text}


def benchmark(source: str, given: Sequence[str], teacher: str | None = None) -> Found:
    """Speed and scores of the teachers and the students, eager and as files."""
    overrides = [each for each in given if "=" in each]
    settings = described.read_settings(source, overrides)
    options = {"forms": ["eager", "onnx", "int8"], **settings["benchmark"]}
    for option in options:
        check_choice("an option of benchmark", option, _BENCHMARK)
    for form in options["forms"]:
        check_choice("benchmark.forms", form, get_args(Form))
    device, out = choose_device(settings["device"]), Path(settings["out"])
    check_folder(out)
    task = described.make_task(settings)
    students = [_student(settings), *(_model_folder(each) for each in given if "=" not in each)]
    teachers = described.listed(teacher or settings["teacher"])
    loaded = (described.load_any(each, task) for each in [*teachers, *students])
    models = {name: model.to(device) for model, name in loaded}

    def inputs(size: int) -> dict[str, Any]:
        rows = torch.arange(size) % len(task.train)
        (batch,) = task.batches(task.train.select(rows), device, size=size)
        return batch

    def scores(run: Any) -> dict[str, float]:
        forecasts = [run(**batch).cpu() for batch in task.batches(task.test, device)]
        return {task.measure: task.scores(torch.cat(forecasts))[task.measure]}

    found = measure_speed(models, inputs, scores=scores, **options)
    points = found.points(task.measure, references=list(models)[: len(teachers)])
    texts = {"md": found.report(task.measure), "csv": found.rows.to_csv(index=False)}
    for suffix, text in texts.items():
        with atomic_path(out / f"benchmark.{suffix}") as path:
            path.write_text(text, encoding="utf-8")
    with atomic_path(out / "benchmark.png") as path:
        accuracy_latency({task.name: points}, task.measure).savefig(path, dpi=120)
    rows = {"rows": _plain(found.rows), "left_out": found.left_out}
    return {"out": str(out), **rows, "text": f"{texts['md']}Written to {out}/benchmark.*"}


def _model_folder(folder: str) -> str:
    """A model's own folder, or that of a run's student."""
    return folder if has_model(folder) else str(Path(folder, STUDENT))


def report(source: str, overrides: Sequence[str]) -> Found:
    """The page, table and pictures of a finished run."""
    settings = described.read_settings(source, overrides)
    if settings["command"] is None:
        raise ValueError(
            f"SETTINGS is {source!r}, expected the folder of a run of sdkd study or sdkd distill."
        )
    result, out = _result(settings), Path(settings["out"])
    result.write(out)
    return {"report": str(out / "report.html"), "text": f"Written: {out / 'report.html'}"}


def simulate(name: str, out: str, overrides: Sequence[str]) -> Found:
    """Simulated data in files."""
    options = described.read_options(overrides)
    target = Path(out)
    if name != "traffic":
        if target.suffix != ".npy":
            raise ValueError(f"OUT is {out!r}, expected a file .npy for trajectories.")
        check_writable(target)
    try:
        if name == "traffic":
            return _traffic_files(target, options)
        solve: Any = {"navier_stokes": navier_stokes, "rayleigh_benard": rayleigh_benard}[name]
        fields = solve(options.pop("n_samples", 100), **options)
    except TypeError as error:
        raise ValueError(f"`{name}` has the options {sorted(options)}: {error}.") from error
    with atomic_path(target) as path:
        np.save(path, fields.numpy())
    shape = list(fields.shape)
    return {"file": out, "shape": shape, "text": f"Trajectories of shape {shape}: {out}"}


def _traffic_files(folder: Path, options: dict[str, Any]) -> Found:
    data = simulate_traffic(**options)
    speed = pd.DataFrame(data.speed.numpy(), columns=list(data.node_ids))
    weights = np.zeros((len(data.node_ids),) * 2, dtype=np.float32)
    weights[tuple(data.edge_index.numpy())] = data.edge_weight.numpy()
    with atomic_path(folder / "simulated_speed.csv") as path:
        speed.to_csv(path, index=False, float_format="%.6g")
    with atomic_path(folder / "simulated_adj.csv") as path:
        pd.DataFrame(weights).to_csv(path, index=False, header=False)
    start = str(data.index[0].date())
    settings = f"task.data={folder} task.start={start} task.missing=nan"
    found = {"folder": str(folder), "start": start, "sensors": len(data.node_ids)}
    return {**found, "steps": len(speed), "text": f"{data.source}: {folder}\nUse it by {settings}"}


def _plain(rows: pd.DataFrame) -> Any:
    return json.loads(rows.to_json(orient="records", double_precision=15))


def _markdown(table: pd.DataFrame) -> str:
    styles = {name: ",.0f" if name == "parameters" else ",.4g" for name in table.columns[1:]}
    columns = {name: (name, style) for name, style in styles.items()}
    return format_table(table, index=["model"], columns=columns)
