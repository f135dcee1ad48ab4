"""What the simplest methods share: each layer keeps as much, the units of the highest scores, and nothing is repaired.

Units are whole KV groups of attention and neurons of the FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from distprune.budgets import Target, fill_with_ffn, has_plain_heads
from distprune.decoder_layer import DecoderLayer, LayerShape
from distprune.methods.base import Method, Observe, Plan, Profile
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons, with_heads
from distprune.modeling import PrunedConfig
from distprune.solvers import most_important
from distprune.statistics import LayerStatistics


class ScoredUnits(Method):
    """A method that is two scores."""

    layouts: ClassVar[tuple[str, ...]] = ("per-layer", "stock")

    def score_groups(self, layer: DecoderLayer, statistics: LayerStatistics) -> Tensor:
        """What the KV groups are worth, (g,)."""
        raise NotImplementedError

    def score_neurons(self, layer: DecoderLayer, statistics: LayerStatistics) -> Tensor:
        """What the FFN's neurons are worth, (f,)."""
        raise NotImplementedError

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, (), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense, sparsity = target.dense_shapes, target.decoder_sparsity
        if target.sparsity == 0:
            return Plan(dense)
        if target.stock:
            shapes = [with_plain_groups(target.config, shape, sparsity) for shape in dense]
        else:
            shapes = [with_fewer_groups(shape, sparsity) for shape in dense]
        return Plan(fill_with_ffn(target, shapes, align))

    def prune(
        self,
        layer: DecoderLayer,
        planned: LayerShape,
        statistics: LayerStatistics,
        profile: Profile,
        observe: Observe,
    ) -> DecoderLayer:
        scores = self.score_groups(layer, statistics), self.score_neurons(layer, statistics)
        return keep_best(layer, planned, *scores)


def with_fewer_groups(shape: LayerShape, sparsity: float) -> LayerShape:
    """The shape without the fraction ``sparsity`` of its KV groups, to the nearest whole one; at least one stays."""
    kept = max(1, round((1 - sparsity) * shape.kv_heads))
    return with_heads(shape, kept, shape.query_heads // shape.kv_heads)


def with_plain_groups(config: PrunedConfig, shape: LayerShape, sparsity: float) -> LayerShape:
    """The same, to the nearest number that a plain configuration can have."""
    heads = shape.query_heads // shape.kv_heads
    possible = [with_heads(shape, groups, heads) for groups in range(shape.kv_heads, 0, -1)]
    plain = [smaller for smaller in possible if has_plain_heads(config, smaller)]
    return min(plain, key=lambda smaller: abs(smaller.kv_heads - (1 - sparsity) * shape.kv_heads))


def keep_best(layer: DecoderLayer, planned: LayerShape, groups: Tensor, neurons: Tensor) -> DecoderLayer:
    """The layer in its planned shape, with the KV groups, (g,), and neurons, (f,), of the highest scores."""
    heads = heads_of_groups(most_important(groups, planned.kv_heads), layer.query_heads // layer.kv_heads)
    return keep_neurons(keep_heads(layer, heads), most_important(neurons, planned.ffn_width))
