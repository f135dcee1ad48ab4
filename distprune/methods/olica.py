"""Olica: Efficient Structured Pruning of Large Language Models without Retraining (He & Lin, ICML 2025).

Attention depends on its weights through two products, W_q W_kᵀ and W_v W_oᵀ, and each is compressed as one entity; the
FFN loses neurons, and a low-rank linear map of its input repairs part of what was lost. The paper treats multi-head
attention; here the query heads of a KV group share one value rotation and lose the same value neurons.

Notation (row vectors): x is the attention's or the FFN's input, z the output projection's input, a the FFN's neurons,
rms(·) the root mean square of each channel over the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import Target, aligned, fill_with_ffn
from distprune.decoder_layer import DecoderLayer, LayerShape, Linear, LowRank
from distprune.errors import InputError
from distprune.methods.base import Method, Observe, Plan, Profile
from distprune.methods.units import column_energy, keep_neurons, keep_values, output_slices, rotate_values
from distprune.solvers import (
    factor_input_scaled,
    factor_output_scaled,
    most_and_least_important,
    most_important,
    orthogonal_output_rotation,
    prediction_correlation,
    ridge,
    uncorrelated_rotation,
)
from distprune.statistics import Cross, Gram, HeadGram, LayerStatistics, Mean, Moment, Power

# The published damping is stated for 128 samples of 128 tokens and shrinks as there are more.
PUBLISHED_TOKENS = 128 * 128
# What a linear fit of the FFN's output y to its input x takes.
LINEAR_FIT = (
    Gram("ffn_input"),
    Cross("ffn_input", "ffn_output"),
    Mean("ffn_input"),
    Mean("ffn_output"),
    Power("ffn_output"),
)


class Olica(Method):
    """Hyperparameters, with the published code's flag in brackets where its name differs."""

    name: ClassVar[str] = "olica"

    k: float = Field(3.0, ge=0, description="ratio of what is taken from queries/keys to values/outputs")
    calibrated_layers: int = Field(6, ge=0, description="FFNs that get a linear calibration [mlp_num]")
    calibration_rank_ratio: float = Field(0.03, gt=0, lt=1, description="its rank over the hidden size [ratio]")
    percdamp: float = Field(0.5, gt=0, description="ridge penalty over the mean of the Gram matrix's diagonal")
    channel_temperature: float = Field(0.05, gt=0, description="softness of the weights of the output channels")
    keep_least: float = Field(0.01, ge=0, lt=1, description="fraction of the least important neurons that stays")
    decomposition: Literal["values", "weights", "none"] = Field(
        "values", description="what makes value neurons orthogonal before some go: their values, or W_o as published"
    )

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        moments: list[Moment] = []
        if self.decomposition == "weights":
            moments.append(Power("attention_output"))
        if self.calibrated_layers:
            moments += LINEAR_FIT
        return moments

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        profile = {}
        if self.decomposition == "weights":
            profile["attention_output_rms"] = statistics.rms("attention_output")
        if self.calibrated_layers:
            # How well a linear map of the FFN's input explains its output.
            profile["ffn_linearity"] = self._linear_fit(statistics)[1].mean()
        return profile

    def _linear_fit(self, statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
        """Ridge regression of the FFN's output on its input, (d, d), and the correlation of what it predicts with the
        output, for every channel, (d,)."""
        x, y = "ffn_input", "ffn_output"
        gram, cross = statistics.gram(x), statistics.cross(x, y)
        solution = ridge(gram, cross, self.percdamp * PUBLISHED_TOKENS / statistics.tokens)
        return solution, prediction_correlation(
            solution, gram, cross, statistics.mean(x), statistics.mean(y), statistics.power(y)
        )

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        # Which layers are calibrated makes no difference to how many parameters they hold.
        possible = target.config.num_hidden_layers - 1
        self._shapes(target, set(range(min(self.calibrated_layers, possible))), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        return Plan(self._shapes(target, self._most_linear(profiles), align))

    def _shapes(self, target: Target, calibrated: set[int], align: int) -> list[LayerShape]:
        config = target.config
        dense = target.dense_shapes
        if target.sparsity == 0:
            return dense
        value_output, query_key = self.attention_sparsities(target.decoder_sparsity)
        if max(value_output, query_key) >= 1:
            raise InputError(
                f"sparsity {target.sparsity:g} can't be reached by olica: with k = {self.k:g} it would take "
                f"{query_key:.0%} of the queries and keys and {value_output:.0%} of the values. Ask for a lower "
                "--sparsity, or set k nearer to 1."
            )
        rank = aligned(self.calibration_rank_ratio * config.hidden_size, align, most=config.hidden_size)

        def prune_attention(shape: LayerShape, index: int) -> LayerShape:
            return replace(
                shape,
                value_dim=aligned((1 - value_output) * shape.value_dim, align, most=shape.value_dim),
                query_rank=kept_rank(shape.query_heads * shape.query_key_dim, config.hidden_size, query_key, align),
                key_rank=kept_rank(shape.kv_heads * shape.query_key_dim, config.hidden_size, query_key, align),
                calibration_rank=rank if index in calibrated else None,
            )

        return fill_with_ffn(target, [prune_attention(shape, index) for index, shape in enumerate(dense)], align)

    def attention_sparsities(self, sparsity: float) -> tuple[float, float]:
        """The fractions to take from values/outputs and from queries/keys at an overall ``sparsity``."""
        value_output = 2 * sparsity / (1 + self.k)
        return value_output, 2 * sparsity if sparsity <= 0.4 else self.k * value_output

    def _most_linear(self, profiles: Sequence[Profile]) -> set[int]:
        """The FFNs whose output a linear map explains best; never the last layer's."""
        if not self.calibrated_layers or len(profiles) == 1:
            return set()
        linearity = torch.stack([profile["ffn_linearity"] for profile in profiles[:-1]])
        return set(most_important(linearity, self.calibrated_layers).tolist())

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return [
            Power("attention_input"),
            HeadGram("attention_values", dense.query_heads),
            Power("ffn_input"),
            Power("ffn_neurons"),
        ]

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
        importance = ffn_importance(layer, statistics.rms("ffn_input"), statistics.rms("ffn_neurons"))
        kept = most_and_least_important(importance, planned.ffn_width, int(self.keep_least * len(importance)))
        calibration = None
        if planned.calibration_rank:
            calibration = self._calibrate(layer, kept, planned.calibration_rank, observe)
        attention = self._prune_attention(layer, planned, statistics, profile)
        return replace(keep_neurons(attention, kept), calibration=calibration)

    def _prune_attention(
        self, layer: DecoderLayer, planned: LayerShape, statistics: LayerStatistics, profile: Profile
    ) -> DecoderLayer:
        value_gram = statistics.head_gram("attention_values", layer.query_heads)
        if self.decomposition != "none":
            rotation = self._value_rotation(layer, value_gram, profile)
            layer, value_gram = rotate_values(layer, rotation), rotated_gram(value_gram, rotation)
        layer = prune_values(layer, planned.value_dim, statistics.rms("attention_input"), value_gram)
        return factor_queries_and_keys(layer, planned, statistics.rms("attention_input"))

    def _value_rotation(self, layer: DecoderLayer, value_gram: Tensor, profile: Profile) -> Tensor:
        """Orthogonal neuron decomposition of every KV group's values, (g, v, v).

        The published one makes the columns of W_o orthogonal. Three query heads that share their values can hardly
        be made so by one rotation, while the values themselves always can, and that costs no more.
        """
        if self.decomposition == "weights":
            return orthogonal_output_rotation(output_slices(layer), profile["attention_output_rms"])
        return uncorrelated_rotation(value_gram.unflatten(0, (layer.kv_heads, -1)).mean(dim=1))

    def _calibrate(self, layer: DecoderLayer, kept: Tensor, rank: int, observe: Observe) -> LowRank:
        """Linear calibration: what the dropped neurons gave, r = a_dropped W_droppedᵀ, as a low-rank map of x.

        The ridge solution of r on x (Eq. 7), its output channels weighted by how well each is predicted, is truncated
        by SVD. A layer that has but the dropped neurons is run to see r: that is quicker, and takes less memory, than
        to collect the moments of all neurons before it is known which go.
        """
        weight, bias = layer.down.weight, layer.down.bias
        gone = torch.ones(weight.shape[1], dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
        dropped = gone.nonzero().flatten()
        if not len(dropped):
            factor = torch.zeros(rank, len(weight), device=weight.device)
            return LowRank(right=factor, left=factor.mT.contiguous())
        unbiased = Linear(weight, None if bias is None else torch.zeros_like(bias))
        lost = keep_neurons(replace(layer, down=unbiased), dropped)
        solution, correlation = self._linear_fit(observe(lost, LINEAR_FIT))
        weights = torch.sigmoid((correlation - correlation.mean()) / self.channel_temperature)
        left, right = factor_output_scaled(solution.mT, weights, rank)
        return LowRank(right=right, left=left)


def kept_rank(out_features: int, in_features: int, sparsity: float, align: int) -> int:
    """The rank at which two factors of an (out, in) matrix hold the fraction 1 - ``sparsity`` of its parameters."""
    rank = ceil((1 - sparsity) * out_features * in_features / (out_features + in_features))
    return aligned(rank, align, most=min(out_features, in_features))


def rotated_gram(value_gram: Tensor, rotation: Tensor) -> Tensor:
    """E[z_iᵀz_i] of every query head, (h, v, v), after each KV group's values were rotated by (g, v, v)."""
    per_head = rotation.repeat_interleave(len(value_gram) // len(rotation), dim=0)
    return per_head.mT @ value_gram @ per_head


def prune_values(layer: DecoderLayer, keep: int, input_rms: Tensor, value_gram: Tensor) -> DecoderLayer:
    """Keep the ``keep`` most important value neurons of every KV group.

    The importance of a neuron is the norm of its row of W_v, scaled by rms(x), plus the norm of its columns of W_o
    in all query heads of its group, scaled by rms(z).
    """
    groups, per_group = layer.kv_heads, output_slices(layer)
    values_rms = value_gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().unflatten(0, (groups, -1))
    value = layer.value.weight.unflatten(0, (groups, -1))
    importance = (value * input_rms).norm(dim=2) + (per_group * values_rms[:, :, None]).norm(dim=(1, 2))
    return keep_values(layer, most_important(importance, keep))


def factor_queries_and_keys(layer: DecoderLayer, planned: LayerShape, input_rms: Tensor) -> DecoderLayer:
    """Replace W_q and W_k each by its low-rank factors.

    The rotary embedding stands between the two, so their product can't be decomposed; each is, with its input scaled
    by rms(x).
    """

    def factor(projection: Linear, rank: int) -> LowRank:
        left, right = factor_input_scaled(projection.weight.float(), input_rms, rank)
        return LowRank(right=right, left=left, bias=projection.bias)

    return replace(layer, query=factor(layer.query, planned.query_rank), key=factor(layer.key, planned.key_rank))


def ffn_importance(layer: DecoderLayer, input_rms: Tensor, neuron_rms: Tensor) -> Tensor:
    """The sum of the norms of a neuron's up row, gate row and down column, each scaled by its input's rms, (f,)."""
    up, gate = ((projection.weight * input_rms).square_().sum(dim=1).sqrt() for projection in (layer.up, layer.gate))
    return up + gate + column_energy(layer.down).sqrt() * neuron_rms
