"""Where the benchmarks' records are, and how they are written."""

from pathlib import Path

import pandas as pd

from sdkd_plugin._files import atomic_path
from sdkd_plugin.report import append_rows, environment

__all__ = ["RESULTS", "append_rows", "environment", "write_record"]

RESULTS = Path(__file__).parent / "results"
"""The folder of all records."""


def write_record(stem: Path, text: str, rows: pd.DataFrame) -> None:
    """A table in markdown and its rows as CSV, beside each other."""
    for suffix, content in {".md": text, ".csv": rows.to_csv(index=False)}.items():
        with atomic_path(stem.with_suffix(suffix)) as path:
            path.write_text(content, encoding="utf-8")
