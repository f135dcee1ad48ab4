"""Which shapes a plain configuration of the original architecture can describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distprune.modeling import LayerShape, PrunedConfig


def is_stock(config: PrunedConfig, shapes: Sequence[LayerShape]) -> bool:
    """Whether the layers are all alike and have lost whole heads and FFN neurons alone.

    Args:
        config: the dense model.
        shapes: its pruned layers.
    """
    first, dense = shapes[0], config.dense_shape()
    if not (first.has_attention and first.has_ffn):
        return False
    plain = replace(dense, query_heads=first.query_heads, kv_heads=first.kv_heads, ffn_width=first.ffn_width)
    return has_plain_heads(config, first) and all(shape == plain for shape in shapes)


def has_plain_heads(config: PrunedConfig, shape: LayerShape) -> bool:
    """Whether all heads are there, or as many as transformers' Llama admits, which divide the hidden size."""
    return shape.query_heads == config.num_attention_heads or config.hidden_size % shape.query_heads == 0
