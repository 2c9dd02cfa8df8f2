"""Python calls of this package in one training step, behind neuraloperator and behind tsl.

A call is an entry into a frame of ``sdkd_plugin/`` outside ``models/``. The step has no latents and
is not the first; it lasts until the host asks for the next batch. Prints the calls of each file;
exits with 1 if a host is above its bar.

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
STEADY = 2
PACKAGE = Path(sdkd_plugin.__file__).parent
Calls = Counter[tuple[str, str]]


class Counted:
    """A loader's batches; the calls of the step with one of them are counted in ``calls``."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.calls: Calls = Counter()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.loader):
            sys.setprofile(self._count if i == STEADY else None)
            yield batch

    def _count(self, frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and path.parent.name != "models":
            self.calls[str(path.relative_to(PACKAGE)), frame.f_code.co_name] += 1


def neuraloperator_calls() -> Calls:
    """Of the host's ``Trainer`` with its `LpLoss`; teacher and student are ours."""
    channels = {"in_channels": 1, "out_channels": 1}
    teacher, student = (REGISTERED["sdkd_unet"](**channels, width=w) for w in (8, 4))
    loss = TrainerLoss(DistillationLoss(teacher, GridTransform((8, 8))), student, LpLoss(d=2))
    x = torch.randn(16, 1, 8, 8)
    batches = Counted(DataLoader(distillation_dataset(x, x.roll(1, -1)), 4))
    optimizer = torch.optim.Adam(student.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    Trainer(model=student, n_epochs=1).train(
        batches, {}, optimizer, scheduler, training_loss=loss, eval_losses={}
    )
    return batches.calls


def tsl_calls() -> Calls:
    """Of Lightning with tsl's masked loss; teacher and student are ours."""
    nodes = torch.arange(5)
    edges = torch.stack([nodes, nodes.roll(-1)])
    data = SpatioTemporalDataset(
        torch.randn(30, 5, 1).numpy(),
        mask=(torch.rand(30, 5, 1) > 0.1).numpy(),
        connectivity=(edges, None),
        window=6,
        horizon=3,
    )
    sizes: dict[str, Any] = {"input_size": 1, "window": 6, "horizon": 3, "n_nodes": 5}
    loss = DistillationLoss(SDKDTeacher(**sizes), GraphTransform.from_edges(edges, None, 5))
    predictor = DistillationPredictor(
        loss,
        model=SDKDStudent(**sizes),
        loss_fn=MaskedMAE(),
        metrics={"mae": MaskedMAE()},
        optim_class=torch.optim.Adam,
        optim_kwargs={"lr": 1e-3},
    )
    batches = Counted(StaticGraphLoader(data, batch_size=4))
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(predictor, batches)
    return batches.calls


def main() -> int:
    """Count behind each host, print the calls, compare with the bars."""
    counts = {"neuraloperator": neuraloperator_calls(), "tsl": tsl_calls()}
    for host, calls in counts.items():
        files = dict.fromkeys(file for file, _ in sorted(calls))
        print(f"{host}: {calls.total()} calls in {len(files)} files, at most {BARS[host]}")
        for file in files:
            own = {name: n for (f, name), n in sorted(calls.items()) if f == file}
            print(f"  {file}: " + ", ".join(f"{n} {name}" for name, n in own.items()))
    return int(any(calls.total() > BARS[host] for host, calls in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
