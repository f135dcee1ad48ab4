"""Curvature-aware pruning with one global budget.

1. The gradient pass sees, at every output projection, its inputs and the loss's gradient, and from their second moments
   predicts what the loss would lose by what the module loses (:mod:`.curves`).
2. One allocation over all layers and modules removes what costs least (:mod:`.menus`).
3. Every layer loses its share on what reaches it through the pruned layers before it, and what is left of its output
   projections is refitted by ridge regression to what the whole of them gave (Eq. below). With C invertible, the refit
   that costs least in the metric C is the one that costs least in any.

The refit: of all W' that see only the kept inputs z_S, the one that minimizes E‖z Wᵀ - z_S W'ᵀ‖² + λ‖W' - W_S‖². To
shrink towards the weights that were there, and not towards zero, costs nothing on the calibration text and helps on
other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import RESOURCES, Target
from distprune.decoder_layer import DecoderLayer, LayerShape, Linear, LowRank
from distprune.methods.base import Method, Observe, Profile
from distprune.methods.curvature.curves import attention_curves, ffn_curve, truncations
from distprune.methods.curvature.menus import Reach, allocate_equally, allocate_globally, check_reachable
from distprune.methods.units import (
    heads_of_groups,
    keep_heads,
    keep_neurons,
    keep_rotary_pairs,
    keep_values,
    rotate_values,
    without_attention,
    without_ffn,
)
from distprune.solvers import ridge_towards
from distprune.statistics import Gram, LayerStatistics, Moment, ScalingPower


class Curvature(Method):
    name: ClassVar[str] = "curvature"
    targets: ClassVar[tuple[str, ...]] = RESOURCES
    layouts: ClassVar[tuple[str, ...]] = ("per-layer", "stock")

    damping: float = Field(
        0.01, gt=0, description="added to the Gram matrix's diagonal where units are chosen, over the mean"
    )
    refit_damping: float = Field(0.03, gt=0, description="penalty on moving a weight in the refit, over the same mean")
    factored: bool = Field(True, description="query, key and output projections may become products of two factors")
    largest_cut: float = Field(0.8, gt=0, le=1, description="share of a width that may go where its module stays")

    # ---------------------------------------------------------------- the gradient pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        inputs = [Gram("attention_input")] if self.factored else []
        return [*inputs, Gram("attention_values"), Gram("ffn_neurons")]

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        inner = [Gram("query_gradient"), Gram("key_gradient")] if self.factored else []
        return [
            *inner,
            Gram("attention_output_gradient"),
            Gram("ffn_output_gradient"),
            ScalingPower("queries", "query_gradient", shape.kv_heads, shape.query_key_dim // 2),
        ]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        factors = truncations(layer, statistics, self.damping) if self.factored else {}
        return {
            **attention_curves(layer, statistics, self.damping),
            **ffn_curve(layer, statistics, self.damping),
            **factors,
        }

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        if target.sparsity:
            check_reachable(target, Reach(align, 1 - self.largest_cut))

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> list[LayerShape]:
        if target.sparsity == 0:
            return target.dense_shapes
        reach = Reach(align, 1 - self.largest_cut)
        if target.stock:
            return allocate_equally(target, profiles, reach)
        return allocate_globally(target, profiles, reach)[0]

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def prune(
        self,
        layer: DecoderLayer,
        planned: LayerShape,
        statistics: LayerStatistics,
        profile: Profile,
        observe: Observe,
    ) -> DecoderLayer:
        if not planned.has_attention:
            layer = without_attention(layer)
        elif replace(planned, ffn_width=layer.shape.ffn_width) != layer.shape:
            layer = self._prune_attention(layer, planned, profile, observe)
        if not planned.has_ffn:
            layer = without_ffn(layer)
        elif planned.ffn_width < layer.shape.ffn_width:
            layer = self._prune_ffn(layer, planned.ffn_width, profile, observe)
        return layer

    def _prune_attention(
        self, layer: DecoderLayer, planned: LayerShape, profile: Profile, observe: Observe
    ) -> DecoderLayer:
        """Queries and keys come first: the output projection is refitted to what attention attends to with theirs."""
        dense = layer.shape
        if gone := (dense.query_key_dim - planned.query_key_dim) // 2:
            layer = keep_rotary_pairs(layer, profile["pair_order"][:, gone:].sort(dim=1).values)
        layer = replace(
            layer,
            query=truncated(layer.query, planned.query_rank, profile, "query"),
            key=truncated(layer.key, planned.key_rank, profile, "key"),
        )
        if (planned.kv_heads, planned.value_dim) != (dense.kv_heads, dense.value_dim):
            layer = self._prune_values(layer, planned, profile, observe)
        return replace(layer, output=truncated(layer.output, planned.output_rank, profile, "output"))

    def _prune_values(
        self, layer: DecoderLayer, planned: LayerShape, profile: Profile, observe: Observe
    ) -> DecoderLayer:
        dense, order = layer.shape, profile["group_order"]
        layer = rotate_values(layer, profile["value_rotation"])
        gram = observe(layer, [Gram("attention_values")]).gram("attention_values")
        heads = heads_of_groups(
            order[dense.kv_heads - planned.kv_heads :].sort().values, layer.query_heads // layer.kv_heads
        )
        values = torch.arange(planned.value_dim, device=order.device)
        kept = (heads.flatten()[:, None] * dense.value_dim + values).flatten()
        # Factored queries and keys always have all of their heads.
        pruned = keep_heads(layer, heads) if planned.kv_heads < dense.kv_heads else layer
        pruned = keep_values(pruned, values.expand(planned.kv_heads, -1))
        return replace(pruned, output=self._refit(layer.output, kept, gram))

    def _prune_ffn(self, layer: DecoderLayer, width: int, profile: Profile, observe: Observe) -> DecoderLayer:
        gram = observe(layer, [Gram("ffn_neurons")]).gram("ffn_neurons")
        kept = profile["neuron_order"][layer.shape.ffn_width - width :].sort().values
        return replace(keep_neurons(layer, kept), down=self._refit(layer.down, kept, gram))

    def _refit(self, projection: Linear, kept: Tensor, gram: Tensor) -> Linear:
        """The projection of the ``kept`` input channels that best gives what all of them gave."""
        weight = projection.weight.float()
        refitted = ridge_towards(weight[:, kept], gram[kept][:, kept], weight @ gram[:, kept], self.refit_damping)
        return Linear(refitted, projection.bias)


def truncated(projection: Linear, rank: int | None, profile: Profile, name: str) -> Linear | LowRank:
    """The projection at that rank, its output projected on what matters most; or as it is, for None."""
    if rank is None:
        return projection
    left, right = profile[f"{name}_left"][:, :rank], profile[f"{name}_right"][:rank]
    return LowRank((right @ projection.weight.float()), left.contiguous(), projection.bias)
