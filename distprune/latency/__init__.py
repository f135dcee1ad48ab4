"""How long a model's layers take on the device that will serve it: measuring it, and predicting it of other shapes."""

from distprune.latency.isotonic import monotone
from distprune.latency.latency_table import Grid, KindLatencies, LatencyTable, Workload
from distprune.latency.matching import latency_table_for
from distprune.latency.prediction import LatencyPrediction, WorkloadLatency, dense_latencies, predict

__all__ = [
    "Grid",
    "KindLatencies",
    "LatencyPrediction",
    "LatencyTable",
    "Workload",
    "WorkloadLatency",
    "dense_latencies",
    "latency_table_for",
    "monotone",
    "predict",
]
