"""What methods share that score units by the loss's gradients of their weights.

Units are whole KV groups of attention and neurons of the FFN, or of each expert of a mixture. A unit is worth the sum
over all weights that go together: its rows of the projections before it, and its columns of the one behind it. Units
are compared within their layer; the first and last layers stay whole, the others all lose as much, and nothing is
repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
from distprune.methods.base import LayerToPrune, Method, Plan, Profile, of_parts
from distprune.methods.even_layers import with_fewer_groups
from distprune.methods.networks import profile_each, prune_each
from distprune.methods.scored_units import keep_best_groups, keep_best_profiled
from distprune.methods.units import sum_by_unit
from distprune.statistics import Cross, LayerStatistics, Moment

# Beside any other layer's, the width that a spared layer asks for.
ALL = 1e9


class GradientUnits(Method):
    """A method that is the score of a single weight, by the gradient of the whole calibration set."""

    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")

    first_layers: float = Field(1 / 8, ge=0, le=1, description="share of the layers, from the first, that stay whole")
    last_layers: float = Field(1 / 16, ge=0, le=1, description="share of the layers, to the last, that stay whole")

    # ---------------------------------------------------------------- the gradient pass

    def input_moments(self, given: Site) -> Sequence[Moment]:
        """Moments of a projection's input that its weights' scores need beside their gradients."""
        return ()

    def score_weights(self, projection: Linear, statistics: LayerStatistics, output: Site, given: Site) -> Tensor:
        """What each weight of the projection is worth, (out, in), in a tensor of its own."""
        return weight_changes(projection, statistics, output, given)

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        attention = [(QUERIES, ATTENTION_INPUT), (KEYS, ATTENTION_INPUT), (VALUES, ATTENTION_INPUT)]
        gate = [(GATE, FFN_INPUT)] if shape.ffn and shape.ffn.is_gated else []
        return of_parts(
            shape,
            attention=self._projection_moments([*attention, (ATTENTION_OUTPUT, ATTENDED)]),
            ffn=self._projection_moments([*gate, (UP, FFN_INPUT), (FFN_OUTPUT, NEURONS)]),
        )

    def _projection_moments(self, projections: Sequence[tuple[Site, Site]]) -> list[Moment]:
        gradients = [Cross(output.gradient, given) for output, given in projections]
        inputs = dict.fromkeys(given for _, given in projections)
        return [*gradients, *(moment for given in inputs for moment in self.input_moments(given))]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """What the layer's KV groups are worth, (g,), and its neurons, (f,)."""
        profile = {}
        attention = layer.attention
        if attention and not attention.shape.is_factored:
            scores = partial(self.score_weights, statistics=statistics)
            channels = (
                scores(attention.query, output=QUERIES, given=ATTENTION_INPUT).sum(dim=1),
                scores(attention.key, output=KEYS, given=ATTENTION_INPUT).sum(dim=1),
                scores(attention.value, output=VALUES, given=ATTENTION_INPUT).sum(dim=1),
                scores(attention.output, output=ATTENTION_OUTPUT, given=ATTENDED).sum(dim=0),
            )
            profile["groups"] = sum(sum_by_unit(each, attention.kv_heads) for each in channels)
        return profile | (profile_each(layer.ffn, statistics, self._profile_ffn) if layer.ffn else {})

    def _profile_ffn(self, ffn: FeedForward, statistics: LayerStatistics) -> Profile:
        outputs = (UP,) if ffn.gate is None else (GATE, UP)
        rows = [
            self.score_weights(projection, statistics, output, FFN_INPUT).sum(dim=1)
            for projection, output in zip(ffn.inputs, outputs, strict=True)
        ]
        return {"neurons": sum(rows) + self.score_weights(ffn.down, statistics, FFN_OUTPUT, NEURONS).sum(dim=0)}

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


def weight_changes(projection: Linear, statistics: LayerStatistics, output: Site, given: Site) -> Tensor:
    """|w·∂L/∂w| of every weight, (out, in): how much the loss would change without it, to first order.

    L is the loss of the whole calibration set, summed over its tokens.
    """
    changes = projection.weight.float() * statistics.cross(output.gradient, given)
    return changes.abs_().mul_(max(1, statistics.tokens(given)))
