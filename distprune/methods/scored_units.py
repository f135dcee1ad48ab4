"""What the simplest methods share: each layer keeps as much, the units of the highest scores, and nothing is repaired.

Units are whole KV groups of attention and neurons of the FFN, or of each expert of a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from distprune.budgets import Target, fill_with_ffn
from distprune.layers.parts import Attention, DecoderLayer, FeedForward
from distprune.layers.shapes import AttentionShape, FeedForwardShape
from distprune.methods.base import LayerToPrune, Method, Plan, Profile
from distprune.methods.even_layers import with_fewer_groups, with_plain_groups
from distprune.methods.networks import prune_each
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.solvers import most_important
from distprune.statistics import LayerStatistics


class ScoredUnits(Method):
    """A method that is two scores."""

    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous", "stock")
    takes_chunks: ClassVar[bool] = True

    def score_groups(self, attention: Attention, statistics: LayerStatistics) -> Tensor:
        """What the KV groups are worth, (g,)."""
        raise NotImplementedError

    def score_neurons(self, ffn: FeedForward, statistics: LayerStatistics) -> Tensor:
        """What the neurons are worth, (f,)."""
        raise NotImplementedError

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, (), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        fewer = with_plain_groups if target.layout == "stock" else with_fewer_groups
        shapes = [fewer(target, index, target.decoder_sparsity) for index in range(len(dense))]
        return Plan(fill_with_ffn(target, shapes, align))

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        layer, planned = given.layer, given.planned
        attention = layer.attention
        if attention and planned.attention != attention.shape:
            attention = keep_best_groups(attention, planned.attention, self.score_groups(attention, given.statistics))
        return prune_each(given, attention, self._prune_ffn)

    def _prune_ffn(self, given: LayerToPrune) -> FeedForward:
        ffn = given.layer.ffn
        return keep_best_neurons(ffn, given.planned.ffn, self.score_neurons(ffn, given.statistics))


def keep_best_groups(attention: Attention, planned: AttentionShape, scores: Tensor) -> Attention:
    """Attention in its planned shape, with the KV groups of the highest scores, (g,)."""
    return keep_heads(attention, heads_of_groups(most_important(scores, planned.kv_heads), planned.heads_per_group))


def keep_best_neurons(ffn: FeedForward, planned: FeedForwardShape, scores: Tensor) -> FeedForward:
    """A feed-forward network in its planned shape, with the neurons of the highest scores, (f,)."""
    return keep_neurons(ffn, most_important(scores, planned.width))


def keep_best_profiled(given: LayerToPrune) -> FeedForward:
    """A feed-forward network in its planned shape, with the neurons that its profile says are worth most."""
    return keep_best_neurons(given.layer.ffn, given.planned.ffn, given.profile["neurons"])
