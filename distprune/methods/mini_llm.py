"""MINI-LLM: memory-efficient structured pruning for large language models (Cheng et al., 2024, arXiv 2407.11681).

A weight's feature map sensitivity is the product of its magnitude, the norm of its input and the loss's gradient,
|w|·rms(x)·|∂L/∂w|; a unit is worth the sum over all weights that go together. It joins Wanda's score |w|·rms(x) with
LLM-Pruner's |w·∂L/∂w|. Heads leave by whole KV groups, where the paper's models have one to a head.

The paper estimates gradients from forward passes alone (SPSA), since exact ones did not fit its memory. Here they are
exact: the gradient pass holds one layer at a time. Left out: the fine-tuning with LoRA that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from distprune.layers.parts import Linear
from distprune.layers.sites import Site
from distprune.methods.base import Paper
from distprune.methods.gradient_units import GradientUnits, weight_changes
from distprune.statistics import LayerStatistics, Moment, Power


class MiniLLM(GradientUnits):
    """Removes the units whose weights, times inputs and gradients, are smallest."""

    name: ClassVar[str] = "mini-llm"
    paper: ClassVar[Paper | None] = Paper(
        "MINI-LLM: Memory-Efficient Structured Pruning for Large Language Models (Cheng et al., 2024)", "2407.11681"
    )

    def input_moments(self, given: Site) -> Sequence[Moment]:
        return [Power(given)]

    def score_weights(self, projection: Linear, statistics: LayerStatistics, output: Site, given: Site) -> Tensor:
        return weight_changes(projection, statistics, output, given).mul_(statistics.rms(given))
