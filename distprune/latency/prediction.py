"""What a latency table says of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distprune.latency.latency_table import LatencyTable, Seconds
from distprune.layers.shapes import LayerShape


@dataclass(frozen=True)
class WorkloadLatency:
    """What the decoder layers take together for one workload, in seconds.

    Attributes:
        kind: "prefill" or "decode".
        batch: sequences at a time.
        tokens: of each: those of the prompt, or those before the new one.
        dense: of the dense layers.
        planned: of the layers in the shapes of the plan.
    """

    kind: str
    batch: int
    tokens: int
    dense: float
    planned: float

    @property
    def milliseconds_per_token(self) -> tuple[float, float]:
        """Dense and planned, by how many tokens each sequence has of it: all of a prompt's, or the one that is new."""
        tokens = self.tokens if self.kind == "prefill" else 1
        return 1e3 * self.dense / tokens, 1e3 * self.planned / tokens

    @property
    def saved(self) -> float:
        """The fraction of the dense layers' time that the plan saves; negative where it takes longer."""
        return 1 - self.planned / self.dense if self.dense else 0.0

    def __str__(self) -> str:
        said = "of a prompt" if self.kind == "prefill" else "before the new one"
        return f"{self.kind}, batch {self.batch}, {self.tokens:,} tokens {said}"


@dataclass(frozen=True)
class LatencyPrediction:
    """What each workload takes, and where that was measured."""

    conditions: str
    workloads: list[WorkloadLatency]

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> LatencyPrediction:
        """The prediction of which :func:`dataclasses.asdict` made what is given."""
        return cls(said["conditions"], [WorkloadLatency(**workload) for workload in said["workloads"]])


def predict(table: LatencyTable, plan: Sequence[LayerShape]) -> LatencyPrediction:
    """What a model takes whose layers have the shapes of a plan, and what it takes dense."""
    workloads = zip(table.workloads, seconds_of(table, dense_shapes(table)), seconds_of(table, plan), strict=True)
    return LatencyPrediction(
        table.conditions,
        [
            WorkloadLatency(workload.kind, workload.batch, workload.tokens, float(before), float(after))
            for workload, before, after in workloads
        ],
    )


def dense_latencies(table: LatencyTable) -> list[WorkloadLatency]:
    """What the dense model takes."""
    return predict(table, dense_shapes(table)).workloads


def dense_shapes(table: LatencyTable) -> list[LayerShape]:
    """The shapes of the dense layers that were measured."""
    return [LayerShape.from_json(table.kind(index).shape) for index in range(len(table.layers))]


def seconds_of(table: LatencyTable, shapes: Sequence[LayerShape]) -> Seconds:
    """What all layers take together, of each workload."""
    return np.sum([table.layer_seconds(index, shape) for index, shape in enumerate(shapes)], axis=0)
