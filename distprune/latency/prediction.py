"""What a latency table says of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distprune.latency.latency_table import LatencyTable
from distprune.layers.architecture import Architecture
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

    def __str__(self) -> str:
        said = "of a prompt" if self.kind == "prefill" else "before the new one"
        return f"{self.kind}, batch {self.batch}, {self.tokens:,} tokens {said}"


@dataclass(frozen=True)
class LatencyPrediction:
    """What each workload takes, and where that was measured."""

    conditions: str
    workloads: list[WorkloadLatency]


def predict(table: LatencyTable, model: Architecture, plan: Sequence[LayerShape]) -> LatencyPrediction:
    """What a model takes whose layers have the shapes of a plan, and what it takes dense."""
    dense, planned = (
        np.sum([table.layer_seconds(index, shape) for index, shape in enumerate(shapes)], axis=0)
        for shapes in (model.dense_shapes, plan)
    )
    workloads = [
        WorkloadLatency(workload.kind, workload.batch, workload.tokens, float(before), float(after))
        for workload, before, after in zip(table.workloads, dense, planned, strict=True)
    ]
    return LatencyPrediction(table.conditions, workloads)
