"""HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space (ICLR 2026, arXiv 2509.22299).

Neuron k of an expert, with its column w_k of the down projection an "atomic expert", adds e_k(x) = r a_k(x) w_k to the
output of the tokens that are routed to the expert with the router's weight r. Without it the loss rises, to second
order, by ½ E[e_kᵀ G e_k] = ½ E[r² a_k²] w_kᵀ G w_k, where G = E[gᵀg] is of the loss's gradient g at the mixture's
output, one for all experts of a layer. The expectations are over all tokens: where a token is not routed, e_k is 0.

Neurons are ranked over all mixtures of the model, and nothing makes up for those that go. Here all experts of a layer
keep as many, so that what is ranked are steps of width: a step costs what the neurons cost together that each expert
would lose by it. Shared experts go with the others where they have no width of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distprune.budgets import Curve, Target, allocate
from distprune.layers.parts import DecoderLayer, Experts, FeedForward
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.layers.sites import FFN_OUTPUT, NEURONS
from distprune.methods.base import LayerToPrune, Method, Paper, Plan, Profile
from distprune.methods.networks import OF_SHARED, moments_of_each, profile_each, prune_each
from distprune.methods.scored_units import keep_best_profiled
from distprune.statistics import Gram, LayerStatistics, Moment, Power


class Heapr(Method):
    """Removes the neurons of experts that the loss misses least, to second order."""

    name: ClassVar[str] = "heapr"
    paper: ClassVar[Paper | None] = Paper(
        "HEAPr: Hessian-based Efficient Atomic Expert Pruning in Output Space (ICLR 2026)", "2509.22299"
    )
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")
    removes: ClassVar[tuple[str, ...]] = ("experts",)

    # ---------------------------------------------------------------- the gradient pass

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        if not isinstance(shape.ffn, ExpertsShape):
            return []
        return [Gram(FFN_OUTPUT.gradient), *moments_of_each(shape.ffn, [Power(NEURONS)])]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """What each neuron costs in nats, over the tokens that its expert sees."""
        if not isinstance(layer.ffn, Experts):
            return {}
        metric = statistics.gram(FFN_OUTPUT.gradient)

        def costs(network: FeedForward, own: LayerStatistics) -> Profile:
            down = network.down.weight.float()
            return {"neurons": own.power(NEURONS) * (down * (metric @ down)).sum(dim=0) / 2}

        return profile_each(layer.ffn, statistics, costs)

    def even_profile(self, shape: LayerShape) -> Profile:
        return {"neurons": torch.linspace(0, 1, shape.ffn.width)} if isinstance(shape.ffn, ExpertsShape) else {}

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, [self.even_profile(shape) for shape in target.dense_shapes], align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        """The widths at which the target is met and the neurons that go cost least together."""
        shapes = target.dense_shapes
        if target.sparsity == 0:
            return Plan(shapes)
        curves, options = [], {}
        for index, shape in enumerate(shapes):
            if isinstance(shape.ffn, ExpertsShape) and target.removable(index).neurons:
                widths = [*range(shape.ffn.width, 0, -align)]
                options[index] = [shape.with_ffn(width=width) for width in widths]
                amounts = [target.ffn_amount(index, narrower.ffn) for narrower in options[index]]
                curves.append(Curve(costs_of_widths(profiles[index], shape.ffn, widths), amounts))
        rest = target.dense - sum(target.ffn_amount(index, shapes[index].ffn) for index in options)
        allocation = allocate(curves, target.remaining - rest)
        for index, choice in zip(options, allocation.choices, strict=True):
            shapes[index] = options[index][choice]
        costs = dict(zip(options, allocation.costs, strict=True))
        by_layer = [costs.get(index, 0.0) for index in range(len(shapes))]
        return Plan(shapes, allocation.cost, allocation.gap, by_layer)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        return prune_each(given, given.layer.attention, keep_best_profiled)


def costs_of_widths(profile: Profile, dense: ExpertsShape, widths: Sequence[int]) -> list[float]:
    """What the loss rises by where all experts have lost their cheapest neurons, in nats a token."""

    def lost(costs: Tensor, neurons: int) -> float:
        return costs.sort().values[:neurons].double().sum().item()

    def cost(width: int) -> float:
        gone = dense.width - width
        experts = dense.per_token * lost(profile["neurons"], gone)
        if not dense.shared_count or OF_SHARED + "neurons" not in profile:
            return experts
        return experts + lost(profile[OF_SHARED + "neurons"], dense.shared_count * gone)

    return [cost(width) for width in widths]
