"""LLM-Pruner: on the structural pruning of large language models (Ma et al., NeurIPS 2023).

What a unit is worth is how much the loss would change without it, to first order and weight by weight: the sum of
|w·∂L/∂w| over all weights that go together ("element-wise", with the gradient of the whole calibration set). Units are
compared within their layer; the first and last layers stay whole, and the others all lose as much. Heads leave by whole
KV groups, where the paper's models have one to a head.

Left out: the variants of the importance (a vector's, the diagonal Fisher's), and the fine-tuning that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from distprune.budgets import Target, fill_with_ffn
from distprune.errors import InputError
from distprune.layers.parts import DecoderLayer, FeedForward, Linear
from distprune.layers.shapes import LayerShape
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    GATE,
    KEYS,
    NEURONS,
    QUERIES,
    UP,
    VALUES,
    Site,
)
from distprune.methods.base import LayerToPrune, Method, Paper, Plan, Profile, of_parts
from distprune.methods.even_layers import with_fewer_groups
from distprune.methods.networks import profile_each, prune_each
from distprune.methods.scored_units import keep_best_groups, keep_best_profiled
from distprune.methods.units import sum_by_unit
from distprune.statistics import Cross, LayerStatistics, Moment

# Beside any other layer's, the width that a spared layer asks for.
ALL = 1e9


class LLMPruner(Method):
    """Removes the units without which the loss would change least, to first order."""

    name: ClassVar[str] = "llm-pruner"
    paper: ClassVar[Paper | None] = Paper(
        "LLM-Pruner: On the Structural Pruning of Large Language Models (Ma et al., NeurIPS 2023)", "2305.11627"
    )
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")

    first_layers: float = Field(1 / 8, ge=0, le=1, description="share of the layers, from the first, that stay whole")
    last_layers: float = Field(1 / 16, ge=0, le=1, description="share of the layers, to the last, that stay whole")

    # ---------------------------------------------------------------- the gradient pass

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        attention = [(QUERIES, ATTENTION_INPUT), (KEYS, ATTENTION_INPUT), (VALUES, ATTENTION_INPUT)]
        ffn = [(GATE, FFN_INPUT)] if shape.ffn and shape.ffn.is_gated else []
        return of_parts(
            shape,
            attention=[weight_gradient(*sites) for sites in (*attention, (ATTENTION_OUTPUT, ATTENDED))],
            ffn=[weight_gradient(*sites) for sites in (*ffn, (UP, FFN_INPUT), (FFN_OUTPUT, NEURONS))],
        )

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The importance of the layer's KV groups, (g,), and of its neurons, (f,)."""
        profile = {}
        attention = layer.attention
        if attention and not attention.shape.is_factored:
            channels = (
                importance(attention.query, statistics, QUERIES, ATTENTION_INPUT, 1),
                importance(attention.key, statistics, KEYS, ATTENTION_INPUT, 1),
                importance(attention.value, statistics, VALUES, ATTENTION_INPUT, 1),
                importance(attention.output, statistics, ATTENTION_OUTPUT, ATTENDED, 0),
            )
            profile["groups"] = sum(sum_by_unit(each, attention.kv_heads) for each in channels)
        return profile | (profile_each(layer.ffn, statistics, profile_ffn) if layer.ffn else {})

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, (), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        first, last = (round(share * len(dense)) for share in (self.first_layers, self.last_layers))
        pruned = range(first, len(dense) - last)
        sparsity = target.decoder_sparsity * len(dense) / max(1, len(pruned))
        shapes = [
            with_fewer_groups(target, index, sparsity) if index in pruned else dense[index]
            for index in range(len(dense))
        ]
        widths = [shape.ffn.width if shape.ffn else 1 for shape in dense]
        wanted = [float(width) if index in pruned else ALL for index, width in enumerate(widths)]
        planned = fill_with_ffn(target, shapes, align, wanted)
        if any(planned[index] != dense[index] for index in range(len(dense)) if index not in pruned):
            raise InputError(
                f"sparsity {target.sparsity:g} can't be reached: the layers that stay whole (options first_layers and "
                "last_layers) leave too few others. Ask for a lower --sparsity, or let fewer layers stay whole."
            )
        return Plan(planned)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        layer, planned = given.layer, given.planned
        attention = layer.attention
        if attention and planned.attention != attention.shape:
            attention = keep_best_groups(attention, planned.attention, given.profile["groups"])
        return prune_each(given, attention, keep_best_profiled)


def profile_ffn(ffn: FeedForward, statistics: LayerStatistics) -> Profile:
    outputs = (UP,) if ffn.gate is None else (GATE, UP)
    rows = [importance(each, statistics, site, FFN_INPUT, 1) for each, site in zip(ffn.inputs, outputs, strict=True)]
    return {"neurons": sum(rows) + importance(ffn.down, statistics, FFN_OUTPUT, NEURONS, 0)}


def importance(projection: Linear, statistics: LayerStatistics, output: Site, given: Site, along: int) -> Tensor:
    """Sums of |w·∂L/∂w| over a projection's inputs (1), or its outputs (0)."""
    changes = projection.weight.float() * statistics.cross(output.gradient, given)
    return changes.abs_().sum(dim=along).mul_(max(1, statistics.tokens(given)))


def weight_gradient(output: Site, given: Site) -> Cross:
    """The loss's gradient of a weight, from the gradient at the projection's output and from its input."""
    return Cross(output.gradient, given)
