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

from distprune.budgets import Target, affordable_neurons, fill_with_ffn
from distprune.layers.parts import Attention, DecoderLayer, FeedForward, Linear
from distprune.layers.shapes import LayerShape
from distprune.layers.sites import ATTENDED, NEURONS
from distprune.methods.base import LayerToPrune, Method, Paper, Plan, Profile, of_parts
from distprune.methods.even_layers import with_fewer_groups
from distprune.methods.networks import prune_each
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.solvers import eliminate
from distprune.statistics import Gram, LayerStatistics, Moment


class SlimGPT(Method):
    """Removes units by optimal brain surgeon on the output projections, and less in early layers."""

    name: ClassVar[str] = "slimgpt"
    paper: ClassVar[Paper | None] = Paper(
        "SlimGPT: Layer-wise Structured Pruning for Large Language Models (Ling et al., NeurIPS 2024)", "2412.18110"
    )
    takes_chunks: ClassVar[bool] = True
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")

    damping: float = Field(0.01, gt=0, description="added to the Gram matrix's diagonal, over the diagonal's mean")
    largest_batch: int = Field(1024, ge=1, description="FFN neurons that go at once at most")
    smallest_batch: int = Field(64, ge=1, description="FFN neurons that go at once at least")
    first_layer: float = Field(0.0, ge=0, le=1, description="the first layer's sparsity over the mean; 1 is uniform")

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, (), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        sparsities = incremental_sparsities(target.decoder_sparsity, len(dense), self.first_layer)
        shapes = [with_fewer_groups(target, index, sparsity) for index, sparsity in enumerate(sparsities)]
        wanted = [1.0] * len(dense)
        for index, (whole, shape, sparsity) in enumerate(zip(dense, shapes, sparsities, strict=True)):
            if whole.ffn:
                budget = (1 - sparsity) * target.layer_amount(index, whole)
                wanted[index] = max(align, affordable_neurons(target, index, shape, budget))
        return Plan(fill_with_ffn(target, shapes, align, wanted))

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return of_parts(
            dense,
            attention=[Gram(ATTENDED)] if planned.attention != dense.attention else [],
            ffn=[Gram(NEURONS)] if planned.ffn != dense.ffn else [],
        )

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        layer, planned = given.layer, given.planned
        attention = layer.attention
        if attention and planned.attention != attention.shape:
            attention = self._prune_groups(attention, planned.attention.kv_heads, given.statistics)
        return prune_each(given, attention, self._prune_ffn)

    def _prune_groups(self, attention: Attention, keep: int, statistics: LayerStatistics) -> Attention:
        gram, output = statistics.gram(ATTENDED), attention.output
        groups, weight = eliminate(output.weight, gram, keep, self.damping, width=len(gram) // attention.kv_heads)
        pruned = keep_heads(attention, heads_of_groups(groups, attention.shape.heads_per_group))
        return replace(pruned, output=Linear(weight, output.bias))

    def _prune_ffn(self, given: LayerToPrune) -> FeedForward:
        ffn = given.layer.ffn
        neurons, weight = eliminate(
            ffn.down.weight,
            given.statistics.gram(NEURONS),
            given.planned.ffn.width,
            self.damping,
            largest_batch=self.largest_batch,
            smallest_batch=self.smallest_batch,
        )
        return replace(keep_neurons(ffn, neurons), down=Linear(weight, ffn.down.bias))

    # ---------------------------------------------------------------- what it takes


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
