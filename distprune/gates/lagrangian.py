"""The augmented Lagrangian that holds an expected size at a target (Wang et al., EMNLP 2020, section 3.3).

With the expected size s and its target t, the penalty λ₁(s - t) + λ₂(s - t)² joins the loss. The loss is minimized in
what s depends on and maximized in λ₁ and λ₂, so that these move until s is t. λ₁ alone would swing about its value; the
greater λ₂, the less.
"""

from __future__ import annotations

from torch import Tensor


def penalty(size: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """λ₁(s - t) + λ₂(s - t)², (), of a size s, (), and multipliers, (2,); differentiable in the size."""
    excess = size - target
    return multipliers[0] * excess + multipliers[1] * excess.square()


def ramped(target: float, step: int, steps: int) -> float:
    """The target of a step, counted from 0: it falls from the whole, 1, in a line, and is reached after ``steps``."""
    return 1 - (1 - target) * min(1.0, (step + 1) / max(1, steps))
