"""One training: the same steps for every arm, and the weights with the least validation error."""

import copy
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdkd_plugin._files import atomic_path, check_writable
from sdkd_plugin.distiller import SDKDDistiller
from sdkd_plugin.judging import judge
from sdkd_plugin.loss import DistillationLoss, DistillationTerms
from sdkd_plugin.losses.task import masked_error
from sdkd_plugin.report import environment
from sdkd_plugin.report.records import fingerprint
from sdkd_plugin.study.task import Arm, Task
from sdkd_plugin.teachers import TeacherOutput, accepted_inputs

Make = Callable[[], nn.Module]
_DELETE = "Delete it, and the model will be trained again."


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


@dataclass(frozen=True, eq=False)
class Training:
    """How the models of an arm are trained, for any seed; shared inputs are on the device.

    ``reference`` is the training of the same student alone, which teachers are judged by.
    """

    task: Task
    arm: Arm
    make: Make
    teachers: Sequence[nn.Module]
    recipe: Recipe
    device: torch.device
    folder: Path
    outputs: Sequence[TeacherOutput] = ()
    of_validation: Sequence[TeacherOutput] = ()
    reference: "Training | None" = None

    @cached_property
    def protocol(self) -> str:
        """A hash of all that scores depend on but the seed."""
        own = [self.arm.labels, self.arm.options, made(self.make), *self.teachers]
        if self.reference is not None:
            own.append(self.reference.protocol)
        return fingerprint([self.task.identity, self.recipe, self.device, *own])

    def path(self, seed: int) -> Path:
        """The file of a trained model: its weights and, as metadata, its row."""
        return self.folder / f"{self.protocol}-{seed}.safetensors"

    def kept(self, seed: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights of a trained model and its metadata; a ValueError if they are damaged."""
        path = self.path(seed)
        try:
            with safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). {_DELETE}") from error
        if metadata.pop("checksum", None) != _checksum(state, metadata):
            raise ValueError(f"{path} has another checksum than when it was written. {_DELETE}")
        return state, metadata

    def row(self, seed: int) -> dict[str, Any]:
        """The row of a trained model."""
        names = {"setting": self.arm.setting, "model": self.arm.name, "seed": seed}
        return {**names, "protocol": self.protocol, **json.loads(self.kept(seed)[1]["row"])}

    def history(self, seed: int) -> dict[str, list[float]]:
        """Step, validation error and the weights of bands and teachers, at each validation."""
        return json.loads(self.kept(seed)[1]["history"])

    def model(self, seed: int) -> nn.Module:
        """A trained model, in eval mode on the CPU."""
        model = made(self.make).eval()
        model.load_state_dict(self.kept(seed)[0])
        return model

    def run(self, seed: int) -> None:
        """Train, score and keep one model; a RuntimeError if no validation error is finite."""
        task, start = self.task, time.perf_counter()
        check_writable(self.path(seed))
        with torch.random.fork_rng():
            model = made(self.make, seed).to(self.device)
            torch.manual_seed(seed)
            columns, history = self._fit(model, seed)
        if math.isinf(columns["validation"]):
            raise RuntimeError(
                f"{task.name}: {self.arm.name}, seed {seed} diverged, no validation error is "
                "finite: lower `lr`."
            )
        row = task.scores(task.forecast(model, task.test, self.device)) | columns
        row |= {"seconds": time.perf_counter() - start, **environment(self.device)}
        # neuraloperator adds its metadata, no tensor, to the state.
        state = {k: v.contiguous() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        metadata = {"row": json.dumps(row), "history": json.dumps(history)}
        with atomic_path(self.path(seed)) as path:
            save_file(state, path, {**metadata, "checksum": _checksum(state, metadata)})

    def _fit(self, model: nn.Module, seed: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Train a model and leave it with its best weights; columns of its row, and its history."""
        recipe, task, arm, truth = self.recipe, self.task, self.arm, self.task.validation
        labelled = task.labelled(arm.labels, seed)
        rows = labelled.nonzero()[:, 0] if arm.alone else torch.arange(len(task.train))
        trained = model if arm.alone else self._distiller(model)
        parameters = list(trained.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        order = _batches(rows, recipe.batch_size, seed)
        complete = task.train.mask is None and bool(labelled[rows].all())
        if isinstance(trained, SDKDDistiller) and self.reference is not None:
            alone = self.reference.model(seed).to(self.device)
            self._judge(trained.loss, task.forecast(alone, truth, self.device))
        marks = [i * recipe.steps // recipe.validations for i in range(1, recipe.validations + 1)]
        least, best, taken, candidates = math.inf, model.state_dict(), 0, 0
        history = defaultdict[str, list[float]](list)
        for index in islice(order, recipe.steps):
            trained.train()
            optimizer.zero_grad()
            terms = self._loss(trained, index, None if complete else labelled[index])
            terms.total.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            scheduler.step()
            taken += 1
            if taken in marks:
                candidates += 1
                forecast = task.forecast(model, truth, self.device)
                error = float(masked_error(forecast, truth.y, truth.mask, task.task_loss))
                if isinstance(trained, SDKDDistiller):
                    self._judge(trained.loss, forecast)
                weights = {k: float(v) for k, v in terms.scalars().items() if "weight" in k}
                now = {"step": float(taken), "validation error": error, **weights}
                for name, value in now.items():
                    history[name].append(value)
                if error < least:
                    least, best = error, copy.deepcopy(model.state_dict())
        model.load_state_dict(best)
        return {"validation": least, "steps": taken, "candidates": candidates}, history

    def _distiller(self, model: nn.Module) -> SDKDDistiller:
        task = self.task
        (example,) = task.batches(task.train.select(slice(1)), self.device)
        options: dict[str, Any] = {"transform": task.transform, "bands": task.bands}
        options |= {"task_loss": task.task_loss, "example": example}
        # The task has checked the data; a divergence shows in the validation error.
        options |= {"check_finite": False, **self.arm.options}
        return SDKDDistiller(self.teachers, model, **options).to(self.device)

    def _judge(self, loss: DistillationLoss, forecast: Tensor) -> None:
        """Weigh the teachers by the labels for validation."""
        truth = self.task.validation
        if loss.trust is None or not forecast.isfinite().all():  # a divergence shows elsewhere
            return
        for rows in torch.arange(len(truth)).split(50):
            part = truth.select(rows, self.device)
            outputs = [each.select(rows).to(self.device) for each in self.of_validation]
            judge(loss, loss.trust, forecast[rows].to(self.device), outputs, part.y, part.mask)
        with warnings.catch_warnings():
            # A row of the table has the teacher's error.
            warnings.simplefilter("ignore", UserWarning)
            loss.trust.update()

    def _loss(self, model: nn.Module, index: Tensor, labelled: Tensor | None) -> DistillationTerms:
        """Of a batch, with the flags of its labelled samples unless all of them are."""
        batch, mask = self.task.train.select(index, self.device), None
        inputs = {**self.task.shared, **batch.inputs}
        if labelled is not None:
            mask = labelled.to(self.device).reshape(-1, *[1] * (batch.y.ndim - 1))
            mask = mask if batch.mask is None else mask & batch.mask
        x, y, outputs = batch.x, batch.y, None
        if isinstance(model, SDKDDistiller) and self._ahead:
            outputs = [each.select(index).to(self.device) for each in self.outputs]
        if self.task.symmetry is not None:
            known = [each.forecast for each in outputs or ()]
            masks = [] if mask is None else [mask]
            x, y, *moved = self.task.symmetry.together(x, y, *masks, *known)
            mask = moved.pop(0) if masks else None
            outputs = outputs and [TeacherOutput(forecast) for forecast in moved]
        if isinstance(model, SDKDDistiller):
            return model.step(x, y, mask, outputs=outputs, **inputs)
        forecast = model(x, **accepted_inputs(model, inputs))
        return DistillationTerms(masked_error(forecast, y, mask, self.task.task_loss))

    @property
    def _ahead(self) -> bool:
        """Whether the teachers' stored outputs are used."""
        live = self.task.symmetry is not None and self.arm.options.get("latents")
        return not live and not self.arm.options.get("augmentation")


def _checksum(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return fingerprint([sorted(metadata.items()), [(k, state[k].cpu()) for k in sorted(state)]])


def _batches(indices: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of one size for ever, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    whole = max(1, len(indices) // size)
    while True:
        order = indices[torch.randperm(len(indices), generator=generator)]
        yield from order.split(size)[:whole]
