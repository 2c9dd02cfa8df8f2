"""One training: the same steps for every arm, and the weights with the least validation error."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdkd_plugin.data.store import atomic_path
from sdkd_plugin.distiller import SDKDDistiller
from sdkd_plugin.losses.task import masked_error
from sdkd_plugin.report import environment
from sdkd_plugin.study.task import Arm, Task
from sdkd_plugin.teachers import TeacherOutput, accepted_inputs

Make = Callable[[], nn.Module]
Job = tuple[int, int]  # the position of an arm, and a seed


class Recipe(NamedTuple):
    """How every model of a study is trained; see `study`."""

    steps: int
    lr: float
    batch_size: int
    weight_decay: float
    clip: float | None
    validations: int


def made(make: Make, seed: int = 0) -> nn.Module:
    """A model with the first weights of a seed; the random state is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def kept_path(folder: Path, protocol: str, seed: int) -> Path:
    """Where a study keeps a model's weights and, as metadata, its scores."""
    return folder / f"{protocol}-{seed}.safetensors"


@dataclass(frozen=True, eq=False)
class Trainer:
    """All that a process needs to train any job of a study; shared inputs are on the device."""

    task: Task
    arms: Sequence[Arm]
    makers: Sequence[Make]
    teachers: Sequence[nn.Module]
    recipe: Recipe
    device: torch.device
    paths: Mapping[Job, Path]
    outputs: Sequence[TeacherOutput] = ()

    def __call__(self, job: Job) -> None:
        """Train, score and keep one model; a RuntimeError if no validation error is finite."""
        task, arm, seed, start = self.task, self.arms[job[0]], job[1], time.perf_counter()
        with torch.random.fork_rng():
            model = made(self.makers[job[0]], seed).to(self.device)
            torch.manual_seed(seed)
            columns = self._fit(model, arm, seed)
        if math.isinf(columns["validation"]):
            raise RuntimeError(
                f"{task.name}: {arm.name}, seed {seed} diverged, no validation error is finite: "
                "lower `lr`."
            )
        row = task.scores(task.forecast(model, task.test, self.device)) | columns
        row |= {"seconds": time.perf_counter() - start, **environment(self.device)}
        # neuraloperator adds its metadata, no tensor, to the state.
        state = {k: v.contiguous() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        with atomic_path(self.paths[job]) as path:
            save_file(state, path, {"row": json.dumps(row)})

    def _fit(self, model: nn.Module, arm: Arm, seed: int) -> dict[str, float]:
        """Train a model and leave it with its best weights."""
        recipe, task, truth = self.recipe, self.task, self.task.validation
        labelled = task.labelled(arm.labels, seed)
        rows = labelled.nonzero()[:, 0] if arm.alone else torch.arange(len(task.train))
        trained = model if arm.alone else self._distiller(model, arm)
        parameters = list(trained.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        order = _batches(rows, recipe.batch_size, seed)
        complete = task.train.mask is None and bool(labelled[rows].all())
        marks = {i * recipe.steps // recipe.validations for i in range(1, recipe.validations + 1)}
        least, best, taken, candidates = math.inf, model.state_dict(), 0, 0
        while taken < recipe.steps:
            index = next(order)
            trained.train()
            optimizer.zero_grad()
            self._loss(trained, arm, index, None if complete else labelled[index]).backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            scheduler.step()
            taken += 1
            if taken in marks:
                candidates += 1
                forecast = task.forecast(model, truth, self.device)
                error = float(masked_error(forecast, truth.y, truth.mask, task.task_loss))
                if error < least:
                    least, best = error, copy.deepcopy(model.state_dict())
        model.load_state_dict(best)
        return {"validation": least, "steps": taken, "candidates": candidates}

    def _distiller(self, model: nn.Module, arm: Arm) -> SDKDDistiller:
        task = self.task
        (example,) = task.batches(task.train.select(slice(1)), self.device)
        options = {"task_loss": task.task_loss, "example": example, **arm.options}
        # The task has checked the data; a divergence shows in the validation error.
        options = {"check_finite": False, **options}
        teachers = self.teachers[: arm.teachers]
        return SDKDDistiller(teachers, model, task.transform, task.bands, **options).to(self.device)

    def _loss(self, model: nn.Module, arm: Arm, index: Tensor, labelled: Tensor | None) -> Tensor:
        """Of a batch, with the flags of its labelled samples unless all of them are."""
        batch, mask = self.task.train.select(index, self.device), None
        inputs = {**self.task.shared, **batch.inputs}
        if labelled is not None:
            mask = labelled.to(self.device).reshape(-1, *[1] * (batch.y.ndim - 1))
            mask = mask if batch.mask is None else mask & batch.mask
        if not isinstance(model, SDKDDistiller):
            forecast = model(batch.x, **accepted_inputs(model, inputs))
            return masked_error(forecast, batch.y, mask, self.task.task_loss)
        outputs = [o.select(index).to(self.device) for o in self.outputs[: arm.teachers]]
        known = None if arm.options.get("augmentation") else outputs
        return model.step(batch.x, batch.y, mask, outputs=known, **inputs).total


def _batches(indices: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of one size for ever, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    whole = max(1, len(indices) // size)
    while True:
        order = indices[torch.randperm(len(indices), generator=generator)]
        yield from order.split(size)[:whole]
