"""Curvature-aware pruning with one global budget.

1. The gradient pass sees, at every output projection, its inputs and the loss's gradient, and from their second moments
   predicts what the loss would lose by what the module loses (:mod:`.curves`).
2. One allocation over all layers and parts removes what costs least (:mod:`.menus`).
3. Every layer loses its share on what reaches it through the pruned layers before it, and what is left of its output
   projections is refitted by ridge regression to what the whole of them gave (Eq. below). With C invertible, the refit
   that costs least in the metric C is the one that costs least in any.

The refit: of all W' that see only the kept inputs z_S, the one that minimizes E‖z Wᵀ + αe - z_S W'ᵀ‖² + λ‖W' - W_S‖².
To shrink towards the weights that were there, and not towards zero, costs nothing on the calibration text and helps on
other text. The error e is what the dense model's hidden states after the part are more than the layer's own: with α > 0
a layer makes up for some of what those before it have lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import RESOURCES, Menu, Target
from distprune.errors import InputError
from distprune.layers.parts import Attention, DecoderLayer, Experts, FeedForward, Linear, LowRank, Projection
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_ERROR,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_ERROR,
    FFN_INPUT,
    FFN_OUTPUT,
    KEYS,
    NEURONS,
    QUERIES,
    SHARED_NEURONS,
    Site,
)
from distprune.methods.base import CostCurve, LayerToPrune, Method, Plan, Profile, ProfileExperts, of_parts
from distprune.methods.curvature.all_menus import all_menus, smallest
from distprune.methods.curvature.curves import (
    attention_curves,
    branch_savings,
    ffn_curve,
    truncations,
    truncations_bytes,
)
from distprune.methods.curvature.even_profile import attention_profile, even_profile
from distprune.methods.curvature.menus import Reach
from distprune.methods.curvature.mixture_curves import (
    expert_moments,
    expert_profiler,
    mixture_curves,
    power_moments,
    shared_moments,
)
from distprune.methods.curvature.narrowing import narrowed, without_experts
from distprune.methods.curvature.recorded_curves import recorded_curves
from distprune.methods.curvature.stock import allocate_equally, choices_alike
from distprune.methods.planning_menus import plan_by_menus
from distprune.methods.units import (
    heads_of_groups,
    keep_heads,
    keep_neurons,
    keep_rotary_pairs,
    keep_values,
    rotate_values,
)
from distprune.solvers import linear_branch, output_projections, ridge_towards
from distprune.statistics import Cross, Gram, LayerStatistics, Moment, ScalingPower


class Curvature(Method):
    """Removes what the loss would miss least, with one budget for the whole model, and refits what is left."""

    name: ClassVar[str] = "curvature"
    takes_chunks: ClassVar[bool] = True
    has_menus: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = RESOURCES
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous", "stock")
    removes: ClassVar[tuple[str, ...]] = (
        "heads",
        "values",
        "pairs",
        "factors",
        "neurons",
        "experts",
        "branch",
        "attention",
        "ffn",
    )

    damping: float = Field(
        0.01, gt=0, description="added to the Gram matrix's diagonal where units are chosen, over the mean"
    )
    refit_damping: float = Field(0.03, gt=0, description="penalty on moving a weight in the refit, over the same mean")
    dense_aim: float = Field(
        0.3,
        ge=0,
        le=1,
        description="how far refits aim at the dense model's hidden states, and not at what the whole layer would give",
    )
    factored: bool = Field(True, description="query, key and output projections may become products of two factors")
    branch_damping: float = Field(0.1, gt=0, description="penalty on a weight of a branch, over the same mean")
    calibrated: bool = Field(True, description="narrow FFNs may get a linear branch of low rank beside them")
    largest_cut: float = Field(0.8, gt=0, le=1, description="share of a width that may go where its module stays")
    keep_attention: bool = Field(False, description="no layer's attention goes whole, since vLLM takes no such layer")

    # ---------------------------------------------------------------- the gradient pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        inputs = [Gram(ATTENTION_INPUT)] if self.factored else []
        attention = of_parts(shape, attention=[*inputs, Gram(ATTENDED)])
        if isinstance(shape.ffn, ExpertsShape):
            return [*attention, *expert_moments(shape.ffn), *shared_moments(shape.ffn)]
        return [*attention, *of_parts(shape, ffn=self._ffn_moments(self.calibrated))]

    def _ffn_moments(self, calibrated: bool) -> Sequence[Moment]:
        branch = [Gram(FFN_INPUT), Cross(FFN_INPUT, NEURONS)] if calibrated else []
        return [Gram(NEURONS), *branch]

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        inner = [Gram(QUERIES.gradient), Gram(KEYS.gradient)] if self.factored else []
        attention = [*inner, Gram(ATTENTION_OUTPUT.gradient)]
        if shape.attention:
            groups, pairs = shape.attention.kv_heads, shape.attention.query_key_dim // 2
            attention.append(ScalingPower(QUERIES, QUERIES.gradient, groups, pairs))
        # One metric serves all experts of a mixture.
        ffn = [Gram(FFN_OUTPUT.gradient)] if shape.ffn else []
        return [*of_parts(shape, attention=attention), *ffn]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        profile: dict[str, Tensor] = {}
        if layer.attention:
            profile |= self._attention_profile(layer.attention, statistics)
        if isinstance(layer.ffn, Experts):
            profile |= mixture_curves(layer.ffn, statistics, self.damping)
        elif layer.ffn:
            profile |= ffn_curve(layer.ffn, statistics, self.damping)
        if isinstance(layer.ffn, FeedForward) and self.calibrated:
            order = profile["neuron_order"]
            profile |= branch_savings(layer.ffn, statistics, order, self.damping, self.branch_damping)
        return profile

    def _attention_profile(self, attention: Attention, statistics: LayerStatistics) -> Profile:
        if attention.shape.is_factored:
            return attention_profile(attention.shape)
        factors = truncations(attention, statistics, self.damping) if self.factored else {}
        return {**attention_curves(attention, statistics, self.damping), **factors}

    def overview_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return power_moments(shape.ffn) if isinstance(shape.ffn, ExpertsShape) else ()

    def expert_profiler(self, layer: DecoderLayer, statistics: LayerStatistics) -> ProfileExperts | None:
        return expert_profiler(layer.ffn, statistics, self.damping) if isinstance(layer.ffn, Experts) else None

    def even_profile(self, shape: LayerShape) -> Profile:
        return even_profile(shape)

    def profile_bytes(self, hidden_size: int, shape: LayerShape) -> int:
        factors = truncations_bytes(hidden_size, shape.attention) if self.factored and shape.attention else 0
        has_branches = self.calibrated and isinstance(shape.ffn, FeedForwardShape)
        return factors + has_branches * hidden_size**2 * torch.float32.itemsize

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        if target.sparsity:
            check_reachable(target, self._reach(align))

    def _reach(self, align: int) -> Reach:
        return Reach(align, 1 - self.largest_cut, self.keep_attention)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        if target.sparsity == 0:
            return Plan(target.dense_shapes, predicted_loss=0.0, gap=0.0, by_layer=[0.0] * len(profiles))
        if target.layout == "stock":
            return allocate_equally(target, profiles, self._reach(align))
        return plan_by_menus(target, self.menus(target, profiles, align), align)

    def menus(self, target: Target, profiles: Sequence[Profile], align: int) -> Sequence[Menu]:
        return [*all_menus(target, profiles, self._reach(align))]

    def cost_curves(self, shape: LayerShape, profile: Profile) -> Mapping[str, CostCurve]:
        return recorded_curves(shape, profile)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def aims_at_dense(self, shape: LayerShape) -> bool:
        return self.dense_aim > 0 and not isinstance(shape.ffn, ExpertsShape)

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        layer, planned = given.layer, given.planned
        if layer.attention and planned.attention != layer.attention.shape:
            pruned = planned.attention and self._prune_attention(layer, planned.attention, given)
            layer = replace(layer, attention=pruned)
        if isinstance(layer.ffn, Experts) and planned.ffn is not None:
            return self._prune_mixture(layer, planned.ffn, given)
        if layer.ffn and planned.ffn != layer.ffn.shape:
            pruned = planned.ffn and self._prune_ffn(layer, planned.ffn, given)
            layer = replace(layer, ffn=pruned)
        return layer

    def _prune_attention(self, layer: DecoderLayer, planned: AttentionShape, given: LayerToPrune) -> Attention:
        """Queries and keys come first: the output projection is refitted to what attention attends to with theirs."""
        attention, dense, profile = layer.attention, layer.attention.shape, given.profile
        if gone := (dense.query_key_dim - planned.query_key_dim) // 2:
            attention = keep_rotary_pairs(attention, profile["pair_order"][:, gone:].sort(dim=1).values)
        attention = replace(
            attention,
            query=truncated(attention.query, planned.query_rank, profile, "query"),
            key=truncated(attention.key, planned.key_rank, profile, "key"),
        )
        if (planned.kv_heads, planned.value_dim) != (dense.kv_heads, dense.value_dim):
            attention = self._prune_values(replace(layer, attention=attention), planned, given)
        return replace(attention, output=truncated(attention.output, planned.output_rank, profile, "output"))

    def _prune_values(self, layer: DecoderLayer, planned: AttentionShape, given: LayerToPrune) -> Attention:
        """The values are rotated, groups and the last of each group's values go, and the output is refitted."""
        dense, order = layer.attention.shape, given.profile["group_order"]
        attention = rotate_values(layer.attention, given.profile["value_rotation"])
        moments = [Gram(ATTENDED), *self._errors(ATTENTION_ERROR, ATTENDED, given)]
        statistics = given.observe(replace(layer, attention=attention), moments)
        groups = order[dense.kv_heads - planned.kv_heads :].sort().values
        heads = heads_of_groups(groups, dense.heads_per_group)
        values = torch.arange(planned.value_dim, device=order.device)
        kept = (heads.flatten()[:, None] * dense.value_dim + values).flatten()
        # Factored queries and keys always have all of their heads.
        pruned = keep_heads(attention, heads) if planned.kv_heads < dense.kv_heads else attention
        pruned = keep_values(pruned, values.expand(planned.kv_heads, -1))
        elsewhere = -self._wanted_besides(ATTENTION_ERROR, ATTENDED, given, statistics, kept)
        gram = statistics.gram(ATTENDED)
        return replace(pruned, output=self._refit(attention.output, kept, gram, elsewhere))

    def _prune_ffn(self, layer: DecoderLayer, planned: FeedForwardShape, given: LayerToPrune) -> FeedForward:
        ffn, rank, profile = layer.ffn, planned.branch_rank, given.profile
        moments = [*self._ffn_moments(rank is not None), *self._errors(FFN_ERROR, NEURONS, given)]
        statistics = given.observe(layer, moments)
        gram = statistics.gram(NEURONS)
        kept = profile["neuron_order"][ffn.shape.width - planned.width :].sort().values
        pruned = keep_neurons(ffn, kept)
        elsewhere = -self._wanted_besides(FFN_ERROR, NEURONS, given, statistics, kept)
        if rank is None:
            return replace(pruned, down=self._refit(ffn.down, kept, gram, elsewhere))
        input_gram, cross = statistics.gram(FFN_INPUT), statistics.cross(FFN_INPUT, NEURONS)
        whole, unknown = linear_branch(ffn.down.weight.float(), kept, gram, input_gram, cross, self.branch_damping)
        left, right, _ = output_projections(whole, unknown, profile["ffn_metric_root"].double())
        branch = projected(Linear(whole), left, right, rank)
        elsewhere = elsewhere + branch.left @ (branch.right @ cross[:, kept])
        return replace(pruned, down=self._refit(ffn.down, kept, gram, elsewhere), branch=branch)

    def _errors(self, error: Site, inputs: Site, given: LayerToPrune) -> Sequence[Moment]:
        """What is asked for to aim at the dense model's hidden states with a projection of these inputs."""
        return [Cross(error, inputs)] if given.sees_errors and self.dense_aim else []

    def _wanted_besides(
        self, error: Site, inputs: Site, given: LayerToPrune, statistics: LayerStatistics, kept: Tensor
    ) -> Tensor | float:
        """What a projection of the ``kept`` inputs is to give beside what the whole one gives, E[yᵀz], (out, kept)."""
        if not self._errors(error, inputs, given):
            return 0.0
        return self.dense_aim * statistics.cross(error, inputs)[:, kept]

    def _prune_mixture(self, layer: DecoderLayer, planned: ExpertsShape, given: LayerToPrune) -> DecoderLayer:
        """Whole experts go first: the others are refitted at the tokens that reach them then."""
        dense, profile = layer.ffn.shape, given.profile
        experts, numbers = without_experts(layer.ffn, planned, profile)
        layer = replace(layer, ffn=experts)
        if planned == experts.shape:
            return layer
        orders = profile["expert_orders"][numbers]

        def narrow(some: Experts, own: range, statistics: LayerStatistics) -> Experts:
            if planned.width == dense.width:
                return some
            return narrowed(some, own, planned.width, orders[own.start : own.stop], statistics, self._refit)

        moments = [*(expert_moments(experts.shape) if planned.width < dense.width else ()), *shared_moments(dense)]
        layer, statistics = given.change_experts(layer, moments, narrow)
        if planned.shared == dense.shared:
            return layer
        gone = dense.shared.width - planned.shared.width
        kept, down = profile["shared_order"][gone:].sort().values, experts.shared.down
        shared = keep_neurons(experts.shared, kept)
        shared = replace(shared, down=self._refit(down, kept, statistics.gram(SHARED_NEURONS)))
        return replace(layer, ffn=replace(layer.ffn, shared=shared))

    def _refit(
        self, projection: Linear, kept: Tensor, gram: Tensor, elsewhere: Tensor | float = 0.0, caution: float = 1.0
    ) -> Linear:
        """The projection of the ``kept`` input channels that best gives what all of them gave.

        Args:
            elsewhere: what is given by something else of it, E[yᵀz] with the kept input channels z, (out, kept).
            caution: how many times the usual penalty there is on moving a weight.
        """
        weight = projection.weight.float()
        wanted = weight @ gram[:, kept] - elsewhere
        refitted = ridge_towards(weight[:, kept], gram[kept][:, kept], wanted, caution * self.refit_damping)
        return Linear(refitted, projection.bias)

    # ---------------------------------------------------------------- what it takes


def truncated(projection: Linear, rank: int | None, profile: Profile, name: str) -> Projection:
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
    is_stock = target.layout == "stock"
    if is_stock:
        reachable = bool(choices_alike(target, reach))
    else:
        reachable = target.amount(smallest(target, reach)) <= target.remaining
    if not reachable:
        raise InputError(
            f"sparsity {target.sparsity:g} can't be reached"
            + (" with the same widths in every layer. Leave --layout out, or ask" if is_stock else ". Ask")
            + " for a lower --sparsity."
        )
