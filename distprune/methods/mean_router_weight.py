"""Experts by the router's weight: those go that the router counts on least.

A usual baseline of whole-expert pruning: an expert is worth the mean of the router's weight over all tokens, which is 0
at those that are not routed to it. What the expert makes of them is not looked at. Experts are compared within their
layer, and every mixture loses as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distprune.layers.parts import Experts
from distprune.layers.shapes import ExpertsShape
from distprune.layers.sites import ROUTER_WEIGHT
from distprune.methods.scored_experts import ScoredExperts
from distprune.statistics import LayerStatistics, Mean, Moment


class MeanRouterWeight(ScoredExperts):
    """Removes the experts that have the least mean weight over all tokens."""

    name: ClassVar[str] = "mean-router-weight"

    def moments(self, shape: ExpertsShape) -> Sequence[Moment]:
        return [Mean(ROUTER_WEIGHT.of(expert)) for expert in range(shape.count)]

    def score_experts(self, experts: Experts, statistics: LayerStatistics) -> Tensor:
        """The sum over the tokens, which are as many for all experts."""
        sites = [moment.site for moment in self.moments(experts.shape)]
        return torch.cat([statistics.mean(site) * statistics.tokens(site) for site in sites])
