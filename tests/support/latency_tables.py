"""Latency tables that nobody has measured: every shape takes what a function says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distprune.budgets import layer_parameters
from distprune.latency import LatencyTable, Workload
from distprune.latency.measured_shapes import filled_grids, measured_grids
from distprune.latency.measuring_latency import kinds_of_layers
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import LayerShape

#: Prefill counts once, and decoding ten times.
WORKLOADS = [
    Workload(kind="prefill", batch=1, tokens=128, weight=1.0),
    Workload(kind="decode", batch=1, tokens=144, weight=10.0),
]
#: Seconds of a parameter in each workload, and of each matrix that stands in for another or beside it.
PER_PARAMETER, PER_PRODUCT = np.array([100e-9, 1e-9]), np.array([1e-6, 1e-6])

Seconds = Callable[[Architecture, int, LayerShape], np.ndarray]


def by_parameters(model: Architecture, index: int, shape: LayerShape) -> np.ndarray:
    """As many seconds as a layer has parameters, and some more for every product that the dense layer has not."""
    dense, extra = model.dense_shape(index), 0
    if shape.attention:
        ranks = (shape.attention.query_rank, shape.attention.key_rank, shape.attention.output_rank)
        extra = sum(rank is not None for rank in ranks)
        extra += shape.attention.value_dim < dense.attention.value_dim
        extra += shape.attention.query_key_dim < dense.attention.query_key_dim
    extra += bool(shape.ffn and shape.ffn.branch_rank)
    return PER_PARAMETER * layer_parameters(model, index, shape) + PER_PRODUCT * extra


def made_up_table(model: Architecture, seconds: Seconds = by_parameters, **changes) -> LatencyTable:
    """The table that measuring would make if every layer took as long as the function says."""
    first, layers = kinds_of_layers(model)
    kinds = []
    for index in first:
        grids = measured_grids(model, index)
        shapes = {shape for grid in grids for shape in (*grid.shapes, *grid.less) if shape}
        taken = {shape: seconds(model, index, shape) for shape in shapes}
        kinds.append(filled_grids(model.dense_shape(index), grids, taken))
    described = {"device": "a test's device", "dtype": "float32", "threads": 1, "torch": "2.10.0"}
    return LatencyTable(
        model_type=model.config.model_type,
        hidden_size=model.hidden_size,
        **described | {"workloads": WORKLOADS, "layers": layers, "kinds": kinds} | changes,
    )
