"""What a run leaves behind: metrics, tables, records and pictures.

Nothing here trains or forecasts; `tables` and `figures` know neither models nor data sets.
"""

from sdkd_plugin.report.metrics import Scores, milliseconds_a_forecast, parameter_count
from sdkd_plugin.report.records import append_rows, environment
from sdkd_plugin.report.run import Run, UserError, choose_device, command_line_errors
from sdkd_plugin.report.tables import Change, compare, format_table, paired_change

__all__ = [
    "Change",
    "Run",
    "Scores",
    "UserError",
    "append_rows",
    "choose_device",
    "command_line_errors",
    "compare",
    "environment",
    "format_table",
    "milliseconds_a_forecast",
    "paired_change",
    "parameter_count",
]
