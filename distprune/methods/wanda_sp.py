"""Wanda-sp: Wanda's scores (Sun et al., ICLR 2024) summed over the units of structured pruning.

The baseline of FLAP (An et al., AAAI 2024): a weight is worth |W|·rms(x), and a unit what the output projection's
weights are worth that read from it. Units are compared within their layer, and every layer loses as much. Heads leave
by whole KV groups, where the paper's models have one to a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from distprune.layers.parts import Attention, FeedForward
from distprune.layers.shapes import LayerShape
from distprune.layers.sites import ATTENDED, NEURONS
from distprune.methods.base import Paper, of_parts
from distprune.methods.scored_units import ScoredUnits
from distprune.methods.units import sum_by_unit
from distprune.statistics import LayerStatistics, Moment, Power


class WandaSp(ScoredUnits):
    """Removes the units whose outgoing weights, times their activations, are smallest."""

    name: ClassVar[str] = "wanda-sp"
    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models (Wanda; Sun et al., ICLR 2024)", "2306.11695"
    )

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return of_parts(dense, attention=[Power(ATTENDED)], ffn=[Power(NEURONS)])

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return self.pruning_moments(shape, shape)

    def score_groups(self, attention: Attention, statistics: LayerStatistics) -> Tensor:
        channels = attention.output.weight.float().abs().sum(dim=0) * statistics.rms(ATTENDED)
        return sum_by_unit(channels, attention.kv_heads)

    def score_neurons(self, ffn: FeedForward, statistics: LayerStatistics) -> Tensor:
        return ffn.down.weight.float().abs().sum(dim=0) * statistics.rms(NEURONS)
