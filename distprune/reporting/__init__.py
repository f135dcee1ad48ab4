"""What a run did, for people to read."""

from distprune.reporting.tables import layer_table, memory_line, parameter_table

__all__ = ["layer_table", "memory_line", "parameter_table"]
