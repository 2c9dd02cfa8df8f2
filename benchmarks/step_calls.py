"""Python calls of this package in one training step, behind neuraloperator and behind tsl.

A call is an entry into a frame of ``sdkd_plugin/`` outside ``models/``. The step has no latents and
is not the first; it lasts until the host asks for the next batch. Exits with 1 above a bar.
Run it with ``python benchmarks/step_calls.py``: a few seconds.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

import sdkd_plugin
from sdkd_plugin import DistillationLoss, GraphTransform, GridTransform
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss, distillation_dataset
from sdkd_plugin.adapters.tsl import DistillationPredictor, SDKDStudent, SDKDTeacher

# After the adapters, which make the hosts importable and silent.
import pytorch_lightning as pl  # isort: skip
from neuralop import LpLoss, Trainer  # isort: skip
from tsl.data import SpatioTemporalDataset  # isort: skip
from tsl.data.loader import StaticGraphLoader  # isort: skip
from tsl.metrics.torch import MaskedMAE  # isort: skip

BARS = {"neuraloperator": 35, "tsl": 50}
PACKAGE = Path(sdkd_plugin.__file__).parent


class Counted(list[Any]):
    """Batches; ``calls`` are those of the step with the third, by file and function."""

    def __iter__(self) -> Iterator[Any]:
        self.calls: Counter[tuple[str, str]] = Counter()
        for i, batch in enumerate(super().__iter__()):
            sys.setprofile(self._count if i == 2 else None)
            yield batch

    def _count(self, frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and path.parent.name != "models":
            self.calls[str(path.relative_to(PACKAGE)), frame.f_code.co_name] += 1


def neuraloperator_step() -> Counted:
    """The host's ``Trainer`` with its `LpLoss`; teacher and student are ours."""
    unet, x = REGISTERED["sdkd_unet"], torch.randn(16, 1, 8, 8)
    teacher, student = (unet(in_channels=1, out_channels=1, width=width) for width in (8, 4))
    loss = TrainerLoss(DistillationLoss(teacher, GridTransform((8, 8))), student, LpLoss(d=2))
    batches = Counted(DataLoader(distillation_dataset(x, x), 4))
    optimizer = torch.optim.Adam(student.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    Trainer(model=student, n_epochs=1).train(batches, {}, optimizer, scheduler, training_loss=loss)
    return batches


def tsl_step() -> Counted:
    """Lightning with tsl's masked loss; teacher and student are ours."""
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
    sizes: dict[str, Any] = {"input_size": 1, "window": 6, "horizon": 3, "n_nodes": 5}
    speed, observed = torch.randn(30, 5, 1).numpy(), (torch.rand(30, 5, 1) > 0.1).numpy()
    data = SpatioTemporalDataset(speed, None, observed, (edges, None), window=6, horizon=3)
    loss = DistillationLoss(SDKDTeacher(**sizes), GraphTransform.from_edges(edges, None, 5))
    fit = {"loss_fn": MaskedMAE(), "optim_class": torch.optim.Adam, "optim_kwargs": {"lr": 1e-3}}
    predictor = DistillationPredictor(loss, model=SDKDStudent(**sizes), **fit)
    batches = Counted(StaticGraphLoader(data, batch_size=4))
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silent: dict[str, Any] = dict.fromkeys(options, False)
    pl.Trainer(max_epochs=1, accelerator="cpu", **silent).fit(predictor, batches)
    return batches


def main() -> int:
    """Count behind each host, and print the calls by file."""
    counts = {"neuraloperator": neuraloperator_step().calls, "tsl": tsl_step().calls}
    for host, calls in counts.items():
        by_file: dict[str, list[str]] = {}
        for (file, name), n in sorted(calls.items()):
            by_file.setdefault(file, []).append(f"{n} {name}")
        print(f"{host}: {calls.total()} calls in {len(by_file)} files, at most {BARS[host]}")
        print("\n".join(f"  {file}: {', '.join(names)}" for file, names in by_file.items()))
    return int(any(calls.total() > BARS[host] for host, calls in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
