"""FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models (An et al., AAAI 2024).

What a steady channel adds to a projection's output, a bias can add. So a channel is worth how much it fluctuates, one
threshold over the whole model says how much every layer's attention and FFN lose, and biases make up for the means of
what goes. The paper treats multi-head attention; here the query heads of a KV group go together.

The projections are attention's output projection, whose input channels are the heads' values, and the FFN's down
projection, whose input channels are its neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import Target, decoder_parameters, fill_with_ffn, layer_parameters
from distprune.decoder_layer import DecoderLayer, LayerShape, Linear
from distprune.methods.base import Method, Observe, Plan, Profile
from distprune.methods.units import (
    column_energy,
    heads_of_groups,
    keep_heads,
    keep_neurons,
    sum_by_unit,
    with_heads,
)
from distprune.modeling import PrunedConfig
from distprune.solvers import channels_of, most_important
from distprune.statistics import LayerStatistics, Mean, Moment, Power


class Flap(Method):
    name: ClassVar[str] = "flap"

    compensation: bool = Field(True, description="biases make up for the means of what was removed")

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return [moment(tap) for tap in ("attention_values", "ffn_neurons") for moment in (Mean, Power)]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The scores of the layer's KV groups, (g,), each the mean of its channels', and of its neurons, (f,)."""
        # Squared before they are standardized, and neurons are not, as in the published code.
        channels = standardized(fluctuation(layer.output, statistics, "attention_values").square())
        return {
            "groups": sum_by_unit(channels, layer.kv_heads) / (len(channels) // layer.kv_heads),
            "neurons": standardized(fluctuation(layer.down, statistics, "ffn_neurons")),
        }

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        fill_with_ffn(target, [self._with_groups(shape, 1) for shape in target.dense_shapes], align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        scores = [(spared(profile["groups"], 1), spared(profile["neurons"], align)) for profile in profiles]
        for threshold in self._thresholds(target, dense, scores):
            kept = [[int((module >= threshold).sum()) for module in layer] for layer in scores]
            shapes = [self._with_groups(shape, groups) for shape, (groups, _) in zip(dense, kept, strict=True)]
            narrowest = [replace(shape, ffn_width=align) for shape in shapes]
            if decoder_parameters(target.config, narrowest) <= target.remaining:
                break  # else the group at the threshold goes too: neurons can't make up for it
        return Plan(fill_with_ffn(target, shapes, align, [float(neurons) for _, neurons in kept]))

    def _thresholds(
        self, target: Target, dense: Sequence[LayerShape], scores: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The scores of the units that may stay, ascending: as many of the lowest are gone as the target asks for."""
        costs = [cost for _ in dense for cost in unit_parameters(target.config, dense[0])]
        modules = [module for layer in scores for module in layer]
        repeats = torch.tensor([len(module) for module in modules])
        ascending, order = torch.cat(modules).sort(stable=True)
        gone = torch.tensor(costs).repeat_interleave(repeats)[order].cumsum(0)
        excess = decoder_parameters(target.config, [self._with_biases(shape) for shape in dense]) - target.remaining
        return ascending[int((gone <= excess).sum()) :]

    def _with_groups(self, shape: LayerShape, groups: int) -> LayerShape:
        """The shape with that many KV groups, and with the biases that make up for lost groups and neurons."""
        smaller = self._with_biases(with_heads(shape, groups, heads_per_group(shape)))
        return smaller if groups < shape.kv_heads else replace(smaller, output_bias=shape.output_bias)

    def _with_biases(self, shape: LayerShape) -> LayerShape:
        return replace(shape, output_bias=True, down_bias=True) if self.compensation else shape

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return [Mean("attention_values"), Mean("ffn_neurons")] if self.compensation else []

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return self.pruning_moments(shape, shape)

    def prune(
        self,
        layer: DecoderLayer,
        planned: LayerShape,
        statistics: LayerStatistics,
        profile: Profile,
        observe: Observe,
    ) -> DecoderLayer:
        if planned == layer.shape:
            return layer
        groups = most_important(profile["groups"], planned.kv_heads)
        heads = heads_of_groups(groups, heads_per_group(planned))
        neurons = most_important(profile["neurons"], planned.ffn_width)
        pruned = keep_neurons(keep_heads(layer, heads), neurons)
        if not self.compensation:
            return pruned
        output, down = pruned.output, pruned.down
        if planned.kv_heads < layer.kv_heads:
            mean = statistics.mean("attention_values")
            bias = compensated_bias(layer.output, channels_of(heads, planned.value_dim), mean)
            output = replace(output, bias=bias)
        bias = compensated_bias(layer.down, neurons, statistics.mean("ffn_neurons"))
        return replace(pruned, output=output, down=replace(down, bias=bias))


def fluctuation(projection: Linear, statistics: LayerStatistics, tap: str) -> Tensor:
    """The metric WIFV: every input channel's variance, times the squared norm of its column of W, (in,)."""
    variance = (statistics.power(tap) - statistics.mean(tap).square()).clamp(min=0)
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


def heads_per_group(shape: LayerShape) -> int:
    return shape.query_heads // shape.kv_heads


def unit_parameters(config: PrunedConfig, shape: LayerShape) -> tuple[int, int]:
    """The parameters that one more KV group and one more neuron would add to a layer."""
    groups = with_heads(shape, shape.kv_heads + 1, heads_per_group(shape))
    neurons = replace(shape, ffn_width=shape.ffn_width + 1)
    before = layer_parameters(config, 0, shape)
    return layer_parameters(config, 0, groups) - before, layer_parameters(config, 0, neurons) - before
