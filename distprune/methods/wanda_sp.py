"""Wanda-sp: Wanda's scores (Sun et al., ICLR 2024) summed over the units of structured pruning.

The baseline of FLAP (An et al., AAAI 2024): a weight is worth |W|·rms(x), a unit what the output projection's weights
are worth that read from it. Units are compared within their layer, and every layer loses as much. Heads leave by whole
KV groups, where the paper's models have one to a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from distprune.decoder_layer import DecoderLayer, LayerShape
from distprune.methods.uniform import ScoredUnits
from distprune.methods.units import sum_by_unit
from distprune.statistics import LayerStatistics, Moment, Power


class WandaSp(ScoredUnits):
    name: ClassVar[str] = "wanda-sp"

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return Power("attention_values"), Power("ffn_neurons")

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return self.pruning_moments(shape, shape)

    def score_groups(self, layer: DecoderLayer, statistics: LayerStatistics) -> Tensor:
        channels = layer.output.weight.float().abs().sum(dim=0) * statistics.rms("attention_values")
        return sum_by_unit(channels, layer.kv_heads)

    def score_neurons(self, layer: DecoderLayer, statistics: LayerStatistics) -> Tensor:
        return layer.down.weight.float().abs().sum(dim=0) * statistics.rms("ffn_neurons")
