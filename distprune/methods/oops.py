"""OOPS: outlier-aware unit selection and quadratic-programming reconstruction (Wei et al., Neural Networks 2026).

The paper is behind a paywall: this is a reading of its abstract and of its authors' earlier SoBP (EMNLP 2024), and not
a copy of their code. Units are whole KV groups of attention and neurons of the FFN.

With c_u(x) what unit u adds to its module's output, Q_uv = E⟨c_u, c_v⟩ says how units act together: (W_dᵀW_d) ∘ E[aᵀa]
for FFN neurons a, and tr(W_u E[z_uᵀz_v] W_vᵀ) for the KV groups' slices z_u of the output projection's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import ParameterTarget, fill_with_ffn, layer_parameters, outlier_ratio, outlier_weighted
from distprune.decoder_layer import DecoderLayer, LayerShape, Linear, slice_linear
from distprune.methods.base import Method, Profile
from distprune.solvers import box_ridge, most_important, relaxed_selection
from distprune.statistics import Gram, HeadGram, LayerStatistics, Moment, Peak, Power

ATTENTION_TAPS = ("attention_input", "attention_values")
FFN_TAPS = ("ffn_input", "ffn_neurons")


class Oops(Method):
    name: ClassVar[str] = "oops"

    outlier_multiple: float = Field(5.0, gt=0, description="an outlier is this many times the layer's mean |W|·rms(x)")
    outlier_span: float = Field(0.05, ge=0, description="how far outliers move a layer's sparsity from the mean")
    outlier_weight: float = Field(0.1, ge=0, description="weight of a unit's peak beside its mean energy; 0 is off")
    selection: Literal["qp", "score"] = Field("qp", description="choose units together, or each by its own score")
    attention: bool = Field(True, description="KV groups may go, not only FFN neurons")
    radius: float = Field(inf, ge=0, description="how far the refit may move a weight, over the rms of its row")
    damping: float = Field(0.01, gt=0, description="ridge penalty over the mean of the Gram matrix's diagonal")

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        taps = (*ATTENTION_TAPS, *FFN_TAPS)
        peaks = [Peak("attention_values"), Peak("ffn_neurons")]
        return [*map(Power, taps), *peaks, HeadGram("attention_values", shape.kv_heads)]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The layer's share of outliers, and what its units give to the output, least first."""
        inputs = {
            "attention_input": (layer.query, layer.key, layer.value),
            "attention_values": (layer.output,),
            "ffn_input": (layer.gate, layer.up),
            "ffn_neurons": (layer.down,),
        }
        magnitudes = [
            projection.weight.abs() * statistics.rms(tap) for tap, group in inputs.items() for projection in group
        ]
        groups = group_energy(layer, statistics.head_gram("attention_values", layer.kv_heads))
        groups = groups + sum_by_group(self._outlier_energy(layer.output, statistics, "attention_values"), len(groups))
        neurons = layer.down.weight.square().sum(dim=0) * statistics.power("ffn_neurons")
        neurons = neurons + self._outlier_energy(layer.down, statistics, "ffn_neurons")
        return {
            "outlier_ratio": outlier_ratio(magnitudes, self.outlier_multiple),
            "group_energy": groups.sort().values,
            "neuron_energy": neurons.sort().values,
        }

    def _outlier_energy(self, projection: Linear, statistics: LayerStatistics, tap: str) -> Tensor:
        """What keeps a channel that is quiet on average but carries outliers, (width,).

        The energy of the channel's largest value, scaled so that it equals the mean energy for a channel whose peaks
        are of ordinary height.
        """
        power, peak = statistics.power(tap), statistics.peak(tap).square()
        # No peak is below the mean, so the ratio is at least 1 for every channel that is not silent.
        ordinary = (peak / power.clamp(min=torch.finfo(power.dtype).tiny)).median().clamp(min=1)
        return self.outlier_weight * projection.weight.square().sum(dim=0) * peak / ordinary

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: ParameterTarget, align: int) -> None:
        layers = range(target.config.num_hidden_layers)
        fill_with_ffn(target, [self._smallest(target.config.layer_shape(index)) for index in layers], align)

    def plan(self, target: ParameterTarget, profiles: Sequence[Profile], align: int) -> list[LayerShape]:
        config = target.config
        dense = [config.layer_shape(index) for index in range(config.num_hidden_layers)]
        if target.sparsity == 0:
            return dense
        ratios = torch.stack([profile["outlier_ratio"] for profile in profiles])
        sparsities = outlier_weighted(target.decoder_sparsity, ratios, self.outlier_span).tolist()
        shapes, wanted = [], []
        for index, (shape, sparsity) in enumerate(zip(dense, sparsities, strict=True)):
            shape, neurons = self._divide(target, index, shape, sparsity, profiles[index], align)
            shapes.append(shape)
            wanted.append(neurons)
        return fill_with_ffn(target, shapes, align, wanted)

    def _divide(
        self, target: ParameterTarget, index: int, shape: LayerShape, sparsity: float, profile: Profile, align: int
    ) -> tuple[LayerShape, float]:
        """Divide a layer's budget between KV groups and neurons: as many groups go as makes the lost energy least.

        Returns:
            The shape with that many groups, and how many neurons it may keep.
        """
        config, options = target.config, []
        budget = (1 - sparsity) * layer_parameters(config, index, shape)
        lost = torch.cat([torch.zeros(1), profile["neuron_energy"].cumsum(0)])
        for gone in range(shape.kv_heads if self.attention else 1):
            smaller = without_groups(shape, gone)
            bare = layer_parameters(config, index, replace(smaller, ffn_width=1))
            per_neuron = layer_parameters(config, index, replace(smaller, ffn_width=2)) - bare
            neurons = min(shape.ffn_width, 1 + (budget - bare) / per_neuron)
            if neurons >= align:
                energy = profile["group_energy"][:gone].sum() + lost[round(shape.ffn_width - neurons)]
                options.append((energy.item(), gone, neurons))
        if not options:
            return self._smallest(shape), float(align)
        _, gone, neurons = min(options)
        return without_groups(shape, gone), neurons

    def _smallest(self, shape: LayerShape) -> LayerShape:
        """The shape with as few KV groups as the method may leave."""
        return without_groups(shape, shape.kv_heads - 1 if self.attention else 0)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        moments: list[Moment] = []
        for tap, pruned in (("attention_values", planned.kv_heads < dense.kv_heads), ("ffn_neurons", True)):
            moments += [Gram(tap), Power(tap), Peak(tap)] if pruned else []
        return moments

    def prune(
        self, layer: DecoderLayer, planned: LayerShape, statistics: LayerStatistics, profile: Profile
    ) -> DecoderLayer:
        if planned.kv_heads < layer.kv_heads:
            layer = self._prune_groups(layer, planned, statistics)
        if planned.ffn_width < layer.down.weight.shape[1]:
            layer = self._prune_neurons(layer, planned, statistics)
        return layer

    def _prune_groups(self, layer: DecoderLayer, planned: LayerShape, statistics: LayerStatistics) -> DecoderLayer:
        gram, groups = statistics.gram("attention_values"), layer.kv_heads
        outliers = self._outlier_energy(layer.output, statistics, "attention_values")
        interaction = group_interaction(layer, gram) + sum_by_group(outliers, groups).diag()
        kept = self._select(interaction, planned.kv_heads)

        def channels(width: int) -> Tensor:
            """The kept groups' share of ``width`` channels."""
            return (kept[:, None] * (width // groups) + torch.arange(width // groups, device=kept.device)).flatten()

        def slice_rows(projection: Linear) -> Linear:
            return slice_linear(projection, rows=channels(len(projection.weight)))

        return replace(
            layer,
            query_heads=planned.query_heads,
            kv_heads=planned.kv_heads,
            query=slice_rows(layer.query),
            key=slice_rows(layer.key),
            value=slice_rows(layer.value),
            output=self._refit(layer.output, channels(len(gram)), gram),
        )

    def _prune_neurons(self, layer: DecoderLayer, planned: LayerShape, statistics: LayerStatistics) -> DecoderLayer:
        gram, weight = statistics.gram("ffn_neurons"), layer.down.weight
        interaction = (weight.mT @ weight) * gram
        interaction.diagonal().add_(self._outlier_energy(layer.down, statistics, "ffn_neurons"))
        kept = self._select(interaction, planned.ffn_width)
        return replace(
            layer,
            gate=slice_linear(layer.gate, rows=kept),
            up=slice_linear(layer.up, rows=kept),
            down=self._refit(layer.down, kept, gram),
        )

    def _select(self, interaction: Tensor, keep: int) -> Tensor:
        """Indices of the units to keep, ascending: min ½(1-m)ᵀQ(1-m) over 0 ≤ m ≤ 1, Σm ≤ keep, and the largest m."""
        score = interaction.diagonal()
        if self.selection == "qp":
            # Scaled, so that the solver's tolerance means the same for every layer.
            score = relaxed_selection(interaction / score.mean(), torch.ones_like(score), float(keep))
        return most_important(score, keep)

    def _refit(self, projection: Linear, kept: Tensor, gram: Tensor) -> Linear:
        """QP reconstruction: the projection from the ``kept`` channels that gives the dense output back best."""
        weight = projection.weight
        start = weight[:, kept]
        radius = self.radius * weight.square().mean(dim=1, keepdim=True).sqrt()
        target = weight @ gram[:, kept]
        return Linear(box_ridge(gram[kept][:, kept], target, start, radius, self.damping).x, projection.bias)


def sum_by_group(channels: Tensor, groups: int) -> Tensor:
    """(g·n,) to (g,)."""
    return channels.unflatten(0, (groups, -1)).sum(dim=1)


def without_groups(shape: LayerShape, gone: int) -> LayerShape:
    """The shape with ``gone`` fewer KV groups and their query heads."""
    kept = shape.kv_heads - gone
    return replace(shape, kv_heads=kept, query_heads=shape.query_heads // shape.kv_heads * kept)


def group_interaction(layer: DecoderLayer, gram: Tensor) -> Tensor:
    """E⟨c_u, c_v⟩ of the KV groups' contributions to the attention's output, (g, g), from E[zᵀz]."""
    weights = layer.output.weight.unflatten(1, (layer.kv_heads, -1)).movedim(1, 0)
    blocks = gram.unflatten(0, (layer.kv_heads, -1)).unflatten(2, (layer.kv_heads, -1))
    return torch.einsum("udi,uivj,vdj->uv", weights, blocks, weights)


def group_energy(layer: DecoderLayer, group_gram: Tensor) -> Tensor:
    """E‖c_u‖² of every KV group, (g,), from the second moments of the groups' values alone, (g, m·v, m·v)."""
    weights = layer.output.weight.unflatten(1, (layer.kv_heads, -1)).movedim(1, 0)
    return ((weights @ group_gram) * weights).sum(dim=(1, 2))
