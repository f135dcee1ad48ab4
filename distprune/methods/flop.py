"""FLOP: structured pruning of large language models (Wang, Wohlwend & Lei, EMNLP 2020, arXiv 1910.04732).

A weight matrix W = PQ gets a diagonal of gates between its factors, P diag(z) Q. The gates are hard concrete variables,
and an augmented Lagrangian holds their expected size at the target while the loss is minimized; closed ones take a
column of P and a row of Q with them.

Query and key projections become such factors, of the rank at which they take as much as the projection, by a singular
value decomposition that knows the calibration set. The other matrices of a layer are pairs as they are. A KV group's
value and output projections are one; their common space is rotated to the axes of the decomposition of what they do
together. A feed-forward network's input and down projections are another, with the activation in between.

The weights stay as they are, where the paper trains them together with the gates, and what is learnt from is the dense
model's predictions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from distprune.budgets import Target, aligned, fill_with_ffn
from distprune.budgets.filling import neurons_amount
from distprune.gates import Gates, open_probability
from distprune.layers.parts import Attention, DecoderLayer, Linear, Projection
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape
from distprune.layers.sites import ATTENDED, ATTENTION_INPUT, ATTENTION_OUTPUT, FFN_OUTPUT, KEYS, NEURONS, QUERIES
from distprune.methods.base import LayerToPrune, Paper, Plan, Profile, of_parts
from distprune.methods.diagonals import (
    EXPERT_GATES,
    KEY,
    NEURON_GATES,
    QUERY,
    SHARED_GATES,
    VALUES,
    break_even_rank,
    column_gradients,
    factored,
    keep_ranks,
    named_by_network,
    neuron_gates,
    rank_gradients,
    with_gated_experts,
    with_gated_neurons,
    with_gated_ranks,
    with_gated_values,
)
from distprune.methods.gated import GatedMethod
from distprune.methods.networks import each_network, prune_each
from distprune.methods.scored_units import keep_best_profiled
from distprune.methods.units import keep_values, output_slices, rotate_values
from distprune.solvers import leading_outputs, most_important, output_aware_rotation
from distprune.statistics import Cross, Gram, HeadGram, LayerStatistics, Moment

#: log α of every gate at the beginning: that of a gate whose mean is 0.9 before it is stretched.
START = math.log(0.9 / 0.1)
#: The least width that a layer asks for: what is shared out in proportion can't be nothing.
TINY = 1e-3
#: What turns every KV group's values, (g, v, v), and what is behind a factored projection's name for its left factor.
ROTATION, LEFT = "rotation", ".left"
#: The factored projections, with the sites of their outputs and the fields of their ranks.
FACTORED = {QUERY: (QUERIES, "query_rank"), KEY: (KEYS, "key_rank")}


class Flop(GatedMethod):
    """Removes ranks of queries and keys, rotated values and neurons whose gates have learnt to close."""

    name: ClassVar[str] = "flop"
    paper: ClassVar[Paper | None] = Paper(
        "Structured Pruning of Large Language Models (Wang, Wohlwend & Lei, EMNLP 2020)", "1910.04732"
    )
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")
    removes: ClassVar[tuple[str, ...]] = ("values", "factors", "neurons")

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        if shape.attention is None or shape.attention.is_factored:
            return ()
        return HeadGram(ATTENDED, shape.attention.query_heads), Gram(ATTENTION_INPUT)

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The gates as they begin, the rotation of the values, and the left factors of queries and keys."""
        attention, profile = layer.attention, {**self.even_profile(layer.shape)}
        if VALUES not in profile:
            return profile
        values = statistics.head_gram(ATTENDED, attention.query_heads)
        by_group = values.unflatten(0, (attention.kv_heads, -1)).mean(dim=1)
        profile[ROTATION], _ = output_aware_rotation(output_slices(attention), by_group)
        for name in FACTORED:
            projection = getattr(attention, name)
            rank = break_even_rank(projection)
            profile[name + LEFT] = leading_outputs(projection.weight, statistics.gram(ATTENTION_INPUT), rank)
            profile[name] = torch.full((rank,), START)
        return profile

    def even_profile(self, shape: LayerShape) -> Profile:
        """The gates as they begin; one stands for all ranks, whose number no shape tells."""
        return {name: torch.full(size, START) for name, size in gate_sizes(shape).items()}

    def profile_bytes(self, hidden_size: int, shape: LayerShape) -> int:
        attention = shape.attention
        if attention is None or attention.is_factored:
            return 0
        widths = [heads * attention.query_key_dim for heads in (attention.query_heads, attention.kv_heads)]
        return sum(4 * width * (width * hidden_size // (width + hidden_size)) for width in widths)

    # ---------------------------------------------------------------- the gates

    def gate_amounts(self, target: Target, index: int) -> Mapping[str, float]:
        shape, removable = target.dense_shape(index), target.removable(index)
        amounts: dict[str, float] = {}
        if removable.factors:
            amounts |= {name: ranks_amount(target, index, name) for name in FACTORED}
        if removable.values:
            dense = shape.attention
            wider = replace(dense, value_dim=dense.value_dim + 1)
            value = target.attention_amount(index, wider) - target.attention_amount(index, dense)
            amounts[VALUES] = value * dense.value_dim
        if removable.neurons:
            whole = neurons_amount(target, index, shape, 1) * shape.ffn.width
            amounts |= {name: whole * share for name, share in shares_of_networks(shape.ffn).items()}
        return amounts

    def with_diagonals(self, layer: DecoderLayer, profile: Profile, names: Collection[str]) -> DecoderLayer:
        attention = layer.attention
        if VALUES in names:
            attention = rotate_values(attention, profile[ROTATION])
        for name in factors_among(names):
            attention = replace(attention, **{name: factored(getattr(attention, name), profile[name + LEFT])})
        return replace(layer, attention=attention)

    def gated(self, layer: DecoderLayer, gates: Gates) -> DecoderLayer:
        attention, ffn = layer.attention, layer.ffn
        for name in factors_among(gates):
            attention = replace(attention, **{name: with_gated_ranks(getattr(attention, name), gates[name])})
        if VALUES in gates:
            attention = with_gated_values(attention, gates[VALUES])
        if NEURON_GATES in gates:
            ffn = with_gated_neurons(ffn, gates[NEURON_GATES])
        if EXPERT_GATES in gates:
            ffn = with_gated_experts(ffn, gates[EXPERT_GATES])
        if SHARED_GATES in gates:
            ffn = replace(ffn, shared=with_gated_neurons(ffn.shared, gates[SHARED_GATES]))
        return replace(layer, attention=attention, ffn=ffn)

    def gate_moments(self, shape: LayerShape, names: Collection[str]) -> Sequence[Moment]:
        factors = [Cross(site.gradient, ATTENTION_INPUT) for name, (site, _) in FACTORED.items() if name in names]
        values = [Cross(ATTENTION_OUTPUT.gradient, ATTENDED)] if VALUES in names else []
        has_neurons = not {NEURON_GATES, EXPERT_GATES}.isdisjoint(names)
        neurons = [Cross(FFN_OUTPUT.gradient, NEURONS)] if has_neurons else []
        return of_parts(shape, attention=[*factors, *values], ffn=neurons)

    def gate_gradients(self, layer: DecoderLayer, statistics: LayerStatistics, names: Collection[str]) -> Gates:
        """A gate's gradient is that of the weights in its column, times these."""
        attention, ffn = layer.attention, layer.ffn
        gradients: dict[str, Tensor] = {}
        for name in factors_among(names):
            site, _ = FACTORED[name]
            gradients[name] = rank_gradients(getattr(attention, name), statistics, site, ATTENTION_INPUT)
        if VALUES in names:
            columns = column_gradients(attention.output.weight, statistics, ATTENTION_OUTPUT, ATTENDED)
            gradients[VALUES] = columns.unflatten(0, (attention.kv_heads, -1, attention.shape.value_dim)).sum(dim=1)
        if not {NEURON_GATES, EXPERT_GATES}.isdisjoint(names):
            columns = [
                column_gradients(network.down.weight, own, FFN_OUTPUT, NEURONS)
                for network, own in each_network(ffn, statistics)
            ]
            gradients |= named_by_network(ffn, columns)
        return {name: gradients[name] for name in names}

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, [self.even_profile(shape) for shape in target.dense_shapes], align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        """Of every layer what its gates expect to stay open, all of them times what makes the whole meet the target."""
        shapes = target.dense_shapes
        if target.sparsity == 0:
            return Plan(shapes)
        amounts = [self.gate_amounts(target, index) for index in range(len(shapes))]
        opened = [
            {name: open_probability(profile[name].double()).mean().item() for name in of_layer}
            for profile, of_layer in zip(profiles, amounts, strict=True)
        ]
        scale, wanted = left_for_gates(target, amounts, opened), []
        for index, (shape, layer) in enumerate(zip(shapes, opened, strict=True)):
            if VALUES in layer:
                dense = shape.attention.value_dim
                shape = shape.with_attention(value_dim=aligned(scale * layer[VALUES] * dense, align, most=dense))
            for name in factors_among(layer):
                _, field = FACTORED[name]
                shape = shape.with_attention(**{field: planned_rank(target, index, name, scale * layer[name], align)})
            shapes[index] = shape
            neurons = [layer[name] for name in neuron_gates(shape.ffn) if name in layer]
            wanted.append(max(TINY, shape.ffn.width * neurons[0]) if neurons else 1.0)
        return Plan(fill_with_ffn(target, shapes, align, wanted))

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        attention, planned = given.layer.attention, given.planned.attention
        if attention is not None and planned != attention.shape:
            attention = self._prune_attention(attention, planned, given.profile)
        return prune_each(given, attention, keep_best_profiled)

    def _prune_attention(self, attention: Attention, planned: AttentionShape, profile: Profile) -> Attention:
        if planned.value_dim < attention.shape.value_dim:
            turned = rotate_values(attention, profile[ROTATION])
            attention = keep_values(turned, most_important(profile[VALUES], planned.value_dim))
        projections = {
            name: with_best_ranks(getattr(attention, name), getattr(planned, field), profile, name)
            for name, (_, field) in FACTORED.items()
        }
        return replace(attention, **projections)


def with_best_ranks(projection: Linear, rank: int | None, profile: Profile, name: str) -> Projection:
    """Two factors of that rank, of the gates that are most open; or the projection as it is, where it has none."""
    if rank is None:
        return projection
    return keep_ranks(factored(projection, profile[name + LEFT]), most_important(profile[name], rank))


# ---------------------------------------------------------------- what gates there are, and what they take


def factors_among(names: Collection[str]) -> list[str]:
    """The factored projections among what gates are called."""
    return [name for name in FACTORED if name in names]


def gate_sizes(shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """The gates of a dense layer by name, and how they are laid out; as if factors had one rank."""
    sizes: dict[str, tuple[int, ...]] = {}
    if shape.attention is not None and not shape.attention.is_factored:
        sizes = {name: (1,) for name in FACTORED}
        sizes[VALUES] = shape.attention.kv_heads, shape.attention.value_dim
    if isinstance(shape.ffn, ExpertsShape):
        sizes[EXPERT_GATES] = shape.ffn.count, shape.ffn.width
        if shape.ffn.shared is not None:
            sizes[SHARED_GATES] = (shape.ffn.shared.width,)
    elif shape.ffn is not None:
        sizes[NEURON_GATES] = (shape.ffn.width,)
    return sizes


def shares_of_networks(shape: FeedForwardShape | ExpertsShape) -> dict[str, float]:
    """Of what all networks of a layer lose when their width falls, the share that is behind the gates of each name."""
    if not isinstance(shape, ExpertsShape):
        return {NEURON_GATES: 1.0}
    experts = shape.count / (shape.count + (shape.shared_count or 0))
    return {EXPERT_GATES: experts, SHARED_GATES: 1 - experts} if shape.shared_count else {EXPERT_GATES: 1.0}


def rank_amount(target: Target, index: int, name: str) -> tuple[int, int]:
    """What of the target's resource a rank of a factored projection takes, and what the whole projection does."""
    dense, (_, field) = target.dense_shape(index).attention, FACTORED[name]
    one, two = (target.attention_amount(index, replace(dense, **{field: rank})) for rank in (1, 2))
    return two - one, target.attention_amount(index, dense) - one + (two - one)


def ranks_amount(target: Target, index: int, name: str) -> int:
    """What all ranks of a factored projection take together: nearly as much as the projection."""
    each, whole = rank_amount(target, index, name)
    return whole // each * each


def planned_rank(target: Target, index: int, name: str, share: float, align: int) -> int | None:
    """The rank of a projection of which that share of the gates stay open; None where it takes less as it is."""
    each, whole = rank_amount(target, index, name)
    rank = max(align, round(share * (whole // each) / align) * align)
    return rank if rank * each < whole else None


def left_for_gates(
    target: Target, amounts: Sequence[Mapping[str, float]], opened: Sequence[Mapping[str, float]]
) -> float:
    """What the target leaves for what is behind gates, over what is expected to stay of it.

    Args:
        amounts: of every layer, what is behind the gates of each name.
        opened: the share of these that are expected to be open.
    """
    expected = sum(
        amount * layer[name] for own, layer in zip(amounts, opened, strict=True) for name, amount in own.items()
    )
    beside = target.dense - sum(sum(own.values()) for own in amounts)
    return max(0.0, target.remaining - beside) / max(1.0, expected)
