"""What a run leaves behind: metrics, tables and pictures.

Nothing here trains or forecasts; `tables` and `figures` know neither models nor data sets.
"""

from sdkd_plugin.report.metrics import GridScores, milliseconds_a_forecast, parameter_count
from sdkd_plugin.report.run import Run, UserError, choose_device, command_line_errors
from sdkd_plugin.report.tables import band_means, compare, format_table, paired_change

__all__ = [
    "GridScores",
    "Run",
    "UserError",
    "band_means",
    "choose_device",
    "command_line_errors",
    "compare",
    "format_table",
    "milliseconds_a_forecast",
    "paired_change",
    "parameter_count",
]
