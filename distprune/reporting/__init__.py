"""What a run did, for people to read."""

from distprune.reporting.progress import console_progress
from distprune.reporting.tables import comparison_table, layer_table, memory_line, parameter_table, status_lines

__all__ = ["comparison_table", "console_progress", "layer_table", "memory_line", "parameter_table", "status_lines"]
