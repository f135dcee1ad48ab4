"""What a run did, for people to read."""

from distprune.reporting.evaluation_tables import evaluation_lines
from distprune.reporting.live_progress import console_progress
from distprune.reporting.notebook_progress import chosen_progress
from distprune.reporting.run_tables import (
    comparison_table,
    layer_table,
    memory_line,
    parameter_table,
    place_line,
    status_lines,
)

__all__ = [
    "chosen_progress",
    "comparison_table",
    "console_progress",
    "evaluation_lines",
    "layer_table",
    "memory_line",
    "parameter_table",
    "place_line",
    "status_lines",
]
