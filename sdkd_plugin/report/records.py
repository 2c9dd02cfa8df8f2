"""Rows of results: what a row tells of the machine, what made it, and how rows are appended."""

import csv
import hashlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdkd_plugin._files import atomic_path, locked
from sdkd_plugin._version import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """When (UTC) and on what a row was measured: hardware, threads, versions."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdkd_plugin": __version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # `platform.processor()` is empty on most Linux systems
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file; an interruption leaves the old file.

    Args:
        path: the file; it is made if it is missing.
        rows: columns by name; older rows are empty in new columns.
    """
    file, older = Path(path), list[Mapping[str, Any]]()
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent):  # another writer's rows count too
        if file.exists():
            with file.open(newline="") as opened:
                older = list(csv.DictReader(opened))
        both = [*older, *rows]
        columns = list(dict.fromkeys(column for row in both for column in row))
        with atomic_path(file) as temporary, temporary.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(both)


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits of all values, weights and options in it; functions by name only.

    Example:
        >>> fingerprint([torch.zeros(2), {"a": 1}]) == fingerprint([torch.zeros(2), {"a": 2}])
        False
    """
    if isinstance(value, nn.Module):
        value = [repr(value), value.state_dict()]
    if isinstance(value, Tensor):
        # A copy, because a single value may have a stride of 0, of which no bytes can be seen.
        flat = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        data = f"{value.dtype}{tuple(value.shape)}".encode() + flat.view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        return fingerprint(list(value.items()))
    elif isinstance(value, list | tuple):
        data = ",".join(fingerprint(each) for each in value).encode()
    else:
        data = re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()
    return hashlib.sha256(data).hexdigest()[:12]
