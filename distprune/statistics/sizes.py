"""How large moments are, before any activation is there."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from distprune.layers.shapes import LayerShape
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    GATE,
    KEYS,
    NEURONS,
    QUERIES,
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
        widths |= dict.fromkeys((GATE, UP, NEURONS) if ffn.is_gated else (UP, NEURONS), ffn.width)
    return widths | {site.gradient: width for site, width in widths.items()}


def moment_size(moment: Moment, widths: Mapping[Site, int]) -> int:
    """How many numbers a moment holds, given the sites' widths."""
    return prod(moment.size({site: torch.empty(0, widths[site], device="meta") for site in moment.sites}))
