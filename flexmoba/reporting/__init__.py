"""Helpers of commands and examples: terminal and files, figures, timing, versions."""

from flexmoba.reporting.console import (
    UsageError,
    add_device,
    add_json,
    check_writable,
    note,
    note_load,
    parse_writable,
    positive,
    print_result,
    progress,
    save_picture,
    table,
    table_row,
    table_rule,
    write_json,
)
from flexmoba.reporting.figure import can_draw, log_scale, mpl, new_figure
from flexmoba.reporting.timing import faster_from, median_ms, median_ms_alone
from flexmoba.reporting.versions import versions

__all__ = [
    "UsageError",
    "add_device",
    "add_json",
    "can_draw",
    "check_writable",
    "faster_from",
    "log_scale",
    "median_ms",
    "median_ms_alone",
    "mpl",
    "new_figure",
    "note",
    "note_load",
    "parse_writable",
    "positive",
    "print_result",
    "progress",
    "save_picture",
    "table",
    "table_row",
    "table_rule",
    "versions",
    "write_json",
]
