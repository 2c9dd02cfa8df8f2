"""Everything that is written, how it is read back, and processes to kill or to bring in trouble."""

import ctypes
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cache_parts
import numpy as np
import pytest
import torch
import tsl_parts
from neuralop_parts import run as train_grid
from neuralop_parts import unet
from torch import Tensor, nn
from tqdm import tqdm

from sdkd_plugin import Bands, GridTransform, TeacherCache, precompute
from sdkd_plugin._files import check_files
from sdkd_plugin.adapters.neuralop import REGISTERED
from sdkd_plugin.adapters.tsl import PlainPredictor, load_weights
from sdkd_plugin.data.store import load_or_compute
from sdkd_plugin.model_folder import ModelCard, load_model, save_model
from sdkd_plugin.study import Arm, Samples, Task, study

from pytorch_lightning.callbacks import ModelCheckpoint  # isort: skip

State = dict[str, Tensor]


class Kept(NamedTuple):
    """Something that is written: a version of it by number, and all of it read back as tensors."""

    write: Callable[[Path, int], Any]
    read: Callable[[Path], State]
    files: str = "*"
    sealed: bool = True  # a checksum is over every byte of it, not over the values alone
    versions: bool = True  # a second version takes the place of the first


def write_cache(folder: Path, version: int) -> None:
    del version
    precompute(cache_parts.loss_of(), cache_parts.batches(), folder, storage="float16")


def read_cache(folder: Path) -> State:
    opened = TeacherCache(folder)
    return {"forecast": opened.outputs(cache_parts.ALL)[0].forecast}


def array(version: int) -> Tensor:
    return torch.full((40, 8), float(version))


def write_array(folder: Path, version: int) -> None:
    load_or_compute("a", partial(array, version), parameters={"n": version}, folder=folder)


def read_array(folder: Path) -> State:
    def compute() -> Tensor:
        raise AssertionError("the stored array was not used")

    if not list(folder.glob("a-*")):
        raise FileNotFoundError(folder)
    return {"0": load_or_compute("a", compute, parameters={"n": 0}, folder=folder)}


CARD = ModelCard("UNet", {"in_channels": 1, "out_channels": 1, "width": 2, "depth": 1})


def filled(model: nn.Module, version: int) -> nn.Module:
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(version)
    return model


def write_model(folder: Path, version: int) -> None:
    save_model(folder, filled(CARD.make(), version), CARD)


def read_model(folder: Path) -> State:
    return dict(load_model(folder)[0].named_parameters())


def write_training(folder: Path, version: int) -> None:
    train_grid(version + 1, save_every=1, save_dir=folder)


def read_training(folder: Path) -> State:
    check_files(folder, "training")
    made = train_grid(9, resume_from_dir=folder)
    return dict(made.student.named_parameters())


def write_grid_model(folder: Path, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    filled(unet(), version).save_checkpoint(folder, "model")


def read_grid_model(folder: Path) -> State:
    model = REGISTERED["sdkd_unet"].from_checkpoint(folder, "model")
    return dict(model.named_parameters())


def write_graph_model(folder: Path, version: int) -> None:
    predictor = PlainPredictor(model=filled(tsl_parts.student(), version), **tsl_parts.FIT)
    keep = ModelCheckpoint(folder, filename="best", monitor=None, save_top_k=1)
    module = tsl_parts.windows()
    tsl_parts.trainer(1, (keep,), limit_train_batches=1, limit_val_batches=0).fit(predictor, module)


def read_graph_model(folder: Path) -> State:
    stored = load_weights(tsl_parts.student(), folder / "best.ckpt")
    return {name: value for name, value in stored["state_dict"].items() if "model." in name}


def samples(seed: int) -> Samples:
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Samples(x, x.roll(1, -1))


def tiny() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1)


def write_study(folder: Path, version: int) -> Any:
    parts = {"train": samples(0), "validation": samples(1), "test": samples(2)}
    task = Task(**parts, transform=GridTransform((8, 8)), bands=Bands.split(0.4))
    arms = [Arm("student", kd_weight=0), Arm("again", kd_weight=0, labels=0.5)]
    options = {"seeds": 1, "steps": 2 + version, "validations": 1, "batch_size": 2}
    return study(task, student=tiny, arms=arms, folder=folder, **options)


def read_study(folder: Path) -> State:
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    if not before:
        raise FileNotFoundError(folder)
    result = write_study(folder, 0)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    return {
        f"{training.arm.name}.{name}": value
        for training in result.trainings
        for name, value in training.model(0).named_parameters()
    }


WRITTEN = {
    "cache": Kept(write_cache, read_cache, "[pm]*", versions=False),
    "array": Kept(write_array, read_array, "a-*", versions=False),
    "model folder": Kept(write_model, read_model),
    "training of neuraloperator": Kept(write_training, read_training, versions=False),
    "model of neuraloperator": Kept(write_grid_model, read_grid_model, "*.pt", sealed=False),
    "model of tsl": Kept(write_graph_model, read_graph_model, "*.ckpt", sealed=False),
    "run folder": Kept(write_study, read_study, "*.safetensors", versions=False),
}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def counted(few: int, many: int) -> pytest.MarkDecorator:
    """A few faults in the gate, many in the whole suite."""
    return pytest.mark.parametrize("n", [few, pytest.param(many, marks=pytest.mark.slow)])


def states_of(name: str, folder: Path) -> list:
    """What reading gives of each version."""
    kept, states = WRITTEN[name], []
    for version in range(2 if kept.versions else 1):
        kept.write(folder / f"{version}", version)
        states.append(kept.read(folder / f"{version}"))
    return states


def forked(work: Callable[[], Any]) -> int:
    """The number of a process that does some work and ends with 0, or prints why it did not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads
        child = os.fork()
    if child:
        return child
    status = 1
    tqdm.set_lock(threading.RLock())  # its own is shared: a killed process would keep it for ever
    try:
        work()
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a process: its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(work: Callable[[], Any], kills: int, longest: float, seed: int = 0) -> Iterator[bool]:
    """Do some work in processes that are killed at random moments; whether each was."""
    chance = np.random.default_rng(seed)
    done = 0
    while done < kills:
        child = forked(work)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        was_killed = ended(child) == -signal.SIGKILL
        done += was_killed
        yield was_killed


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _PRIVATE, _READ_ONLY, _REMOUNT, _BIND = 0x20000, 0x44000, 1, 32, 4096


def _mount(source: bytes, target: bytes, kind: Any, flags: int, data: Any = None) -> bool:
    return _LIBC.mount(source, target, kind, flags, data) == 0


def _own_mounts() -> bool:
    return _LIBC.unshare(_NEW_MOUNTS) == 0 and _mount(b"none", b"/", None, _PRIVATE)


@cache
def can_mount() -> bool:
    """Whether a process may have file systems of its own here."""
    return ended(forked(lambda: None if _own_mounts() else os._exit(2))) == 0


def fill_up(folder: Path, kilobytes: int) -> None:
    """In this process: a folder on a disk of some kilobytes, or else files of that size at most."""
    folder.mkdir(parents=True, exist_ok=True)
    if can_mount():
        _own_mounts()
        size = f"size={kilobytes}k".encode()
        assert _mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, size)
    else:
        limit = kilobytes * 1024
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def make_read_only(folder: Path) -> bool:
    """In this process: a folder that nobody can write to; False where that cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    if can_mount():
        _own_mounts()
        path = os.fsencode(folder)
        assert _mount(path, path, None, _BIND)
        return _mount(path, path, None, _REMOUNT | _BIND | _READ_ONLY)
    folder.chmod(0o555)
    return os.geteuid() != 0
