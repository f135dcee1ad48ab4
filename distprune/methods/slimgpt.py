"""SlimGPT: layer-wise structured pruning for large language models (Ling et al., NeurIPS 2024).

Optimal brain surgeon on the two output projections, with their inputs' Gram matrices for curvature: units leave where
the least attainable error grows least, and the columns that stay make up for them.

- Batched greedy pruning: of attention, heads go one at a time; of the FFN, neurons go in batches that become smaller
  towards the end (dynamic group size).
- Incremental pruning ratio: errors add up on the way through the layers, so a layer loses less the earlier it stands.

Heads leave by whole KV groups, where the paper's models have one to a head, and at their exact error, which the paper
estimates column by column. Left out: a forward pass between attention and FFN, which would show the FFN what the
pruned attention gives it, and the fine-tuning that may follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import ClassVar

from pydantic import Field

from distprune.budgets import Target, affordable_neurons, fill_with_ffn, layer_parameters
from distprune.decoder_layer import DecoderLayer, LayerShape, Linear
from distprune.methods.base import Method, Observe, Plan, Profile
from distprune.methods.uniform import with_fewer_groups
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.solvers import eliminate
from distprune.statistics import Gram, LayerStatistics, Moment


class SlimGPT(Method):
    name: ClassVar[str] = "slimgpt"

    damping: float = Field(0.01, gt=0, description="added to the Gram matrix's diagonal, over the diagonal's mean")
    largest_batch: int = Field(1024, ge=1, description="FFN neurons that go at once at most")
    smallest_batch: int = Field(64, ge=1, description="FFN neurons that go at once at least")
    first_layer: float = Field(0.0, ge=0, le=1, description="the first layer's sparsity over the mean; 1 is uniform")

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, (), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        config = target.config
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        sparsities = incremental_sparsities(target.decoder_sparsity, len(dense), self.first_layer)
        shapes = [with_fewer_groups(shape, sparsity) for shape, sparsity in zip(dense, sparsities, strict=True)]
        budgets = [
            (1 - sparsity) * layer_parameters(config, index, dense[index]) for index, sparsity in enumerate(sparsities)
        ]
        wanted = [affordable_neurons(config, index, shapes[index], budget) for index, budget in enumerate(budgets)]
        return Plan(fill_with_ffn(target, shapes, align, [max(align, neurons) for neurons in wanted]))

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        moments = []
        if planned.kv_heads < dense.kv_heads:
            moments.append(Gram("attention_values"))
        if planned.ffn_width < dense.ffn_width:
            moments.append(Gram("ffn_neurons"))
        return moments

    def prune(
        self,
        layer: DecoderLayer,
        planned: LayerShape,
        statistics: LayerStatistics,
        profile: Profile,
        observe: Observe,
    ) -> DecoderLayer:
        if planned.kv_heads < layer.kv_heads:
            layer = self._prune_groups(layer, planned.kv_heads, statistics)
        if planned.ffn_width < layer.shape.ffn_width:
            layer = self._prune_neurons(layer, planned.ffn_width, statistics)
        return layer

    def _prune_groups(self, layer: DecoderLayer, keep: int, statistics: LayerStatistics) -> DecoderLayer:
        gram, weight = statistics.gram("attention_values"), layer.output.weight
        groups, weight = eliminate(weight, gram, keep, self.damping, width=len(gram) // layer.kv_heads)
        pruned = keep_heads(layer, heads_of_groups(groups, layer.query_heads // layer.kv_heads))
        return replace(pruned, output=Linear(weight, layer.output.bias))

    def _prune_neurons(self, layer: DecoderLayer, keep: int, statistics: LayerStatistics) -> DecoderLayer:
        neurons, weight = eliminate(
            layer.down.weight,
            statistics.gram("ffn_neurons"),
            keep,
            self.damping,
            largest_batch=self.largest_batch,
            smallest_batch=self.smallest_batch,
        )
        return replace(keep_neurons(layer, neurons), down=Linear(weight, layer.down.bias))


def incremental_sparsities(sparsity: float, layers: int, first: float) -> list[float]:
    """Layer sparsities of mean ``sparsity`` that grow with the logarithm of the depth.

    The first layer's is ``first`` times the mean, or as much nearer to the mean as keeps the last one's at 1.
    """
    depths = [log(1 + index) for index in range(layers)]
    mean = sum(depths) / layers
    if layers == 1:
        return [sparsity]
    slope = min((1 - first) * sparsity / mean, (1 - sparsity) / (depths[-1] - mean))
    return [sparsity + slope * (depth - mean) for depth in depths]
