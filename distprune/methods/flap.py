"""FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models (An et al., AAAI 2024).

What a steady channel adds to a projection's output, a bias can add. So a channel is worth how much it fluctuates, one
threshold over the whole model says how much every layer's attention and FFN lose, and biases make up for the means of
what goes. The paper treats multi-head attention; here the query heads of a KV group go together. A mixture's experts
get no biases: their classes have none.

The projections are attention's output projection, whose input channels are the heads' values, and the FFN's down
projection, whose input channels are its neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import Target, fill_with_ffn, neurons_amount
from distprune.errors import InputError
from distprune.layers.parts import Attention, DecoderLayer, FeedForward, Linear
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape
from distprune.layers.sites import ATTENDED, NEURONS, Site
from distprune.methods.base import LayerToPrune, Method, Paper, Plan, Profile, of_parts
from distprune.methods.even_layers import with_heads
from distprune.methods.networks import profile_each, prune_each
from distprune.methods.scored_units import keep_best_profiled
from distprune.methods.units import column_energy, heads_of_groups, keep_heads, sum_by_unit
from distprune.solvers import channels_of, most_important
from distprune.statistics import LayerStatistics, Mean, Moment, Power


class Flap(Method):
    """Removes the units that fluctuate least, and makes up for their means by biases.

    In the layout ``heterogeneous`` biases can't be added: there it needs a family that has them, or
    ``compensation=false``.
    """

    name: ClassVar[str] = "flap"
    paper: ClassVar[Paper | None] = Paper(
        "FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models (An et al., AAAI 2024)",
        "2312.11983",
    )
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")

    compensation: bool = Field(True, description="biases make up for the means of what was removed")

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return of_parts(shape, attention=[Mean(ATTENDED), Power(ATTENDED)], ffn=[Mean(NEURONS), Power(NEURONS)])

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The scores of the layer's KV groups, (g,), each the mean of its channels', and of its neurons, (f,)."""
        profile = {}
        if attention := layer.attention:
            # Squared before they are standardized, and neurons are not, as in the published code.
            channels = standardized(fluctuation(attention.output, statistics, ATTENDED).square())
            groups = attention.kv_heads
            profile["groups"] = sum_by_unit(channels, groups) / (len(channels) // groups)
        return profile | (profile_each(layer.ffn, statistics, profile_ffn) if layer.ffn else {})

    def even_profile(self, shape: LayerShape) -> Profile:
        """Scores standardized over channels: a group's, a mean of many, are nearer to zero than a neuron's."""
        groups = {"groups": torch.linspace(-0.5, 0.5, shape.attention.kv_heads)} if shape.attention else {}
        return groups | ({"neurons": torch.linspace(-1.7, 1.7, shape.ffn.width)} if shape.ffn else {})

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        narrowest = [self._with_units(target, index, Units(1, align)) for index in range(target.model.num_layers)]
        if target.layout == "heterogeneous" and any(map(has_more_biases, narrowest, target.dense_shapes)):
            raise InputError(
                "--layout heterogeneous: method flap adds biases, which that layout can't have. Give --option "
                "compensation=false or --layout free."
            )
        fill_with_ffn(target, narrowest, align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        scores = [self._scores(target, index, profile, align) for index, profile in enumerate(profiles)]
        for threshold in self._thresholds(target, scores):
            kept = [Units(*(int((module >= threshold).sum()) for module in layer)) for layer in scores]
            shapes = [self._with_units(target, index, units) for index, units in enumerate(kept)]
            narrowest = [self._with_units(target, i, Units(units.groups, align)) for i, units in enumerate(kept)]
            if target.amount(narrowest) <= target.remaining:
                break  # else the group at the threshold goes too: neurons can't make up for it
        return Plan(fill_with_ffn(target, shapes, align, [float(max(align, units.neurons)) for units in kept]))

    def _scores(self, target: Target, index: int, profile: Profile, align: int) -> tuple[Tensor, Tensor]:
        """The scores of a layer's groups and neurons, in so far as they may go; some are spared."""
        removable, none = target.removable(index), torch.empty(0)
        groups = spared(profile["groups"], 1) if removable.heads else none
        return groups, spared(profile["neurons"], align) if removable.neurons else none

    def _thresholds(self, target: Target, scores: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The scores of the units that may stay, ascending: as many of the lowest are gone as the target asks for."""
        costs = [cost for index in range(len(scores)) for cost in unit_amounts(target, index)]
        modules = [module for layer in scores for module in layer]
        repeats = torch.tensor([len(module) for module in modules])
        ascending, order = torch.cat(modules).sort(stable=True)
        gone = torch.tensor(costs).repeat_interleave(repeats)[order].cumsum(0)
        whole = [self._with_biases(target, index) for index in range(len(scores))]
        excess = target.amount(whole) - target.remaining
        return ascending[int((gone <= excess).sum()) :]

    def _with_units(self, target: Target, index: int, kept: Units) -> LayerShape:
        """Dense layer ``index`` with so many groups and neurons, and the biases that make up for those that it lost."""
        shape, dense, removable = self._with_biases(target, index), target.dense_shape(index), target.removable(index)
        if removable.neurons:
            shape = shape.with_ffn(width=kept.neurons)
        if not removable.heads:
            return shape
        if kept.groups == dense.attention.kv_heads:
            return shape.with_attention(output_bias=dense.attention.output_bias)
        return with_heads(shape, kept.groups, dense.attention.heads_per_group)

    def _with_biases(self, target: Target, index: int) -> LayerShape:
        shape, removable = target.dense_shape(index), target.removable(index)
        if self.compensation and removable.heads:
            shape = shape.with_attention(output_bias=True)
        has_network = isinstance(shape.ffn, FeedForwardShape)
        return shape.with_ffn(down_bias=True) if self.compensation and removable.neurons and has_network else shape

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        if not self.compensation:
            return []
        has_network = isinstance(dense.ffn, FeedForwardShape)
        return of_parts(dense, attention=[Mean(ATTENDED)], ffn=[Mean(NEURONS)] if has_network else [])

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return self.pruning_moments(shape, shape)

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        layer, planned = given.layer, given.planned
        attention = layer.attention
        if attention and planned.attention != attention.shape:
            attention = self._prune_groups(attention, planned.attention, given)
        # Experts add their outputs times the router's weights, and have no biases to make up for anything.
        has_network = isinstance(layer.ffn, FeedForward)
        prune = self._prune_neurons if has_network and self.compensation else keep_best_profiled
        return prune_each(given, attention, prune)

    def _prune_groups(self, attention: Attention, planned: AttentionShape, given: LayerToPrune) -> Attention:
        groups = most_important(given.profile["groups"], planned.kv_heads)
        heads = heads_of_groups(groups, planned.heads_per_group)
        pruned = keep_heads(attention, heads)
        if not self.compensation:
            return pruned
        mean = given.statistics.mean(ATTENDED)
        bias = compensated_bias(attention.output, channels_of(heads, planned.value_dim), mean)
        return replace(pruned, output=replace(pruned.output, bias=bias))

    def _prune_neurons(self, given: LayerToPrune) -> FeedForward:
        ffn, pruned = given.layer.ffn, keep_best_profiled(given)
        neurons = most_important(given.profile["neurons"], given.planned.ffn.width)
        bias = compensated_bias(ffn.down, neurons, given.statistics.mean(NEURONS))
        return replace(pruned, down=replace(pruned.down, bias=bias))


class Units(NamedTuple):
    """How many of its units a layer keeps."""

    groups: int
    neurons: int


def profile_ffn(ffn: FeedForward, statistics: LayerStatistics) -> Profile:
    return {"neurons": standardized(fluctuation(ffn.down, statistics, NEURONS))}


def fluctuation(projection: Linear, statistics: LayerStatistics, site: Site) -> Tensor:
    """The metric WIFV: every input channel's variance, times the squared norm of its column of W, (in,)."""
    variance = (statistics.power(site) - statistics.mean(site).square()).clamp(min=0)
    return variance * column_energy(projection)


def standardized(scores: Tensor) -> Tensor:
    """The scores, (n,), at mean 0 and deviation 1, so that those of all layers and of both modules compare."""
    return (scores - scores.mean()) / scores.std().clamp(min=torch.finfo(scores.dtype).tiny)


def spared(scores: Tensor, least: int) -> Tensor:
    """The scores, with those of the ``least`` best units above any threshold."""
    return scores.index_fill(0, most_important(scores, least), torch.inf)


def compensated_bias(projection: Linear, kept: Tensor, mean: Tensor) -> Tensor:
    """The projection's bias, plus what the channels that are not ``kept`` give in the mean, (out,)."""
    lost = projection.weight.float() @ mean.index_fill(0, kept, 0.0)
    return lost if projection.bias is None else projection.bias + lost


def has_more_biases(shape: LayerShape, dense: LayerShape) -> bool:
    """Whether a pruned layer has a bias that the dense one has not."""
    added = shape.attention and shape.attention.output_bias > dense.attention.output_bias
    has_network = isinstance(shape.ffn, FeedForwardShape) and isinstance(dense.ffn, FeedForwardShape)
    return bool(added or (has_network and shape.ffn.down_bias > dense.ffn.down_bias))


def unit_amounts(target: Target, index: int) -> tuple[int, int]:
    """What one more KV group and one more neuron would take in layer ``index``; 0 of what it lacks."""
    shape, group, neuron = target.dense_shape(index), 0, 0
    if attention := shape.attention:
        wider = with_heads(shape, attention.kv_heads + 1, attention.heads_per_group)
        group = target.attention_amount(index, wider.attention) - target.attention_amount(index, attention)
    if shape.ffn:
        neuron = neurons_amount(target, index, shape, 1)
    return group, neuron
