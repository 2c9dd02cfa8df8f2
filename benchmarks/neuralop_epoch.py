"""A distillation epoch through neuraloperator's trainer against plain training and the teacher.

Appends a row a student to ``results/neuralop_epoch.csv`` beside this file. An FNO teaches a smaller
FNO and a U-Net. Three things are timed, alternated in random order in one process:

- distilled: an epoch of the host's ``Trainer`` with `TrainerLoss`, the teacher asked at every step,
  all checks on as they are by default;
- plain: the same epoch of an equal student with MSE, which is the cheapest loss there is;
- teacher: its forecasts of the same batches, which are at hand already, so that loading and
  normalising count once on either side.

Exits with 1 when the median of distilled / (plain + teacher), taken in each repetition, is above
1.25.

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
from tqdm import tqdm

from sdkd_plugin import GridTransform, SDKDDistiller
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss
from sdkd_plugin.adapters.neuralop.data import load_navier_stokes
from sdkd_plugin.report import parameter_count

# After the adapter, which keeps neuraloperator from setting warning filters.
from neuralop import Trainer  # isort: skip
from neuralop.models import FNO  # isort: skip

FRAMES = 10
BATCH = 10
TEACHER_WIDTH = 32
STUDENT_WIDTH = 12
"""The students have about a third of the teacher's width, and so the loss weighs against little."""
BAR = 1.25

Loss = Callable[..., Tensor]


def fno(width: int) -> nn.Module:
    """A Fourier neural operator of a width, all else as the host has it."""
    model: nn.Module = FNO(
        n_modes=(16, 16), in_channels=FRAMES, out_channels=FRAMES, hidden_channels=width
    )
    # The host's operators warn of the labels that the host's trainer gives them.
    model.register_forward_pre_hook(nothing_but_x, with_kwargs=True)
    return model


def nothing_but_x(
    model: nn.Module, args: tuple[Any, ...], sample: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of a sample, the input alone."""
    return args, {name: value for name, value in sample.items() if name == "x"}


def unet(width: int) -> nn.Module:
    """Our U-Net of a width."""
    return REGISTERED["sdkd_unet"](in_channels=FRAMES, out_channels=FRAMES, width=width)


STUDENTS = {"fno": fno, "unet": unet}


def mse(out: Tensor, y: Tensor, **sample: Any) -> Tensor:
    """Summed over the batch, as the host expects."""
    return F.mse_loss(out, y) * len(y)


def measure(
    name: str,
    arguments: argparse.Namespace,
    device: torch.device,
    progress: tqdm,
) -> dict[str, Any]:
    """One row: median times, the median ratio, and whether the bar is met."""
    n, samples = arguments.resolution, arguments.samples
    generator = torch.Generator().manual_seed(arguments.seed)
    loader, _, processor = load_navier_stokes(
        torch.randn(samples, 2 * FRAMES, n, n, generator=generator),
        n_train=samples,
        n_tests=[],
        batch_size=BATCH,
        test_batch_sizes=[],
        train_resolution=n,
        test_resolutions=[],
        frames_in=FRAMES,
        frames_out=FRAMES,
        encode_input=True,
        seed=arguments.seed,
    )
    torch.manual_seed(arguments.seed)
    teacher = fno(TEACHER_WIDTH)
    student = STUDENTS[name](STUDENT_WIDTH)
    alone = copy.deepcopy(student).to(device)
    distiller = SDKDDistiller(teacher, student, GridTransform((n, n))).to(device)
    batches = [batch["x"].to(device) for batch in loader]

    def epoch_of(model: nn.Module, loss: Loss) -> Callable[[], object]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = Trainer(model=model, n_epochs=1, device=device, data_processor=processor)
        return lambda: trainer.train(
            loader, {}, optimizer, scheduler, training_loss=loss, eval_losses={}
        )

    def ask() -> None:
        for x in batches:
            distiller.teach(x)

    candidates = {
        "distilled": epoch_of(distiller.student, TrainerLoss(distiller)),
        "plain": epoch_of(alone, mse),
        "teacher": ask,
    }
    times = alternated(candidates, arguments.repetitions, device, generator, progress)
    ratios = [
        d / (p + t)
        for d, p, t in zip(times["distilled"], times["plain"], times["teacher"], strict=True)
    ]
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
        **{f"{name}_ms": round(statistics.median(ms), 2) for name, ms in times.items()},
        "ratio": round(ratio, 3),
        "least_ratio": round(min(ratios), 3),
        "largest_ratio": round(max(ratios), 3),
        "bar": BAR,
        "passed": ratio <= BAR,
        **environment(device),
    }


def alternated(
    candidates: dict[str, Callable[[], object]],
    repetitions: int,
    device: torch.device,
    generator: torch.Generator,
    progress: tqdm,
) -> dict[str, list[float]]:
    """Milliseconds of each candidate in each repetition, after one that is not counted."""
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-1, repetitions):
        for i in torch.randperm(len(names), generator=generator).tolist():
            start = time.perf_counter()
            candidates[names[i]]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repetition >= 0:
                times[names[i]].append(1e3 * (time.perf_counter() - start))
        progress.update()
    return times


def main() -> int:
    """Measure each student, keep the rows, say what was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=40, help="of an epoch (default 40)")
    parser.add_argument("--resolution", type=int, default=64, help="points an axis (default 64)")
    parser.add_argument("--repetitions", type=int, default=9, help="of each timing (default 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "neuralop_epoch.csv")
    arguments = parser.parse_args()
    if min(arguments.threads, arguments.repetitions, arguments.samples) < 1:
        parser.error("--threads, --repetitions and --samples must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but there is no CUDA device")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    with tqdm(total=len(STUDENTS) * (arguments.repetitions + 1), leave=False) as progress:
        rows = [measure(name, arguments, device, progress) for name in STUDENTS]
    append_rows(arguments.out, rows)
    for row in rows:
        print(
            "{teacher} -> {student:5} distilled {distilled_ms:.0f} ms = {ratio:.3f} x (plain "
            "{plain_ms:.0f} ms + teacher {teacher_ms:.0f} ms), {least_ratio:.3f} to "
            "{largest_ratio:.3f}; {verdict}".format(
                **row, verdict="passed" if row["passed"] else "MISSED"
            )
        )
    print(f"{len(rows)} rows added to {arguments.out}")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
