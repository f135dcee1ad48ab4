"""LLM-Pruner: on the structural pruning of large language models (Ma et al., NeurIPS 2023).

What a unit is worth is how much the loss would change without it, to first order and weight by weight: the sum of
|w·∂L/∂w| over all weights that go together ("element-wise", with the gradient of the whole calibration set). Units are
compared within their layer; the first and last layers stay whole, and the others all lose as much. Heads leave by whole
KV groups, where the paper's models have one to a head.

Left out: the variants of the importance (a vector's, the diagonal Fisher's), and the fine-tuning that follows.
"""

from __future__ import annotations

from typing import ClassVar

from distprune.methods.base import Paper
from distprune.methods.gradient_units import GradientUnits


class LLMPruner(GradientUnits):
    """Removes the units without which the loss would change least, to first order."""

    name: ClassVar[str] = "llm-pruner"
    paper: ClassVar[Paper | None] = Paper(
        "LLM-Pruner: On the Structural Pruning of Large Language Models (Ma et al., NeurIPS 2023)", "2305.11627"
    )
