"""Structured magnitude pruning: units of small weights go, whatever the data say.

Han et al. (NeurIPS 2015) removed single weights by magnitude; here the weights that go together are one vector, as in
the L2 baseline of LLM-Pruner (Ma et al., NeurIPS 2023). Left out: the fine-tuning that follows in both, and that
LLM-Pruner spares the first and last layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from distprune.layers.parts import Attention, FeedForward
from distprune.layers.shapes import LayerShape
from distprune.methods.scored_units import ScoredUnits
from distprune.methods.units import column_energy, row_energy, sum_by_unit
from distprune.statistics import LayerStatistics, Moment


class Magnitude(ScoredUnits):
    """Removes the units of the smallest weights."""

    name: ClassVar[str] = "magnitude"

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def score_groups(self, attention: Attention, statistics: LayerStatistics) -> Tensor:
        """The norm of a KV group's query, key and value rows and output columns."""
        rows = map(row_energy, (attention.query, attention.key, attention.value))
        columns = column_energy(attention.output)
        return sum(sum_by_unit(channels, attention.kv_heads) for channels in (*rows, columns)).sqrt()

    def score_neurons(self, ffn: FeedForward, statistics: LayerStatistics) -> Tensor:
        """The norm of a neuron's rows in gate and up, and of its column in down."""
        return (sum(map(row_energy, ffn.inputs)) + column_energy(ffn.down)).sqrt()
