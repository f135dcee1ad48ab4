"""Olica: Efficient Structured Pruning of Large Language Models without Retraining (He & Lin, ICML 2025).

Attention depends on its weights through two products, W_q W_kᵀ and W_v W_oᵀ, and each is compressed as one entity; the
FFN loses neurons, and a low-rank linear map of its input repairs part of what was lost. The paper treats multi-head
attention; here the query heads of a KV group share one value rotation and lose the same value neurons. A mixture's
experts lose neurons alone: a map beside each would take as many (d, d) moments as there are experts.

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
from distprune.errors import InputError
from distprune.layers.parts import Attention, DecoderLayer, FeedForward, Linear, LowRank
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape, Removable
from distprune.layers.sites import ATTENDED, ATTENTION_INPUT, ATTENTION_OUTPUT, FFN_INPUT, FFN_OUTPUT, NEURONS
from distprune.methods.base import LayerToPrune, Method, Paper, Plan, Profile, of_parts
from distprune.methods.networks import prune_each
from distprune.methods.units import column_energy, keep_neurons, keep_values, output_slices, rotate_values
from distprune.solvers import (
    factor_input_scaled,
    factor_output_scaled,
    most_and_least_important,
    most_important,
    orthogonal_output_rotation,
    others,
    prediction_correlation,
    ridge,
    uncorrelated_rotation,
)
from distprune.statistics import Cross, Gram, HeadGram, LayerStatistics, Mean, Moment, Power

# The published damping is stated for 128 samples of 128 tokens and shrinks as there are more.
PUBLISHED_TOKENS = 128 * 128
# What a linear fit of the FFN's output y to its input x takes.
LINEAR_FIT = (
    Gram(FFN_INPUT),
    Cross(FFN_INPUT, FFN_OUTPUT),
    Mean(FFN_INPUT),
    Mean(FFN_OUTPUT),
    Power(FFN_OUTPUT),
)


class Olica(Method):
    """Factors queries and keys, drops rotated value neurons, and repairs some narrowed FFNs by a linear map.

    Attention whose values or projections can't become smaller stays whole, and the FFN alone is pruned. The fields are
    the published hyperparameters, with the published code's flag in brackets where its name differs.
    """

    name: ClassVar[str] = "olica"
    paper: ClassVar[Paper | None] = Paper(
        "Olica: Efficient Structured Pruning of Large Language Models without Retraining (He & Lin, ICML 2025)",
        "2506.08436",
    )
    removes: ClassVar[tuple[str, ...]] = ("values", "factors", "neurons")

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
        attention = [Power(ATTENTION_OUTPUT)] if self.decomposition == "weights" else []
        return of_parts(shape, attention=attention, ffn=LINEAR_FIT if self._may_calibrate(shape) else [])

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        profile = {}
        if layer.attention and self.decomposition == "weights":
            profile["attention_output_rms"] = statistics.rms(ATTENTION_OUTPUT)
        if self._may_calibrate(layer.shape):
            # How well a linear map of the FFN's input explains its output.
            profile["ffn_linearity"] = self._linear_fit(statistics)[1].mean()
        return profile

    def _may_calibrate(self, shape: LayerShape) -> bool:
        """Whether a linear branch may stand beside a layer's network; none does beside a mixture."""
        return self.calibrated_layers > 0 and isinstance(shape.ffn, FeedForwardShape)

    def even_profile(self, shape: LayerShape) -> Profile:
        return {"ffn_linearity": torch.tensor(0.5), "attention_output_rms": torch.ones(1)}

    def _linear_fit(self, statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
        """Ridge regression of the FFN's output on its input, (d, d), and the correlation of what it predicts with the
        output, for every channel, (d,)."""
        x, y = FFN_INPUT, FFN_OUTPUT
        gram, cross = statistics.gram(x), statistics.cross(x, y)
        solution = ridge(gram, cross, self.percdamp * PUBLISHED_TOKENS / statistics.tokens(x))
        return solution, prediction_correlation(
            solution, gram, cross, statistics.mean(x), statistics.mean(y), statistics.power(y)
        )

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        # Which layers are calibrated makes no difference to how many parameters they hold.
        self._shapes(target, set(self._calibratable(target)[: self.calibrated_layers]), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        return Plan(self._shapes(target, self._most_linear(target, profiles), align))

    def _shapes(self, target: Target, calibrated: set[int], align: int) -> list[LayerShape]:
        shapes, hidden = target.dense_shapes, target.model.hidden_size
        if target.sparsity == 0:
            return shapes
        value_output, query_key = self.attention_sparsities(target.decoder_sparsity)
        prunable = [index for index in range(len(shapes)) if can_shrink_attention(target.removable(index))]
        if prunable and max(value_output, query_key) >= 1:
            raise InputError(
                f"sparsity {target.sparsity:g} can't be reached by olica: with k = {self.k:g} it would take "
                f"{query_key:.0%} of the queries and keys and {value_output:.0%} of the values. Ask for a lower "
                "--sparsity, or set k nearer to 1."
            )
        for index in prunable:
            dense = shapes[index].attention
            shapes[index] = shapes[index].with_attention(
                value_dim=aligned((1 - value_output) * dense.value_dim, align, most=dense.value_dim),
                query_rank=kept_rank(dense.query_heads * dense.query_key_dim, hidden, query_key, align),
                key_rank=kept_rank(dense.kv_heads * dense.query_key_dim, hidden, query_key, align),
            )
        for index in calibrated:
            rank = aligned(self.calibration_rank_ratio * hidden, align, most=hidden)
            shapes[index] = shapes[index].with_ffn(branch_rank=rank)
        return fill_with_ffn(target, shapes, align)

    def attention_sparsities(self, sparsity: float) -> tuple[float, float]:
        """The fractions to take from values/outputs and from queries/keys at an overall ``sparsity``."""
        value_output = 2 * sparsity / (1 + self.k)
        return value_output, 2 * sparsity if sparsity <= 0.4 else self.k * value_output

    def _calibratable(self, target: Target) -> list[int]:
        """The layers whose FFN may have a linear calibration; never the last one's."""
        removables = map(target.removable, range(target.model.num_layers - 1))
        return [index for index, removable in enumerate(removables) if removable.neurons and removable.branch]

    def _most_linear(self, target: Target, profiles: Sequence[Profile]) -> set[int]:
        """The FFNs whose output a linear map explains best."""
        layers = self._calibratable(target)
        if not self.calibrated_layers or not layers:
            return set()
        linearity = torch.stack([profiles[index]["ffn_linearity"] for index in layers])
        return {layers[place] for place in most_important(linearity, self.calibrated_layers).tolist()}

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        attention = [Power(ATTENTION_INPUT)]
        if dense.attention:
            attention.append(HeadGram(ATTENDED, dense.attention.query_heads))
        return of_parts(dense, attention=attention, ffn=[Power(FFN_INPUT), Power(NEURONS)])

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return self.pruning_moments(shape, shape)

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        layer, planned = given.layer, given.planned
        attention = layer.attention
        if attention and planned.attention != attention.shape:
            attention = self._prune_attention(attention, planned.attention, given.statistics, given.profile)
        return prune_each(given, attention, self._prune_ffn)

    def _prune_ffn(self, given: LayerToPrune) -> FeedForward:
        ffn, planned = given.layer.ffn, given.planned.ffn
        importance = ffn_importance(ffn, given.statistics.rms(FFN_INPUT), given.statistics.rms(NEURONS))
        kept = most_and_least_important(importance, planned.width, int(self.keep_least * len(importance)))
        branch = self._calibrate(given, kept, planned.branch_rank) if planned.branch_rank else None
        return replace(keep_neurons(ffn, kept), branch=branch)

    def _prune_attention(
        self, attention: Attention, planned: AttentionShape, statistics: LayerStatistics, profile: Profile
    ) -> Attention:
        value_gram = statistics.head_gram(ATTENDED, attention.query_heads)
        if self.decomposition != "none":
            rotation = self._value_rotation(attention, value_gram, profile)
            attention, value_gram = rotate_values(attention, rotation), rotated_gram(value_gram, rotation)
        input_rms = statistics.rms(ATTENTION_INPUT)
        attention = prune_values(attention, planned.value_dim, input_rms, value_gram)
        return factor_queries_and_keys(attention, planned, input_rms)

    def _value_rotation(self, attention: Attention, value_gram: Tensor, profile: Profile) -> Tensor:
        """Orthogonal neuron decomposition of every KV group's values, (g, v, v).

        The published one makes the columns of W_o orthogonal. Three query heads that share their values can hardly
        be made so by one rotation, while the values themselves always can, and that costs no more.
        """
        if self.decomposition == "weights":
            return orthogonal_output_rotation(output_slices(attention), profile["attention_output_rms"])
        return uncorrelated_rotation(value_gram.unflatten(0, (attention.kv_heads, -1)).mean(dim=1))

    def _calibrate(self, given: LayerToPrune, kept: Tensor, rank: int) -> LowRank:
        """Linear calibration: what the dropped neurons gave, r = a_dropped W_droppedᵀ, as a low-rank map of x.

        The ridge solution of r on x (Eq. 7), its output channels weighted by how well each is predicted, is truncated
        by SVD. A layer that has but the dropped neurons is run to see r: that is quicker, and takes less memory, than
        to collect the moments of all neurons before it is known which go.
        """
        ffn = given.layer.ffn
        weight, bias = ffn.down.weight, ffn.down.bias
        dropped = others(kept, weight.shape[1])
        if not len(dropped):
            factor = torch.zeros(rank, len(weight), device=weight.device)
            return LowRank(right=factor, left=factor.mT.contiguous())
        unbiased = Linear(weight, None if bias is None else torch.zeros_like(bias))
        lost = replace(given.layer, ffn=keep_neurons(replace(ffn, down=unbiased), dropped))
        solution, correlation = self._linear_fit(given.observe(lost, LINEAR_FIT))
        weights = torch.sigmoid((correlation - correlation.mean()) / self.channel_temperature)
        left, right = factor_output_scaled(solution.mT, weights, rank)
        return LowRank(right=right, left=left)

    # ---------------------------------------------------------------- what it takes


def can_shrink_attention(removable: Removable) -> bool:
    """Whether the method can prune attention: values are dropped, and queries and keys factored, in one proportion."""
    return removable.values and removable.factors


def kept_rank(out_features: int, in_features: int, sparsity: float, align: int) -> int:
    """The rank at which two factors of an (out, in) matrix hold the fraction 1 - ``sparsity`` of its parameters."""
    rank = ceil((1 - sparsity) * out_features * in_features / (out_features + in_features))
    return aligned(rank, align, most=min(out_features, in_features))


def rotated_gram(value_gram: Tensor, rotation: Tensor) -> Tensor:
    """E[z_iᵀz_i] of every query head, (h, v, v), after each KV group's values were rotated by (g, v, v)."""
    per_head = rotation.repeat_interleave(len(value_gram) // len(rotation), dim=0)
    return per_head.mT @ value_gram @ per_head


def prune_values(attention: Attention, keep: int, input_rms: Tensor, value_gram: Tensor) -> Attention:
    """Keep the ``keep`` most important value neurons of every KV group.

    The importance of a neuron is the norm of its row of W_v, scaled by rms(x), plus the norm of its columns of W_o
    in all query heads of its group, scaled by rms(z).
    """
    groups, per_group = attention.kv_heads, output_slices(attention)
    values_rms = value_gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().unflatten(0, (groups, -1))
    value = attention.value.weight.unflatten(0, (groups, -1))
    importance = (value * input_rms).norm(dim=2) + (per_group * values_rms[:, :, None]).norm(dim=(1, 2))
    return keep_values(attention, most_important(importance, keep))


def factor_queries_and_keys(attention: Attention, planned: AttentionShape, input_rms: Tensor) -> Attention:
    """Replace W_q and W_k each by its low-rank factors.

    The rotary embedding stands between the two, so their product can't be decomposed; each is, with its input scaled
    by rms(x).
    """

    def factor(projection: Linear, rank: int) -> LowRank:
        left, right = factor_input_scaled(projection.weight.float(), input_rms, rank)
        return LowRank(right=right, left=left, bias=projection.bias)

    query, key = factor(attention.query, planned.query_rank), factor(attention.key, planned.key_rank)
    return replace(attention, query=query, key=key)


def ffn_importance(ffn: FeedForward, input_rms: Tensor, neuron_rms: Tensor) -> Tensor:
    """The sum of the norms of a neuron's rows in up and gate and of its column in down, each scaled by its input's rms,
    (f,)."""
    rows = [(linear.weight * input_rms).square_().sum(dim=1).sqrt() for linear in reversed(ffn.inputs)]
    return sum(rows) + column_energy(ffn.down).sqrt() * neuron_rms
