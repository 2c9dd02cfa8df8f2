"""A distillation epoch through neuraloperator's trainer against plain training and the teacher.

Appends a row a student to ``results/neuralop_epoch.csv`` beside this file. An FNO teaches a smaller
FNO and a U-Net. Three things are timed, alternated in random order in one process:

- distilled: an epoch of the host's ``Trainer`` with `TrainerLoss`; the teacher runs in every step;
- plain: the same epoch of an equal student with MSE, the cheapest loss there is;
- teacher: its forecasts of the same batches, already loaded.

Exits with 1 if the median of distilled / (plain + teacher) over the repetitions is above 1.25.
Run it with ``python benchmarks/neuralop_epoch.py``: about a minute on one core.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _record import RESULTS, append_rows, environment
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdkd_plugin import DistillationLoss, GridTransform
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss, distillation_dataset
from sdkd_plugin.report import parameter_count

# After the adapter, which keeps neuraloperator from setting warning filters.
from neuralop import Trainer  # isort: skip
from neuralop.models import FNO  # isort: skip

FRAMES, BATCH, BAR = 10, 10, 1.25
TEACHER_WIDTH, STUDENT_WIDTH = 32, 12
CHANNELS = {"in_channels": FRAMES, "out_channels": FRAMES}


def fno(width: int) -> nn.Module:
    """The host's Fourier neural operator."""
    model: nn.Module = FNO((16, 16), **CHANNELS, hidden_channels=width)
    # The host's operators warn of the labels that the host's trainer gives them.
    model.register_forward_pre_hook(
        lambda _, args, sample: (args, {"x": sample["x"]} if sample else {}), with_kwargs=True
    )
    return model


STUDENTS: dict[str, Callable[[int], nn.Module]] = {
    "fno": fno,
    "unet": lambda width: REGISTERED["sdkd_unet"](**CHANNELS, width=width),
}


def mse(out: Tensor, y: Tensor, **sample: Any) -> Tensor:
    """Summed over the batch, as the host expects."""
    return F.mse_loss(out, y) * len(y)


def measure(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row: median times, the median ratio, and whether the bar is met."""
    n, samples = arguments.resolution, arguments.samples
    generator = torch.Generator().manual_seed(arguments.seed)
    x, y = torch.randn(2, samples, FRAMES, n, n, generator=generator)
    loader = DataLoader(distillation_dataset(x, y), BATCH)
    torch.manual_seed(arguments.seed)
    teacher, student = fno(TEACHER_WIDTH), STUDENTS[name](STUDENT_WIDTH)
    alone = copy.deepcopy(student).to(device)
    distillation = DistillationLoss(teacher, GridTransform((n, n))).to(device)
    batches = [batch["x"].to(device) for batch in loader]

    def epoch_of(model: nn.Module, loss: Callable[..., Tensor]) -> Callable[[], object]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = Trainer(model=model, n_epochs=1, device=device)
        return lambda: trainer.train(
            loader, {}, optimizer, scheduler, training_loss=loss, eval_losses={}
        )

    candidates = {
        "distilled": epoch_of(student, TrainerLoss(distillation, student)),
        "plain": epoch_of(alone, mse),
        "teacher": lambda: [distillation.teacher_outputs(x) for x in batches],
    }
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for repetition in range(-1, arguments.repetitions):  # one that is not counted
        for i in torch.randperm(len(candidates), generator=generator).tolist():
            candidate, start = list(candidates)[i], time.perf_counter()
            candidates[candidate]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repetition >= 0:
                times[candidate].append(1e3 * (time.perf_counter() - start))
    ratios = [d / (p + t) for d, p, t in zip(*times.values(), strict=True)]
    ratio = statistics.median(ratios)
    return {
        "student": name,
        "student_parameters": parameter_count(student),
        "teacher": "fno",
        "teacher_parameters": parameter_count(teacher),
        "shape": f"{samples}x{FRAMES}x{n}x{n}",
        "batch_size": BATCH,
        "seed": arguments.seed,
        "repetitions": arguments.repetitions,
        **{f"{key}_ms": round(statistics.median(ms), 2) for key, ms in times.items()},
        "ratio": round(ratio, 3),
        "least_ratio": round(min(ratios), 3),
        "largest_ratio": round(max(ratios), 3),
        "bar": BAR,
        "passed": ratio <= BAR,
        **environment(device),
    }


def main() -> int:
    """Measure each student, keep the rows, print what missed the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=40, help="of an epoch (default 40)")
    parser.add_argument("--resolution", type=int, default=64, help="points an axis (default 64)")
    parser.add_argument("--repetitions", type=int, default=9, help="of each timing (default 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "neuralop_epoch.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(name, arguments, torch.device(arguments.device)) for name in STUDENTS]
    append_rows(arguments.out, rows)
    for row in rows:
        print(
            "{teacher} -> {student:5} distilled {distilled_ms:.0f} ms = {ratio:.3f} x (plain "
            "{plain_ms:.0f} ms + teacher {teacher_ms:.0f} ms), {least_ratio:.3f} to "
            "{largest_ratio:.3f}; at most {bar}".format(**row)
        )
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
