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
from distprune.errors import InputError
from distprune.methods.base import Method, Observe, Plan, Profile
from distprune.methods.curvature.curves import (
    attention_curves,
    branch_savings,
    ffn_curve,
    truncations,
    truncations_bytes,
)
from distprune.methods.curvature.menus import Reach, allocate_globally, smallest
from distprune.methods.curvature.stock import allocate_equally, equal_shapes
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
from distprune.solvers import linear_branch, output_projections, ridge_towards
from distprune.statistics import Cross, Gram, LayerStatistics, Moment, ScalingPower


class Curvature(Method):
    name: ClassVar[str] = "curvature"
    targets: ClassVar[tuple[str, ...]] = RESOURCES
    layouts: ClassVar[tuple[str, ...]] = ("per-layer", "stock")

    damping: float = Field(
        0.01, gt=0, description="added to the Gram matrix's diagonal where units are chosen, over the mean"
    )
    refit_damping: float = Field(0.03, gt=0, description="penalty on moving a weight in the refit, over the same mean")
    factored: bool = Field(True, description="query, key and output projections may become products of two factors")
    branch_damping: float = Field(0.1, gt=0, description="penalty on a weight of a branch, over the same mean")
    calibrated: bool = Field(True, description="narrow FFNs may get a linear branch of low rank beside them")
    largest_cut: float = Field(0.8, gt=0, le=1, description="share of a width that may go where its module stays")

    # ---------------------------------------------------------------- the gradient pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        inputs = [Gram("attention_input")] if self.factored else []
        return [*inputs, Gram("attention_values"), *self._ffn_moments(self.calibrated)]

    def _ffn_moments(self, calibrated: bool) -> Sequence[Moment]:
        branch = [Gram("ffn_input"), Cross("ffn_input", "ffn_neurons")] if calibrated else []
        return [Gram("ffn_neurons"), *branch]

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        inner = [Gram("query_gradient"), Gram("key_gradient")] if self.factored else []
        return [
            *inner,
            Gram("attention_output_gradient"),
            Gram("ffn_output_gradient"),
            ScalingPower("queries", "query_gradient", shape.kv_heads, shape.query_key_dim // 2),
        ]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        profile = attention_curves(layer, statistics, self.damping) | ffn_curve(layer, statistics, self.damping)
        if self.factored:
            profile |= truncations(layer, statistics, self.damping)
        if self.calibrated:
            profile |= branch_savings(layer, statistics, profile["neuron_order"], self.damping, self.branch_damping)
        return profile

    def profile_bytes(self, hidden_size: int, shape: LayerShape) -> int:
        factors = truncations_bytes(hidden_size, shape) if self.factored else 0
        return factors + self.calibrated * hidden_size**2 * torch.float32.itemsize

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        if target.sparsity:
            check_reachable(target, Reach(align, 1 - self.largest_cut))

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        if target.sparsity == 0:
            return Plan(target.dense_shapes, predicted_loss=0.0, gap=0.0)
        reach = Reach(align, 1 - self.largest_cut)
        if target.stock:
            return allocate_equally(target, profiles, reach)
        return allocate_globally(target, profiles, reach)

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
        elif replace(planned, ffn_width=layer.shape.ffn_width, calibration_rank=None) != layer.shape:
            layer = self._prune_attention(layer, planned, profile, observe)
        if not planned.has_ffn:
            layer = without_ffn(layer)
        elif (planned.ffn_width, planned.calibration_rank) != (layer.shape.ffn_width, None):
            layer = self._prune_ffn(layer, planned, profile, observe)
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

    def _prune_ffn(self, layer: DecoderLayer, planned: LayerShape, profile: Profile, observe: Observe) -> DecoderLayer:
        statistics = observe(layer, self._ffn_moments(planned.calibration_rank is not None))
        gram = statistics.gram("ffn_neurons")
        kept = profile["neuron_order"][layer.shape.ffn_width - planned.ffn_width :].sort().values
        pruned = keep_neurons(layer, kept)
        if planned.calibration_rank is None:
            return replace(pruned, down=self._refit(layer.down, kept, gram))
        input_gram, cross = statistics.gram("ffn_input"), statistics.cross("ffn_input", "ffn_neurons")
        whole, unknown = linear_branch(layer.down.weight.float(), kept, gram, input_gram, cross, self.branch_damping)
        left, right, _ = output_projections(whole, unknown, profile["ffn_metric_root"].double())
        branch = projected(Linear(whole), left, right, planned.calibration_rank)
        given = branch.left @ (branch.right @ cross[:, kept])
        return replace(pruned, down=self._refit(layer.down, kept, gram, given), calibration=branch)

    def _refit(self, projection: Linear, kept: Tensor, gram: Tensor, given: Tensor | float = 0.0) -> Linear:
        """The projection of the ``kept`` input channels that best gives what all of them gave.

        Args:
            given: what is given by something else of it, E[yᵀz] with the kept input channels z, (out, kept).
        """
        weight = projection.weight.float()
        wanted = weight @ gram[:, kept] - given
        refitted = ridge_towards(weight[:, kept], gram[kept][:, kept], wanted, self.refit_damping)
        return Linear(refitted, projection.bias)


def truncated(projection: Linear, rank: int | None, profile: Profile, name: str) -> Linear | LowRank:
    """The projection at that rank, its output projected on what matters most; or as it is, for None."""
    if rank is None:
        return projection
    return projected(projection, profile[f"{name}_left"], profile[f"{name}_right"], rank)


def projected(projection: Linear, left: Tensor, right: Tensor, rank: int) -> LowRank:
    """Its output on the first of nested subspaces, see :func:`distprune.solvers.output_projections`."""
    return LowRank(right[:rank] @ projection.weight.float(), left[:, :rank].contiguous(), projection.bias)


def check_reachable(target: Target, reach: Reach) -> None:
    """See that the smallest layers there can be meet the target.

    Raises:
        InputError: they don't.
    """
    if target.stock:
        reachable = bool(equal_shapes(target, reach))
    else:
        reachable = target.amount(smallest(target, reach)) <= target.remaining
    if not reachable:
        raise InputError(
            f"sparsity {target.sparsity:g} can't be reached"
            + (" with the same widths in every layer. Leave --layout out, or ask" if target.stock else ". Ask")
            + " for a lower --sparsity."
        )
