"""What curvature would find in a layer whose units are worth more or less evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape
from distprune.methods.base import Profile


def even_profile(shape: LayerShape) -> Profile:
    """What goes of a part costs its size times the square of its share; nothing is said of factors."""
    attention = attention_profile(shape.attention) if shape.attention else {}
    if isinstance(shape.ffn, ExpertsShape):
        return attention | mixture_profile(shape.ffn)
    return attention | (ffn_profile(shape.ffn) if shape.ffn else {})


def attention_profile(shape: AttentionShape) -> Profile:
    groups, width = shape.kv_heads, shape.query_key_dim + shape.value_dim

    def of_every_group(costs: Tensor, size: int) -> Tensor:
        return ((1 + shape.query_heads / groups) * size * costs).repeat(groups, 1)

    return {
        "group_order": torch.arange(groups),
        "group_costs": (groups + shape.query_heads) * width * rising(groups),
        "value_costs": of_every_group(rising(shape.value_dim).flip(0), shape.value_dim),
        "pair_costs": of_every_group(rising(shape.query_key_dim // 2), shape.query_key_dim),
    }


def ffn_profile(shape: FeedForwardShape) -> Profile:
    matrices = 3 if shape.is_gated else 2
    return {
        "ffn_widths": torch.arange(shape.width, -1, -1),
        "ffn_costs": matrices * shape.width * rising(shape.width),
    }


def mixture_profile(shape: ExpertsShape) -> Profile:
    of_one = ffn_profile(FeedForwardShape(shape.width, is_gated=shape.is_gated))
    shared = {} if shape.shared is None else ffn_profile(shape.shared)
    # An expert is at work for a part of the tokens.
    costs = of_one["ffn_costs"] * shape.per_token / shape.count
    return {
        "expert_orders": torch.arange(shape.width).repeat(shape.count, 1),
        "expert_widths": of_one["ffn_widths"],
        "expert_costs": costs.repeat(shape.count, 1),
    } | {name.replace("ffn", "shared"): values for name, values in shared.items()}


def rising(units: int) -> Tensor:
    """The square of the share that is gone, from none to all."""
    return (torch.arange(units + 1, dtype=torch.float64) / units).square()
