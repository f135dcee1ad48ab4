"""Single weights set to zero, in matrices that keep their size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distprune.layers.parts import Linear


def zero_least(linear: Linear, scores: Tensor, fraction: float) -> Linear:
    """The linear map with the given fraction of its weights zero, to the nearest whole one: those of least score.

    Args:
        scores: of the weights, (out, in).
        fraction: in [0, 1).
    """
    count = round(fraction * scores.numel())
    if not count:
        return linear
    least = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    least[scores.flatten().topk(count, largest=False, sorted=False).indices] = True
    return replace(linear, weight=linear.weight.masked_fill(least.view_as(scores), 0))


def zero_in_groups(linear: Linear, scores: Tensor, kept: int, group: int) -> Linear:
    """The linear map with at most ``kept`` weights that are not zero of every ``group`` neighbours in a row.

    Args:
        scores: of the weights, (out, in), of which ``in`` is a multiple of ``group``.
    """
    grouped = scores.unflatten(1, (-1, group))
    least = grouped.topk(group - kept, dim=-1, largest=False).indices
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, least, True)
    return replace(linear, weight=linear.weight.masked_fill(mask.flatten(1), 0))
