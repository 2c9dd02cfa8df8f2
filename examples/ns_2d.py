"""Distil a small U-Net from a large STAlterNet on two-dimensional turbulence.

Ten frames of vorticity in, the next ten out. The teacher is trained on 480 labelled trajectories.
Whoever trains the student has the labels of 40 of them and the inputs of all: the teacher's
forecasts take the place of the missing labels. First comes one distillation, as in a script of
one's own; then a table of the ways to train the student, each with three seeds and the same steps,
and pictures.

    python examples/ns_2d.py                # three to four minutes on two CPU cores
    python examples/ns_2d.py --steps 8000   # twice as long: the order of the rows stays
    python examples/ns_2d.py --help
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdkd_plugin import SDKDDistiller
from sdkd_plugin.models import STAlterNet, UNet
from sdkd_plugin.report import check_folder, choose_device, command_line_errors
from sdkd_plugin.study import Arm, Task, navier_stokes_task, standard_arms, study

SIZES = (480, 40, 60)  # trajectories for training, validation and test
LABELLED, TEACHER_STEPS = 40, 4000
KD_WEIGHT = 10.0  # of the teacher against the labels; chosen on the validation trajectories
FRAMES: dict[str, Any] = {"in_channels": 10, "out_channels": 10, "coordinates": True}
make_teacher = partial(STAlterNet, width=16, depth=3, **FRAMES)  # 394 thousand parameters
make_student = partial(UNet, width=8, **FRAMES)  # 30 thousand


def distil(task: Task, teacher: nn.Module, steps: int, device: torch.device) -> nn.Module:
    """A student that learns from the labels of the first samples and the teacher's forecasts."""
    student = make_student().to(device)
    distiller = SDKDDistiller(teacher, student, task.transform, task.bands, kd_weight=KD_WEIGHT).to(
        device
    )
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-3)
    for step in range(steps):
        labelled = step % (len(task.train) // LABELLED) == 0  # as often as a sample has a label
        rows = torch.randint(LABELLED if labelled else len(task.train), (8,))
        batch = task.train.select(rows, device)
        terms = distiller.step(batch.x, batch.y if labelled else None)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    shown = {name: round(float(value), 4) for name, value in terms.scalars().items()}
    print(f"After {steps} steps: {shown}")
    return student


def compare(options: argparse.Namespace) -> None:
    """Data, teacher, one distillation, and the comparison."""
    check_folder(options.out)
    device = choose_device(options.device)
    print("Navier-Stokes: computing or reading the trajectories.", flush=True)
    task = navier_stokes_task(
        options.data,
        sizes=SIZES,
        viscosity=1e-3,
        resolution=16,
        solver_resolution=32,
        batch_size=50,
    )
    common: dict[str, Any] = {"batch_size": 8, "device": device, "folder": options.out / "models"}

    print("Training the teacher.", flush=True)
    alone = Arm("teacher", kd_weight=0)
    trained = study(
        task, student=make_teacher, arms=[alone], seeds=1, steps=TEACHER_STEPS, lr=2e-3, **common
    )
    (teacher,) = trained.models("teacher")

    distil(task, teacher, options.steps // 10, device)

    print("Training the students.", flush=True)
    result = study(
        task,
        student=make_student,
        teacher=teacher,
        arms=standard_arms(labels=LABELLED / SIZES[0], kd_weight=KD_WEIGHT),
        seeds=options.seeds,
        steps=options.steps,
        lr=3e-3,
        jobs=options.jobs,
        **common,
    )
    result.write(options.out)
    print(f"\n{result.report()}\nTable, rows, figures and models: {options.out}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Distil a U-Net from an STAlterNet on turbulence.")
    parser.add_argument("--steps", type=int, default=4000, help="of a student (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, help="trajectories: .mat, .npy, .pt or .safetensors")
    parser.add_argument("--out", type=Path, default=Path("runs/ns_2d"), help="%(default)s")
    options = parser.parse_args()
    with command_line_errors(parser.prog):
        for name, least in {"steps": 20, "seeds": 1, "jobs": 1}.items():
            if (value := getattr(options, name)) < least:
                raise ValueError(f"--{name} is {value}, expected at least {least}.")
        compare(options)


if __name__ == "__main__":
    main()
