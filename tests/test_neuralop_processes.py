"""Behind neuraloperator's trainer on two processes: what is trained or measured stays the same."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_neuralop_training import fields, unet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sdkd_plugin import AdaptiveWeighting, Bands, GridTransform, LatentPair, SDKDDistiller
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss, distillation_dataset

from neuralop import Trainer  # isort: skip


def _train_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    student, distiller = _distributed_parts(seed=rank, weighting=(1.0, 2.0))
    try:
        Trainer(model=student, n_epochs=1, use_distributed=True).train(
            [], {}, None, None, training_loss=TrainerLoss(distiller)
        )
    except ValueError as error:
        assert "device_ids" in str(error)  # noqa: PT017
    else:
        raise AssertionError("the host wraps for CPUs now: document `use_distributed=True`")
    for name, weighting in _WEIGHTINGS.items():
        student, distiller = _distributed_parts(seed=rank, weighting=weighting())
        _train_distributed(
            DistributedDataParallel(student),
            distiller,
            torch.cat([batch[2 * rank : 2 * rank + 2] for batch in fields()[0].split(4)]),
            f"{folder}/{name}",
        )
        torch.save(distiller.state_dict(), f"{folder}/{name}_{rank}.pt")
    dist.destroy_process_group()


_WEIGHTINGS = {"fixed": lambda: (1.0, 2.0), "adaptive": lambda: AdaptiveWeighting(2, decay=0.5)}


def _distributed_parts(seed: int, weighting: object) -> tuple[nn.Module, SDKDDistiller]:
    student = unet(seed)
    torch.manual_seed(seed)  # of the projector
    # The latent measures what the forecast does.
    pair = LatentPair("latent", "latent", weighting=weighting)
    return student, SDKDDistiller(
        unet(seed=9, width=6),
        student,
        GridTransform((8, 8)),
        Bands.split(0.4),
        weighting=weighting,
        latents=[pair],
        example={"x": fields(1)[0]},
    )


def _samples(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.sum(1, keepdim=True).roll(1, -1).expand(-1, 3, -1, -1)


def _train_distributed(model: nn.Module, distiller: SDKDDistiller, x: Tensor, folder: str) -> None:
    optimizer = torch.optim.SGD(distiller.parameters(), 0.02)
    Trainer(model=model, n_epochs=1).train(
        DataLoader(distillation_dataset(*_samples(x)), 2),
        {},
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, 9),
        training_loss=TrainerLoss(distiller),
        save_every=1,
        save_dir=folder,
    )


@pytest.mark.slow  # most of it is the import of the host in two new processes
def test_two_processes_train_as_one_with_both_halves(tmp_path):
    mp.spawn(_train_on_a_rank, args=(str(tmp_path),), nprocs=2)
    for name in _WEIGHTINGS:
        first, second = (
            torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        assert any(key.startswith("latent_losses.") for key in first)
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)
    student, distiller = _distributed_parts(seed=0, weighting=(1.0, 2.0))
    loss = TrainerLoss(distiller)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.02)
    for x, y in zip(*(part.split(4) for part in _samples(fields()[0])), strict=True):
        optimizer.zero_grad()
        halves = zip(x.split(2), y.split(2), strict=True)
        (sum(loss(student(x), x=x, y=y) for x, y in halves) / 2).backward()
        optimizer.step()
    together = torch.load(tmp_path / "fixed_0.pt", weights_only=True)
    for key, value in distiller.state_dict().items():
        torch.testing.assert_close(
            together[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    loaded = REGISTERED["sdkd_unet"].from_checkpoint(tmp_path / "fixed", "model")
    assert torch.equal(loaded(fields()[0]), _student_of(together)(fields()[0]))


def _student_of(state: dict[str, Tensor]) -> nn.Module:
    student = unet()
    weights = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    student.load_state_dict(weights)
    return student
