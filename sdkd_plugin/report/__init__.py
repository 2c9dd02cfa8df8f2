"""What a run leaves behind: metrics, tables, records and pictures. Nothing here trains."""

from sdkd_plugin.report.command_line import check_folder, choose_device, command_line_errors
from sdkd_plugin.report.metrics import forecast_scores, milliseconds_a_forecast, parameter_count
from sdkd_plugin.report.records import append_rows, environment
from sdkd_plugin.report.rollouts import rollout_curves, rollout_scores, rollout_spectrum
from sdkd_plugin.report.tables import Change, format_table, paired_change, summary_table

__all__ = [
    "Change",
    "append_rows",
    "check_folder",
    "choose_device",
    "command_line_errors",
    "environment",
    "forecast_scores",
    "format_table",
    "milliseconds_a_forecast",
    "paired_change",
    "parameter_count",
    "rollout_curves",
    "rollout_scores",
    "rollout_spectrum",
    "summary_table",
]
