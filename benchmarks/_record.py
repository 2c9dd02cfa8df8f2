"""What every benchmark's row says besides its own numbers, and how rows are kept.

Here live the columns of hardware and versions, and the CSV file. What is measured, and the bars,
are each benchmark's own.
"""

import csv
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sdkd_plugin import __version__
from sdkd_plugin.data.store import atomic_path

RESULTS = Path(__file__).parent / "results"
"""The folder of all records."""

Row = Mapping[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """The columns that say when and on what a row was measured.

    Args:
        device: the one that computed.

    Returns:
        date (UTC), hardware, threads, and versions of Python, torch and this package.
    """
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sdkd_plugin": __version__,
    }


def cpu_name() -> str:
    """The CPU's model, as far as the operating system tells."""
    info = Path("/proc/cpuinfo")  # `platform.processor()` is empty on most Linux systems
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file; an interruption leaves the old file.

    Args:
        path: the file, made where it is missing.
        rows: columns by name. Columns that older rows did not have stay empty there.
    """
    older: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            older = list(csv.DictReader(file))
    both = [*older, *rows]
    columns = list(dict.fromkeys(column for row in both for column in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(both)
