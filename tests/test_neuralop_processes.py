"""Behind neuraloperator's trainer on two processes: what is trained or measured stays the same."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from neuralop_parts import fields, train, unet
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sdkd_plugin import AdaptiveWeighting, Bands, DistillationLoss, GridTransform, LatentPair
from sdkd_plugin.adapters.neuralop import REGISTERED, TrainerLoss, distillation_dataset

from neuralop import LpLoss, Trainer  # isort: skip

WEIGHTINGS = {"fixed": lambda: (1.0, 2.0), "adaptive": lambda: AdaptiveWeighting(2, decay=0.5)}


def parts(seed: int, weighting: object) -> tuple[nn.Module, TrainerLoss]:
    """A student, and a loss whose latent measures what its forecast does."""
    student, pair = unet(seed), LatentPair("latent", "latent", weighting=weighting)
    options = {"weighting": weighting, "latents": [pair]}
    loss = DistillationLoss(unet(9, 6), GridTransform((8, 8)), Bands.split(0.4), **options)
    loss.fit_latents(student, fields(1)[0])
    with torch.no_grad():  # other projectors on each process
        for parameter in loss.parameters():
            parameter += seed
    return student, TrainerLoss(loss, student, LpLoss(d=2))


def train_on_a_rank(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    student, loss = parts(rank, (1.0, 2.0))
    with pytest.raises(ValueError, match="device_ids"):  # the host wraps for GPUs alone
        Trainer(model=student, n_epochs=1, use_distributed=True).train(
            [], {}, None, None, training_loss=loss
        )
    half = [
        torch.cat([batch[2 * rank : 2 * rank + 2] for batch in part.split(4)]) for part in fields()
    ]
    for name, weighting in WEIGHTINGS.items():
        student, loss = parts(rank, weighting())
        data = DataLoader(distillation_dataset(*half), 2)
        saving = {"save_every": 1, "save_dir": f"{folder}/{name}"}
        model = DistributedDataParallel(student)
        train(model, loss, data, n_epochs=1, optimizer=torch.optim.SGD, **saving)
        state = {**loss.state_dict(), **dict(student.named_parameters())}
        torch.save(state, f"{folder}/{name}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # most of it is the import of the host in two new processes
def test_two_processes_train_as_one_with_both_halves(tmp_path):
    mp.spawn(train_on_a_rank, args=(str(tmp_path),), nprocs=2)
    for name in WEIGHTINGS:
        first, second = (
            torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        assert any("projector" in key for key in first)
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)
    student, loss = parts(0, (1.0, 2.0))
    optimizer = torch.optim.SGD([*student.parameters(), *loss.loss.parameters()], 1e-2)
    for x, y in zip(*(part.split(4) for part in fields()), strict=True):
        optimizer.zero_grad()
        halves = zip(x.split(2), y.split(2), strict=True)
        (sum(loss(student(x), x=x, y=y) for x, y in halves) / 2).backward()
        optimizer.step()
    together = torch.load(tmp_path / "fixed_0.pt", weights_only=True)
    for key, value in {**loss.state_dict(), **dict(student.named_parameters())}.items():
        torch.testing.assert_close(
            together[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    loaded = REGISTERED["sdkd_unet"].from_checkpoint(tmp_path / "fixed", "model")
    for key, value in loaded.named_parameters():
        assert torch.equal(value, together[key])
