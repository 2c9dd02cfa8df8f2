"""How a teacher or a student of the ablation is trained and scored, in one process.

Here lives what a worker does: it prepares a system once, then trains one student after another.
Which ones, and what becomes of their scores, is the affair of `ablation`.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _ablation_data import Problem, Samples, persistence
from _ablation_rows import ROWS, SETTINGS, Row
from _ablation_systems import System, Training
from _record import environment
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdkd_plugin import SDKDDistiller, TeacherAnswer
from sdkd_plugin.augmentation import Mixup
from sdkd_plugin.losses.task import TASK_LOSSES, observed_mean
from sdkd_plugin.report import parameter_count
from sdkd_plugin.taps import TapReader

TEACHER = "teacher"


@dataclass(frozen=True)
class Task:
    """One training, in words that another process understands.

    Attributes:
        name: of the system.
        system: its sizes.
        folder: of the data, where they are read.
        work: a folder for the teachers' weights.
        device: ``cpu`` or ``cuda``.
        setting: of `SETTINGS`; empty for a teacher.
        row: of `ROWS`; or empty.
        seed: of the student's weights, of its batches and, where labels are drawn, of them; the
            index of a teacher.
    """

    name: str
    system: System
    folder: Path | None
    work: Path
    device: str
    setting: str = ""
    row: str = ""
    seed: int = 0

    @property
    def title(self) -> str:
        """For messages."""
        what = f"{self.row}, {self.setting}" if self.row else TEACHER
        return f"{self.name}: {what}, {self.seed}"

    @property
    def protocol(self) -> str:
        """Changes with every number that the task's scores depend on, but for the seed."""
        settings = repr((self.system, ROWS.get(self.row)))
        return hashlib.sha256(settings.encode()).hexdigest()[:12]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells its record from others."""
        return self.name, self.protocol, self.setting, self.seed

    def weights(self, teacher: int) -> Path:
        """Where a teacher's weights lie."""
        return self.work / f"{self.name}_{teacher}.safetensors"


_PROBLEMS: dict[tuple[str, Path | None, str], Problem] = {}
_ANSWERS: dict[Path, tuple[nn.Module, TeacherAnswer]] = {}


def problem_of(task: Task) -> Problem:
    """The task's data, prepared once a process."""
    key = (repr(task.system), task.folder, task.device)
    if key not in _PROBLEMS:
        _PROBLEMS[key] = task.system.data.problem(
            task.folder, task.system.cutoff, torch.device(task.device)
        )
    return _PROBLEMS[key]


def teacher_of(task: Task, index: int) -> tuple[nn.Module, TeacherAnswer]:
    """A trained teacher, and what it says of all training inputs: asked once a process."""
    path = task.weights(index)
    if path not in _ANSWERS:
        problem = problem_of(task)
        teacher = task.system.teachers[index].build(problem, seed=0).eval()
        teacher.load_state_dict(load_file(path))
        with TapReader(teacher, getattr(teacher, "taps", {})) as reader, torch.no_grad():
            forecasts, latents = [], []
            for start in range(0, len(problem.training), 50):
                part = problem.training[start : start + 50]
                forecasts.append(teacher(part.x, **problem.inputs(part)))
                latents.append(reader.read())
        answer = TeacherAnswer(
            torch.cat(forecasts), {tap: torch.cat([x[tap] for x in latents]) for tap in latents[0]}
        )
        _ANSWERS[path] = teacher, answer
    return _ANSWERS[path]


def train_teacher(task: Task) -> list[dict[str, Any]]:
    """Train and keep one teacher; its row, and before the first teacher's that of persistence."""
    problem = problem_of(task)
    start = time.perf_counter()
    teacher = task.system.teachers[task.seed].build(problem, seed=0)
    everything = torch.arange(len(problem.training))
    loss = supervised(problem, teacher)
    fit(task, teacher, list(teacher.parameters()), loss, everything, task.system.teaching)
    save_file(teacher.state_dict(), task.weights(task.seed))
    rows = []
    if task.seed == 0:
        rows.append(record(task, "persistence", persistence(problem.test)))
    name = f"{TEACHER} {task.seed + 1}: {type(teacher).__name__}"
    row = record(task, name, problem.forecast(teacher, problem.test))
    cost = {"parameters": parameter_count(teacher), "seconds": time.perf_counter() - start}
    return [*rows, row | cost]


def train_student(task: Task) -> list[dict[str, Any]]:
    """Train one student and score it."""
    problem, row = problem_of(task), ROWS[task.row]
    teachers = [teacher_of(task, i) for i in range(row.n_teachers)]
    start = time.perf_counter()
    student = task.system.student.build(problem, task.seed)
    labelled = problem.labelled(SETTINGS[task.setting], task.seed)
    if row.kd_weight == 0:
        loss, trained = supervised(problem, student), student
        seen = labelled.nonzero()[:, 0]
    else:
        trained = distiller_of(task, row, student, [teacher for teacher, _ in teachers])
        loss = distilled(problem, trained, [answer for _, answer in teachers], labelled)
        seen = torch.arange(len(problem.training))
    fit(task, student, list(trained.parameters()), loss, seen.cpu(), task.system.learning)
    cost = {"parameters": parameter_count(student), "seconds": time.perf_counter() - start}
    return [record(task, row.name, problem.forecast(student, problem.test)) | cost]


def distiller_of(
    task: Task, row: Row, student: nn.Module, teachers: list[nn.Module]
) -> SDKDDistiller:
    """The distiller that a row describes."""
    problem = problem_of(task)
    first = problem.training[:1]
    mixup = Mixup(torch.Generator().manual_seed(task.seed))
    return SDKDDistiller(
        teachers,
        student,
        copy.deepcopy(problem.transform),
        problem.bands,
        weighting=row.weighting,
        kd_weight=row.kd_weight * task.system.kd_weight,
        task_loss=problem.task,
        aggregation=row.aggregation,
        teacher_bound=row.teacher_bound,
        augmentation=mixup if row.function_matching else None,
        latents=row.latents,
        example={"x": first.x, **problem.inputs(first)},
        check_finite=False,  # the data were checked when they were made; `fit` sees a divergence
    ).to(task.device)


def supervised(problem: Problem, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The loss against the labels of some training samples."""

    def loss(index: Tensor) -> Tensor:
        batch = problem.training[index]
        forecast = model(batch.x, **problem.inputs(batch))
        return observed_mean(TASK_LOSSES[problem.task], forecast, batch.y, batch.mask)

    return loss


def distilled(
    problem: Problem, distiller: SDKDDistiller, answers: list[TeacherAnswer], labelled: Tensor
) -> Callable[[Tensor], Tensor]:
    """The loss of distillation on some training samples."""
    taps = [distiller.teacher_taps(i) for i in range(len(answers))]
    everything_counts = bool(labelled.all()) and problem.training.mask is None

    def counted(index: Tensor, batch: Samples) -> Tensor | None:
        if everything_counts:
            return None
        mask = labelled[index].reshape(-1, *[1] * (batch.y.ndim - 1))
        return mask if batch.mask is None else mask & batch.mask

    def loss(index: Tensor) -> Tensor:
        batch = problem.training[index]
        known = [
            TeacherAnswer(answer.forecast[index], {tap: answer.latents[tap][index] for tap in each})
            for answer, each in zip(answers, taps, strict=True)
        ]
        return distiller.step(
            batch.x,
            batch.y,
            counted(index, batch),
            # What nobody has seen before, nobody has answered.
            answers=None if distiller.augmentation else known,
            **problem.inputs(batch),
        ).total

    return loss


def batches(indices: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of one size for ever, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    whole = max(1, len(indices) // size)
    while True:
        order = indices[torch.randperm(len(indices), generator=generator)]
        yield from order.split(size)[:whole]


def fit(
    task: Task,
    model: nn.Module,
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    indices: Tensor,
    training: Training,
) -> None:
    """Train on some of the training samples; keep the weights with the least validation error.

    Raises:
        RuntimeError: if there is no finite validation error.
    """
    problem = problem_of(task)
    optimizer = torch.optim.Adam(parameters, lr=training.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    order = batches(indices, training.batch_size, task.seed)
    every = max(1, training.steps // training.validations)
    least, best = math.inf, None
    for step in range(1, training.steps + 1):
        model.train()
        optimizer.zero_grad()
        loss(next(order).to(task.device)).backward()
        optimizer.step()
        scheduler.step()
        if step % every == 0 or step == training.steps:
            error = problem.validation_error(model)
            if error < least:
                least, best = error, copy.deepcopy(model.state_dict())
    if best is None:
        raise RuntimeError(f"{task.title}: diverged, there is no finite validation error.")
    model.load_state_dict(best)


def record(task: Task, name: str, forecast: Tensor) -> dict[str, Any]:
    """The columns of a row: what was run, its scores, and on what."""
    problem = problem_of(task)
    return {
        "system": task.name,
        "protocol": task.protocol,
        "setting": task.setting,
        "row": name,
        "seed": task.seed,
        **problem.scores(forecast),
        "source": problem.source,
        **environment(torch.device(task.device)),
    }


def run(task: Task) -> list[dict[str, Any]]:
    """Whatever the task is."""
    return train_student(task) if task.row else train_teacher(task)
