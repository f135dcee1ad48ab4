"""FLOP: structured pruning of large language models (Wang, Wohlwend & Lei, EMNLP 2020, arXiv 1910.04732).

A weight matrix W = PQ gets a diagonal of gates between its factors, P diag(z) Q. The gates are hard concrete variables,
and an augmented Lagrangian holds their expected size at the target while the loss is minimized; closed ones take a
column of P and a row of Q with them.

Here the factors are pairs of matrices that a layer has anyway, so that none is stored as two where one was. A KV
group's value and output projections are such a pair; their common space is first rotated, so that its axes are those of
the singular value decomposition of what they do to the calibration set. A feed-forward network's input and down
projections are another, whose diagonal stands behind the activation: its gates are neurons. The paper names both places
as ones where gates may be.

The weights stay as they are, where the paper trains them together with the gates, and what is learnt from is the dense
model's predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from distprune.budgets import Target, aligned, fill_with_ffn
from distprune.budgets.filling import neurons_amount
from distprune.gates import Gates, open_probability
from distprune.layers.parts import Attention, DecoderLayer, Experts, FeedForward, Linear
from distprune.layers.shapes import ExpertsShape, FeedForwardShape, LayerShape
from distprune.layers.sites import ATTENDED, ATTENTION_OUTPUT, FFN_OUTPUT, NEURONS, Site
from distprune.methods.base import LayerToPrune, Paper, Plan, Profile, of_parts
from distprune.methods.gated import GatedMethod
from distprune.methods.networks import OF_EXPERTS, OF_SHARED, each_network, prune_each
from distprune.methods.scored_units import keep_best_profiled
from distprune.methods.units import keep_values, output_slices, rotate_values
from distprune.solvers import most_important, output_aware_rotation
from distprune.statistics import Cross, HeadGram, LayerStatistics, Moment

#: log α of every gate at the beginning: that of a gate whose mean is 0.9 before it is stretched.
START = math.log(0.9 / 0.1)
#: The least width that a layer asks for: what is shared out in proportion can't be nothing.
TINY = 1e-3
#: The gates between values and output projection, (g, v), and those of neurons, (f,).
VALUES, OF_NEURONS = "values", "neurons"
#: What turns every KV group's values, (g, v, v).
ROTATION = "rotation"


class Flop(GatedMethod):
    """Removes rotated values and neurons whose gates have learnt to close."""

    name: ClassVar[str] = "flop"
    paper: ClassVar[Paper | None] = Paper(
        "Structured Pruning of Large Language Models (Wang, Wohlwend & Lei, EMNLP 2020)", "1910.04732"
    )
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")
    removes: ClassVar[tuple[str, ...]] = ("values", "neurons")

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return of_parts(shape, attention=[HeadGram(ATTENDED, shape.attention.query_heads)] if shape.attention else [])

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The gates as they begin, and the rotation of the values."""
        attention, profile = layer.attention, self.even_profile(layer.shape)
        if VALUES not in profile:
            return profile
        values = statistics.head_gram(ATTENDED, attention.query_heads)
        by_group = values.unflatten(0, (attention.kv_heads, -1)).mean(dim=1)
        rotation, _ = output_aware_rotation(output_slices(attention), by_group)
        return {**profile, ROTATION: rotation}

    def even_profile(self, shape: LayerShape) -> Profile:
        return {name: torch.full(size, START) for name, size in gate_sizes(shape).items()}

    # ---------------------------------------------------------------- the gates

    def gate_amounts(self, target: Target, index: int) -> Mapping[str, float]:
        shape, removable = target.dense_shape(index), target.removable(index)
        amounts: dict[str, float] = {}
        if removable.values:
            attention = shape.attention
            wider = replace(attention, value_dim=attention.value_dim + 1)
            value = target.attention_amount(index, wider) - target.attention_amount(index, attention)
            amounts[VALUES] = value / attention.kv_heads
        if removable.neurons:
            # One neuron of each network of a mixture, where these can't differ in width.
            one = neurons_amount(target, index, shape, 1) / networks_of_one_width(shape.ffn)
            amounts |= dict.fromkeys(neuron_gates(shape.ffn), one)
        return amounts

    def with_diagonals(self, layer: DecoderLayer, profile: Profile) -> DecoderLayer:
        if ROTATION not in profile:
            return layer
        return replace(layer, attention=rotate_values(layer.attention, profile[ROTATION]))

    def gated(self, layer: DecoderLayer, gates: Gates) -> DecoderLayer:
        attention, ffn = layer.attention, layer.ffn
        if VALUES in gates:
            attention = with_gated_values(attention, gates[VALUES])
        if OF_NEURONS in gates:
            ffn = with_gated_neurons(ffn, gates[OF_NEURONS])
        if OF_EXPERTS + OF_NEURONS in gates:
            ffn = replace(ffn, down=ffn.down.float() * gates[OF_EXPERTS + OF_NEURONS][:, None])
        if OF_SHARED + OF_NEURONS in gates:
            ffn = replace(ffn, shared=with_gated_neurons(ffn.shared, gates[OF_SHARED + OF_NEURONS]))
        return replace(layer, attention=attention, ffn=ffn)

    def gate_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return of_parts(
            shape,
            attention=[Cross(ATTENTION_OUTPUT.gradient, ATTENDED)],
            ffn=[Cross(FFN_OUTPUT.gradient, NEURONS)],
        )

    def gate_gradients(self, layer: DecoderLayer, statistics: LayerStatistics) -> Gates:
        """A gate's gradient is that of the weights in its column, times these."""
        attention, ffn = layer.attention, layer.ffn
        gradients: dict[str, Tensor] = {}
        if VALUES in gate_sizes(layer.shape):
            columns = column_gradients(attention.output.weight, statistics, ATTENTION_OUTPUT, ATTENDED)
            gradients[VALUES] = columns.unflatten(0, (attention.kv_heads, -1, attention.shape.value_dim)).sum(dim=1)
        if ffn is not None:
            columns = [
                column_gradients(network.down.weight, own, FFN_OUTPUT, NEURONS)
                for network, own in each_network(ffn, statistics)
            ]
            gradients |= named_by_network(ffn, columns)
        return gradients

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
            {name: open_probability(profile[name].double()) for name in of_layer}
            for profile, of_layer in zip(profiles, amounts, strict=True)
        ]
        scale = self._scale(target, amounts, opened)
        wanted = []
        for index, (shape, layer) in enumerate(zip(shapes, opened, strict=True)):
            if VALUES in layer:
                dense = shape.attention.value_dim
                kept = scale * layer[VALUES].sum(dim=1).mean().item()
                shapes[index] = shape.with_attention(value_dim=aligned(kept, align, most=dense))
            neurons = [layer[name].mean().item() for name in neuron_gates(shape.ffn) if name in layer]
            wanted.append(max(TINY, shape.ffn.width * neurons[0]) if neurons else 1.0)
        return Plan(fill_with_ffn(target, shapes, align, wanted))

    def _scale(
        self, target: Target, amounts: Sequence[Mapping[str, float]], opened: Sequence[Mapping[str, Tensor]]
    ) -> float:
        """What is left for gates of the target, over what open ones are expected to take."""
        gates = [
            (amount, layer[name])
            for of_layer, layer in zip(amounts, opened, strict=True)
            for name, amount in of_layer.items()
        ]
        expected = sum(amount * each.sum().item() for amount, each in gates)
        beside = target.dense - sum(amount * each.numel() for amount, each in gates)
        return max(0.0, target.remaining - beside) / max(1.0, expected)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        attention, planned = given.layer.attention, given.planned.attention
        if attention is not None and planned != attention.shape:
            turned = self.with_diagonals(given.layer, given.profile).attention
            attention = keep_values(turned, most_important(given.profile[VALUES], planned.value_dim))
        return prune_each(given, attention, keep_best_profiled)


# ---------------------------------------------------------------- what gates there are


def gate_sizes(shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """The gates of a dense layer by name, and how they are laid out."""
    sizes: dict[str, tuple[int, ...]] = {}
    if shape.attention is not None and not shape.attention.is_factored:
        sizes[VALUES] = shape.attention.kv_heads, shape.attention.value_dim
    if isinstance(shape.ffn, ExpertsShape):
        sizes[OF_EXPERTS + OF_NEURONS] = shape.ffn.count, shape.ffn.width
        if shape.ffn.shared is not None:
            sizes[OF_SHARED + OF_NEURONS] = (shape.ffn.shared.width,)
    elif shape.ffn is not None:
        sizes[OF_NEURONS] = (shape.ffn.width,)
    return sizes


def neuron_gates(shape: FeedForwardShape | ExpertsShape | None) -> list[str]:
    """The names of the gates of neurons that may go: of a network, or of all experts and what narrows with them."""
    if not isinstance(shape, ExpertsShape):
        return [] if shape is None else [OF_NEURONS]
    return [OF_EXPERTS + OF_NEURONS, OF_SHARED + OF_NEURONS] if shape.shared_count else [OF_EXPERTS + OF_NEURONS]


def networks_of_one_width(shape: FeedForwardShape | ExpertsShape) -> int:
    """How many networks of a layer lose a neuron when its width falls by one."""
    return shape.count + (shape.shared_count or 0) if isinstance(shape, ExpertsShape) else 1


def named_by_network(ffn: FeedForward | Experts, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """What was found of each network, in their order, by the names of its gates."""
    if isinstance(ffn, FeedForward):
        return {OF_NEURONS: values[0]}
    named = {OF_EXPERTS + OF_NEURONS: torch.stack([*values[: ffn.shape.count]])}
    return named if ffn.shared is None else {**named, OF_SHARED + OF_NEURONS: values[-1]}


# ---------------------------------------------------------------- gates in a layer


def with_gated_values(attention: Attention, gates: Tensor) -> Attention:
    """Attention whose output projection reads every value times its gate, (g, v)."""
    columns = gates.repeat_interleave(attention.shape.heads_per_group, dim=0).flatten()
    return replace(attention, output=with_scaled_columns(attention.output, columns))


def with_gated_neurons(ffn: FeedForward, gates: Tensor) -> FeedForward:
    """A network whose down projection reads every neuron times its gate, (f,)."""
    return replace(ffn, down=with_scaled_columns(ffn.down, gates))


def with_scaled_columns(linear: Linear, scales: Tensor) -> Linear:
    """The linear map of its input times ``scales``, (in,), in float32."""
    return replace(linear, weight=linear.weight.float() * scales)


def column_gradients(weight: Tensor, statistics: LayerStatistics, output: Site, given: Site) -> Tensor:
    """The loss's gradient in a scale of every column of a weight, (in,), summed over the tokens."""
    gradients = weight.float() * statistics.cross(output.gradient, given)
    return gradients.sum(dim=0) * statistics.tokens(given)
