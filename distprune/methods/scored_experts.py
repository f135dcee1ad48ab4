"""What methods share that remove whole experts: each mixture keeps as many, those of the highest scores, and nothing is
repaired. The router no longer knows the others, so their tokens go to the next best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from distprune.budgets import Target
from distprune.errors import InputError
from distprune.layers.parts import DecoderLayer, Experts
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.methods.base import LayerToPrune, Method, Plan, Profile
from distprune.methods.mixtures import best_experts, keep_experts
from distprune.statistics import LayerStatistics, Moment


class ScoredExperts(Method):
    """A method that is one score. Of the target it meets as much as whole experts can."""

    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous", "stock")
    removes: ClassVar[tuple[str, ...]] = ("experts",)

    def moments(self, shape: ExpertsShape) -> Sequence[Moment]:
        """The moments that the scores need."""
        raise NotImplementedError

    def score_experts(self, experts: Experts, statistics: LayerStatistics) -> Tensor:
        """What the experts are worth, (E,)."""
        raise NotImplementedError

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, (), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        """As many experts in every mixture, such that the whole is nearest to the target."""
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        mixtures = {index: dense[index].ffn for index in range(len(dense)) if target.removable(index).experts}
        options = sorted({count for mixture in mixtures.values() for count in possible_counts(mixture)})
        plans = [[with_experts(shape, count) if index in mixtures else shape for index, shape in enumerate(dense)]
                 for count in options]  # fmt: skip
        amounts = [target.amount(shapes) for shapes in plans]
        # A target below the smallest is met where the next step down, were there one, would not be nearer.
        step = amounts[1] - amounts[0] if len(amounts) > 1 else 0
        if target.remaining < amounts[0] - step / 2:
            raise InputError(
                f"sparsity {target.sparsity:g} can't be reached by {self.name}: with as few experts as the router must "
                f"be able to choose from ({options[0]}), it removes {1 - amounts[0] / target.dense:.1%} of the decoder "
                "layers. Ask for a lower --sparsity, or choose a method that narrows experts too, such as curvature."
            )
        return Plan(min(zip(amounts, plans, strict=True), key=lambda pair: abs(pair[0] - target.remaining))[1])

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return self.moments(dense.ffn) if isinstance(dense.ffn, ExpertsShape) else []

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return self.pruning_moments(shape, shape)

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        experts, planned = given.layer.ffn, given.planned.ffn
        if not isinstance(experts, Experts) or planned == experts.shape:
            return given.layer
        scores = self.score_experts(experts, given.statistics)
        kept = best_experts(scores, planned.count, planned.groups)
        return replace(given.layer, ffn=keep_experts(experts, kept))


def possible_counts(mixture: ExpertsShape) -> range:
    """How many experts a mixture may keep: as many of each group that the router chooses from first."""
    return range(max(mixture.fewest, mixture.groups), mixture.count + 1, mixture.groups)


def with_experts(shape: LayerShape, count: int) -> LayerShape:
    """The layer with so many experts in its mixture, or all where it has fewer."""
    return shape.with_ffn(count=min(count, shape.ffn.count))
