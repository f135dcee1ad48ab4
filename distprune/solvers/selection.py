"""Choosing which units to keep."""

from __future__ import annotations

import torch
from torch import Tensor


def most_important(importance: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` largest entries along the last axis, ascending; ties go to the lower index."""
    order = torch.argsort(importance, dim=-1, descending=True, stable=True)
    return order[..., :keep].sort(dim=-1).values


def most_and_least_important(importance: Tensor, keep: int, keep_least: int) -> Tensor:
    """Indices of ``keep`` entries, ascending: the ``keep_least`` smallest and the largest for the rest.

    Olica's published code keeps the least important percent of FFN neurons.
    """
    order = torch.argsort(importance, descending=True, stable=True)
    keep_least = min(keep_least, keep)
    kept = torch.cat([order[: keep - keep_least], order[len(order) - keep_least :]])
    return kept.sort().values


def others(kept: Tensor, count: int) -> Tensor:
    """The indices below ``count`` that are not among those ``kept``, (kept,), ascending."""
    is_kept = torch.zeros(count, dtype=torch.uint8, device=kept.device).index_fill(0, kept, 1)
    return torch.argsort(is_kept, stable=True)[: count - len(kept)]


def channels_of(units: Tensor, width: int) -> Tensor:
    """The channels of the given units, each of which has ``width`` of them in a row, (units · width,)."""
    return (units.flatten()[:, None] * width + torch.arange(width, device=units.device)).flatten()
