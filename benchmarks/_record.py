"""Where the benchmarks' records are, and the columns that all rows have."""

from pathlib import Path

from sdkd_plugin.report import append_rows, environment

__all__ = ["RESULTS", "append_rows", "environment"]

RESULTS = Path(__file__).parent / "results"
"""The folder of all records."""
