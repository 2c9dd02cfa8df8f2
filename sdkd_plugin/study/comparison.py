"""The comparison itself: which trainings are missing, and where they run."""

import multiprocessing
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdkd_plugin._checks import check_finite, check_positive, check_positive_int
from sdkd_plugin.data.store import atomic_path
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.report import append_rows, environment, milliseconds_a_forecast, parameter_count
from sdkd_plugin.study.result import Result, weights_path
from sdkd_plugin.study.task import CHUNK, Arm, Task, fingerprint, standard_arms
from sdkd_plugin.study.training import Job, Make, Recipe, Trained, Trainer, made
from sdkd_plugin.teachers import TeacherOutput, accepted_inputs, precompute

KEY = ["protocol", "model", "seed"]
"""Columns that tell rows apart."""
MEAN = "mean of the teachers"


def study(
    task: Task,
    *,
    student: Make | None = None,
    teacher: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module] = (),
    arms: Sequence[Arm] | None = None,
    seeds: int = 3,
    steps: int = 2000,
    lr: float = 1e-3,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    clip: float | None = None,
    validations: int = 20,
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    device: torch.device | str = "cpu",
) -> Result:
    """Train a student for every arm and seed, and compare their errors on the test samples.

    All arms take the same optimisation steps (AdamW, cosine) and have the same number of
    validations; the weights with the least validation error are scored. A seed sets the student's
    first weights, the order of the batches and, if labels are drawn, which samples have them. The
    teachers forecast the training inputs once. On a CPU the rows do not depend on ``jobs``.

    Args:
        task: the problem.
        student: makes a student with random weights; arms may have their own.
        teacher: trained models, in the order in which arms count them. A teacher is itself trained
            by a study whose arms have ``kd_weight=0``.
        arms: what is compared; by default `standard_arms`.
        seeds: how many, from 0.
        steps: of the optimizer.
        lr: learning rate at the start.
        batch_size: samples of a step.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        validations: how often the validation error is computed.
        folder: keeps ``rows.csv`` and the weights as they come, so that a stopped study goes on
            where it was. Rows of other data, models or options stay there and are not used.
        jobs: processes, with one CPU thread each; several need a ``student`` that can be pickled,
            such as a `functools.partial` of a class.
        device: where models are trained.

    Raises:
        ValueError: if a student or a teacher is missing, a number is out of range, or something
            cannot be sent to another process.
        RuntimeError: if a training diverges.

    Example:
        >>> from sdkd_plugin import Bands, GridTransform
        >>> from sdkd_plugin.study import Samples, Task, study
        >>> samples = Samples(torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8))
        >>> domain = {"transform": GridTransform((8, 8)), "bands": Bands.split(0.25)}
        >>> task = Task(train=samples, validation=samples, test=samples, **domain)
        >>> make = lambda: nn.Conv2d(1, 1, 3, padding=1)
        >>> result = study(task, student=make, teacher=make(), seeds=1, steps=2, validations=1)
        >>> list(result.rows.model)
        ['teacher', 'student alone', 'plain-MSE distillation', 'SDKD']
    """
    check_positive("lr", lr)
    counts = {"seeds": seeds, "jobs": jobs, "batch_size": batch_size, "validations": validations}
    for name, value in counts.items():
        check_positive_int(name, value)
    check_positive_int("steps", steps, validations)
    given, device = _named(teacher), torch.device(device)
    arms = tuple(arms or standard_arms(task.bands.n_bands))
    for arm in arms:
        if arm.model is None and student is None:
            raise ValueError(f"`student` is None, but {arm.name!r} has no model of its own.")
        if not arm.alone and len(given) < (arm.teachers or 1):
            raise ValueError(
                f"`teacher` has {len(given)} teachers, expected {arm.teachers or 'at least 1'} for "
                f"{arm.name!r}: give them, or the arm kd_weight=0."
            )
    makers = [make for arm in arms if (make := arm.model or student)]
    place = Path(folder or tempfile.mkdtemp())
    if folder is None:
        weakref.finalize(task, shutil.rmtree, place, ignore_errors=True)
    recipe = Recipe(steps, lr, batch_size, weight_decay, clip, validations)
    shared = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in task.shared.items()}
    with _one_thread():
        loss = _frozen(task, given, arms).to(device) if given else None
        teachers = {} if loss is None else dict(zip(given, loss.teachers, strict=True))
        task_there = replace(task, shared=shared)
        work = Trainer(task_there, arms, makers, list(teachers.values()), recipe, device)
        fixed, protocols = _fixed_rows(work, teachers), _protocols(work)
        done = set(_read(place).index)
        if new := [row for row in fixed if tuple(row[k] for k in KEY) not in done]:
            append_rows(place / "rows.csv", new)
        keys = {(i, s): (protocols[i], a.name, s) for i, a in enumerate(arms) for s in range(seeds)}
        missing = [
            (i, seed)
            for (i, seed), key in sorted(keys.items(), key=lambda item: item[0][::-1])
            if key not in done or not weights_path(place, protocols[i], seed).exists()
        ]
        if missing:
            costs = [_cost(work, made(make)) for make in makers]
            if loss is not None and any(not arms[i].alone for i, _ in missing):
                work = replace(work, outputs=_outputs(work, loss, given))
            bar = tqdm(total=len(missing), desc=task.name, unit="model", disable=None)
            with bar:
                for (i, seed), columns, weights in _trained(work, jobs, missing):
                    row = _names(work, protocols[i], arms[i].setting, arms[i].name, seed)
                    with atomic_path(weights_path(place, protocols[i], seed)) as path:
                        path.write_bytes(weights)
                    append_rows(place / "rows.csv", [row | columns | costs[i]])
                    bar.update()
    order = [tuple(row[k] for k in KEY) for row in fixed] + list(keys.values())
    rows = _read(place).loc[order].reset_index()
    of_protocol = dict(zip(protocols, makers, strict=True))
    return Result(task, rows, arms, of_protocol, teachers, recipe, place)


def _named(
    teacher: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    if isinstance(teacher, Mapping):
        return dict(teacher)
    several = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    return {f"teacher {i}" if len(several) > 1 else "teacher": m for i, m in enumerate(several, 1)}


def _frozen(task: Task, given: Mapping[str, nn.Module], arms: Iterable[Arm]) -> DistillationLoss:
    """Frozen copies of the teachers, with every tap that an arm distils."""
    pairs = {
        (i, pair.teacher): replace(pair, teacher_index=i)
        for arm in arms
        for pair in arm.options.get("latents", ())
        for i in range(arm.teachers or len(given))
        if pair.teacher_index in (None, i)
    }
    return DistillationLoss(list(given.values()), task.transform, latents=list(pairs.values()))


def _outputs(
    work: Trainer, loss: DistillationLoss, names: Iterable[str]
) -> tuple[TeacherOutput, ...]:
    train = work.task.train
    parts = (train.select(slice(i, i + CHUNK)) for i in range(0, len(train), CHUNK))
    outputs = precompute(loss, ({"x": part.x, **work.task.inputs(part)} for part in parts))
    for name, output in zip(names, outputs, strict=True):
        check_finite(f"forecast of {name}", output.forecast)
    return outputs


def _protocols(work: Trainer) -> list[str]:
    """For each arm, a hash of all that its scores depend on but the seed."""
    common = [work.task.identity, work.recipe, work.device]
    teachers = [fingerprint(each) for each in work.teachers]
    return [
        fingerprint(
            [*common, a.labels, a.options, made(make), [] if a.alone else teachers[: a.teachers]]
        )
        for a, make in zip(work.arms, work.makers, strict=True)
    ]


def _names(work: Trainer, protocol: str, setting: str, model: str, seed: int) -> dict[str, Any]:
    """The columns that a row begins with."""
    names = {"task": work.task.name, "source": work.task.source, "protocol": protocol}
    return {**names, "setting": setting, "model": model, "seed": seed}


def _fixed_rows(work: Trainer, teachers: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """The rows of what is not trained here: baselines, teachers, and the teachers' mean."""
    task = work.task
    taught = {name: task.forecast(t, task.test, work.device) for name, t in teachers.items()}
    costs = {name: _cost(work, teacher) for name, teacher in teachers.items()}
    if len(taught) > 1:
        taught[MEAN] = torch.stack(list(taught.values())).mean(0)
        costs[MEAN] = dict(pd.DataFrame(costs.values()).sum().astype(float))
    forecasts = {name: baseline(task.test) for name, baseline in task.baselines.items()} | taught
    return [
        _names(work, fingerprint([task.identity, forecast]), "-", name, 0)
        | task.scores(forecast)
        | environment(work.device)
        | costs.get(name, {})
        for name, forecast in forecasts.items()
    ]


def _cost(work: Trainer, model: nn.Module) -> dict[str, float]:
    """Parameters, and milliseconds of the forecast of one sample."""
    model = model.to(work.device).eval()
    first = work.task.test.select(slice(1), work.device)
    inputs = accepted_inputs(model, work.task.inputs(first))
    time = milliseconds_a_forecast(model, first.x, inputs=inputs, device=work.device)
    return {"parameters": float(parameter_count(model)), "milliseconds": time}


def _read(folder: Path) -> pd.DataFrame:
    """The newest row of each protocol, model and seed."""
    if not (file := folder / "rows.csv").exists():
        return pd.DataFrame(columns=KEY).set_index(KEY)
    # A protocol such as 12345678e123 would be read as a number.
    rows = pd.read_csv(file, dtype={"protocol": str})
    return rows.drop_duplicates(KEY, keep="last").set_index(KEY)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads would sum in another order, and share the cores with other jobs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trained(work: Trainer, jobs: int, todo: Iterable[Job]) -> Iterator[Trained]:
    """Train, in whatever order jobs end, here or in several processes."""
    if jobs == 1:
        yield from map(work, todo)
        return
    try:
        # As bytes: tensors between processes go through shared memory, which containers limit.
        pickled = pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`jobs` is {jobs}, but the study cannot be sent to another process ({error}): give "
            "functions of a module or `functools.partial`s, no lambdas, or jobs=1."
        ) from error
    # Forked processes would inherit torch's threads and a CUDA context, which neither survives.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        try:
            for done in as_completed([pool.submit(_run, pickled, job) for job in todo]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run(pickled: bytes, job: Job) -> Trained:
    work: Trainer = pickle.loads(pickled)  # noqa: S301 - the parent process made it
    return work(job)
