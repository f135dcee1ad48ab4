"""The hard concrete distribution (Louizos et al., ICLR 2018), with the constants of FLOP (Wang et al., EMNLP 2020).

A gate z is in [0, 1], and exactly 0 and exactly 1 with a probability above zero: a logistic variable goes through a
sigmoid, is stretched to (l, r) with l < 0 and r > 1, and is clipped. So z can be differentiated with respect to its
parameter log α, and how likely z is not 0 has a closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The temperature β, and the interval (l, r) that samples are stretched to.
BETA, LEFT, RIGHT = 1.0, -0.1, 1.1


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The gates that uniform numbers in (0, 1) draw, of ``log_alpha``'s shape; differentiable."""
    noise = uniform.log() - (-uniform).log1p()
    stretched = torch.sigmoid((noise + log_alpha) / BETA) * (RIGHT - LEFT) + LEFT
    return stretched.clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z ≠ 0) of every gate, whose sum is the expected number of open gates; differentiable."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LEFT / RIGHT))
