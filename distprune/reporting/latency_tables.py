"""Latencies for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from distprune.latency import LatencyPrediction, LatencyTable, WorkloadLatency, dense_latencies
from distprune.reporting.run_tables import at_full_width


def prediction_table(prediction: LatencyPrediction) -> Table:
    """What a plan makes of the decoder layers' milliseconds for a token."""
    table = empty_table(f"Decoder layers, by the latencies of {prediction.conditions}", ("dense", "planned", "saved"))
    for workload in prediction.workloads:
        before, after = workload.milliseconds_per_token
        table.add_row(str(workload), milliseconds(before), milliseconds(after), f"{workload.saved:.1%}")
    return at_full_width(table)


def workload_table(latencies: LatencyTable) -> Table:
    """What was measured, of the dense decoder layers together, and how often each counts in a budget."""
    table = empty_table("Decoder layers, dense", ("measured", "weight"))
    measured: Sequence[WorkloadLatency] = dense_latencies(latencies)
    for workload, latency in zip(latencies.workloads, measured, strict=True):
        table.add_row(str(latency), milliseconds(latency.milliseconds_per_token[0]), f"{workload.weight:g}")
    return at_full_width(table)


def empty_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("workload")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def milliseconds(value: float) -> str:
    """Three digits or more, and what they are of."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f} ms a token"
