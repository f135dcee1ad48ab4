"""How large moments are, before any activation is there."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from distprune.layers.shapes import ExpertsShape, FeedForwardShape, LayerShape
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    EXPERT_GATE,
    EXPERT_INPUT,
    EXPERT_NEURONS,
    EXPERT_OUTPUT,
    EXPERT_UP,
    FFN_INPUT,
    FFN_OUTPUT,
    GATE,
    KEYS,
    NEURONS,
    QUERIES,
    ROUTER_WEIGHT,
    SHARED_GATE,
    SHARED_NEURONS,
    SHARED_OUTPUT,
    SHARED_UP,
    UP,
    VALUES,
    Site,
)
from distprune.statistics.moments import Moment


def site_widths(hidden_size: int, shape: LayerShape) -> dict[Site, int]:
    """The width of the activation, and of the gradient, at every site of a layer of the shape."""
    widths: dict[Site, int] = {}
    if attention := shape.attention:
        widths |= dict.fromkeys((ATTENTION_INPUT, ATTENTION_OUTPUT), hidden_size)
        widths[QUERIES] = attention.query_heads * attention.query_key_dim
        widths[KEYS] = attention.kv_heads * attention.query_key_dim
        widths[VALUES] = attention.kv_heads * attention.value_dim
        widths[ATTENDED] = attention.query_heads * attention.value_dim
    if ffn := shape.ffn:
        widths |= dict.fromkeys((FFN_INPUT, FFN_OUTPUT), hidden_size)
    if isinstance(ffn, FeedForwardShape):
        widths |= dict.fromkeys((GATE, UP, NEURONS) if ffn.is_gated else (UP, NEURONS), ffn.width)
    elif ffn:
        widths |= mixture_widths(hidden_size, ffn)
    return widths | {site.gradient: width for site, width in widths.items()}


def mixture_widths(hidden_size: int, shape: ExpertsShape) -> dict[Site, int]:
    """The same at the sites of a mixture's experts, and of what is shared beside them."""
    widths: dict[Site, int] = {}
    inside = (EXPERT_GATE, EXPERT_UP, EXPERT_NEURONS) if shape.is_gated else (EXPERT_UP, EXPERT_NEURONS)
    for expert in range(shape.count):
        widths |= {site.of(expert): shape.width for site in inside}
        widths |= {site.of(expert): hidden_size for site in (EXPERT_INPUT, EXPERT_OUTPUT)}
        widths[ROUTER_WEIGHT.of(expert)] = 1
    if shared := shape.shared:
        gated = (SHARED_GATE,) if shared.is_gated else ()
        widths |= dict.fromkeys((*gated, SHARED_UP, SHARED_NEURONS), shared.width)
        widths[SHARED_OUTPUT] = hidden_size
    return widths


def moment_size(moment: Moment, widths: Mapping[Site, int]) -> int:
    """How many numbers a moment holds, given the sites' widths."""
    return prod(moment.size({site: torch.empty(0, widths[site], device="meta") for site in moment.sites}))
