"""The comparison itself: which trainings are missing, and where they run."""

import multiprocessing
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdkd_plugin._checks import (
    MOST_SEED,
    check_finite,
    check_positive,
    check_positive_int,
    check_sizes,
    shown,
)
from sdkd_plugin._explained import explained
from sdkd_plugin.cache import precompute
from sdkd_plugin.loss import DistillationLoss
from sdkd_plugin.report import environment, milliseconds_a_forecast, parameter_count
from sdkd_plugin.study.result import Result
from sdkd_plugin.study.task import Arm, Task, standard_arms
from sdkd_plugin.study.training import Make, Recipe, Training, made
from sdkd_plugin.teachers import accepted_inputs

Teachers = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
MEAN = "mean of the teachers"


@explained
def study(
    task: Task,
    *,
    student: Make | None = None,
    teacher: Teachers = (),
    arms: Sequence[Arm] | None = None,
    seeds: int | Sequence[int] = 3,
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
    teachers forecast the training inputs once. Where the same student alone is among the arms, with
    the same labels, it is trained first, and in bands where a teacher's validation error is above
    its own the teacher loses weight; see `TeacherTrust`. On a CPU the rows do not depend on
    ``jobs``.

    Args:
        task: the problem.
        student: makes a student with random weights; arms may have their own.
        teacher: trained models, in the order in which arms count them. A teacher is itself trained
            by a study whose arms have ``kd_weight=0``.
        arms: what is compared; by default `standard_arms`.
        seeds: how many, from 0, or which ones.
        steps: of the optimizer.
        lr: learning rate at the start.
        batch_size: samples of a step.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        validations: how often the validation error is computed.
        folder: keeps weights and scores as they come, so that a stopped study goes on where it was.
            Those of other data, models or options stay there and are not used.
        jobs: processes, with one CPU thread each; several need a ``student`` that can be pickled,
            such as a `functools.partial` of a class.
        device: where models are trained.

    Raises:
        ValueError: if a student or a teacher is missing, a number is out of range, a kept model is
            damaged, or something cannot be sent to another process.
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
    if isinstance(student, nn.Module):
        kind = type(student).__name__
        raise ValueError(f"`student` is a {kind}, expected a function that makes one.")
    check_sizes(jobs=jobs, batch_size=batch_size, validations=validations)
    seeds = _numbered(seeds)
    check_positive_int("steps", steps, validations)
    given, device = _named(teacher), torch.device(device)
    place = Path(folder or tempfile.mkdtemp())
    if folder is None:
        weakref.finalize(task, shutil.rmtree, place, ignore_errors=True)
    recipe = Recipe(steps, lr, batch_size, weight_decay, clip, validations)
    shared = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in task.shared.items()}
    there, arms = replace(task, shared=shared), list(arms or standard_arms(task.bands.n_bands))
    _check_names(arms, [*task.baselines, *given, MEAN])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would sum in another order, and share the cores with other jobs
    try:
        loss = _frozen(task, given, arms).to(device) if given else None
        teachers = {} if loss is None else dict(zip(given, loss.teachers, strict=True))
        trainings = []
        for arm in arms:
            if arm.labels and round(arm.labels * (n := len(task.train))) == 0:
                raise ValueError(f"`labels` is {arm.labels} for {arm.name!r}: none of {n} samples.")
            if (make := arm.model or student) is None:
                raise ValueError(f"`student` is None, but {arm.name!r} has no model of its own.")
            used = [] if arm.alone else list(teachers.values())[: arm.teachers]
            if not arm.alone and len(used) < (arm.teachers or 1):
                raise ValueError(
                    f"`teacher` has {len(given)} teachers, expected {arm.teachers or 'at least 1'} "
                    f"for {arm.name!r}: give them, or the arm kd_weight=0."
                )
            trainings.append(Training(there, arm, make, used, recipe, device, place))
        trainings = [_with_reference(each, trainings) for each in trainings]
        rows = _fixed_rows(there, teachers, device)
        alone_first = sorted(range(len(arms)), key=lambda i: trainings[i].reference is not None)
        jobs_of = ((i, seed) for seed in seeds for i in alone_first)
        missing = []
        for i, seed in jobs_of:
            if trainings[i].path(seed).exists():
                trainings[i].kept(seed)  # a damaged one is said before the others are trained
            else:
                missing.append((i, seed))
        if loss is not None and any(not arms[i].alone for i, _ in missing):
            outputs = precompute(loss, there.batches(there.train))
            judged = precompute(loss, there.batches(there.validation))
            trainings = [
                replace(t, outputs=outputs[:n], of_validation=judged[:n])
                for t in trainings
                for n in [len(t.teachers)]
            ]
        trained = _trained(trainings, jobs, missing)
        for _ in tqdm(trained, task.name, len(missing), unit="model", disable=None):
            pass
        for training in trainings:
            cost = _cost(there, made(training.make), device)
            rows += [training.row(seed) | cost for seed in seeds]
    finally:
        torch.set_num_threads(threads)
    table = pd.DataFrame([{"task": task.name, "source": task.source, **row} for row in rows])
    return Result(task, table, trainings, teachers, seeds)


def _numbered(seeds: int | Sequence[int]) -> list[int]:
    if not isinstance(seeds, Sequence):
        check_positive_int("seeds", seeds)
        return list(range(seeds))
    for seed in seeds:
        check_positive_int("seeds", seed, 0, MOST_SEED)
    if len(set(seeds)) < max(len(seeds), 1):
        raise ValueError(f"`seeds` is {shown(seeds)}, expected one or more, each once.")
    return list(seeds)


def _check_names(arms: Sequence[Arm], taken: Sequence[str]) -> None:
    """Rows of one name and setting would be taken for seeds of one model."""
    names = [(arm.setting, arm.name) for arm in arms]
    for setting, name in names:
        if name in taken or names.count((setting, name)) > 1:
            raise ValueError(f"`arms` has {name!r} for {setting}, which is taken: rename one.")


def _named(teacher: Teachers) -> dict[str, nn.Module]:
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


def _with_reference(training: Training, others: Sequence[Training]) -> Training:
    """A distilled arm's training, and that of its student alone if the study has it."""
    arm = training.arm
    if arm.alone or arm.options.get("trust") is False:
        return training
    alone = (
        each
        for each in others
        if each.arm.alone and each.arm.labels == arm.labels and each.make is training.make
    )
    return replace(training, reference=next(alone, None))


def _fixed_rows(
    task: Task, teachers: Mapping[str, nn.Module], device: torch.device
) -> list[dict[str, Any]]:
    """The rows of what is not trained here: baselines, teachers, and the teachers' mean."""
    forecasts = {name: baseline(task.test) for name, baseline in task.baselines.items()}
    taught = {name: task.forecast(model, task.test, device) for name, model in teachers.items()}
    costs = {name: _cost(task, model, device) for name, model in teachers.items()}
    for name, forecast in taught.items():
        check_finite(f"forecast of {name}", forecast)
    if len(taught) > 1:
        costs[MEAN] = dict(pd.DataFrame(costs.values()).sum().astype(float))
        taught[MEAN] = torch.stack(list(taught.values())).mean(0)
    names = {"setting": "-", "seed": 0, **environment(device)}
    return [
        {**names, "model": name, **costs.get(name, {}), **task.scores(forecast)}
        for name, forecast in {**forecasts, **taught}.items()
    ]


def _cost(task: Task, model: nn.Module, device: torch.device) -> dict[str, float]:
    """Parameters, and milliseconds of the forecast of one sample."""
    model = model.to(device).eval()
    (one,) = task.batches(task.test.select(slice(1)), device)
    x, inputs = one.pop("x"), accepted_inputs(model, one)
    time = milliseconds_a_forecast(model, x, inputs=inputs, device=device)
    return {"parameters": float(parameter_count(model)), "milliseconds": time}


def _trained(
    trainings: list[Training], jobs: int, todo: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Train, in whatever order jobs end, here or in several processes."""
    if jobs == 1:
        for i, seed in todo:
            trainings[i].run(seed)
            yield
        return
    taught = [job for job in todo if trainings[job[0]].reference is not None]
    try:
        # As bytes: tensors between processes go through shared memory, which containers limit.
        pickled = pickle.dumps(trainings)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`jobs` is {jobs}, but the study cannot be sent to another process ({error}): give "
            "functions of a module or `functools.partial`s, no lambdas, or jobs=1."
        ) from error
    # Forked processes would inherit torch's threads and a CUDA context, which neither survives.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        try:
            for wave in ([job for job in todo if job not in taught], taught):
                for done in as_completed([pool.submit(_run, pickled, *job) for job in wave]):
                    done.result()
                    yield
        finally:
            pool.shutdown(cancel_futures=True)


def _run(pickled: bytes, i: int, seed: int) -> None:
    pickle.loads(pickled)[i].run(seed)  # noqa: S301 - the parent process made it
