"""REAP: Router-weighted Expert Activation Pruning (Lasby et al., ICLR 2026, arXiv 2510.13999).

An expert is worth the mean, over the tokens that are routed to it, of the norm of what it adds to the mixture's output:
the router's weight times the norm of the expert's own output. Experts are compared within their layer, and every
mixture loses as many. Experts that no token was routed to go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distprune.layers.parts import Experts
from distprune.layers.shapes import ExpertsShape
from distprune.layers.sites import EXPERT_OUTPUT
from distprune.methods.base import Paper
from distprune.methods.scored_experts import ScoredExperts
from distprune.statistics import LayerStatistics, MeanNorm, Moment


class Reap(ScoredExperts):
    """Removes the experts that add least to the output at the tokens that are routed to them."""

    name: ClassVar[str] = "reap"
    paper: ClassVar[Paper | None] = Paper(
        "REAP: Router-weighted Expert Activation Pruning (Lasby et al., ICLR 2026)", "2510.13999"
    )

    def moments(self, shape: ExpertsShape) -> Sequence[Moment]:
        return [MeanNorm(EXPERT_OUTPUT.of(expert)) for expert in range(shape.count)]

    def score_experts(self, experts: Experts, statistics: LayerStatistics) -> Tensor:
        return torch.stack([statistics.mean_norm(moment.site) for moment in self.moments(experts.shape)])
