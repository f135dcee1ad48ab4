"""What of a layer its family's class can be built without, or what stands in for it can."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from distprune.layers.parts import Experts, FeedForward, outputs_of
from distprune.layers.rotary import turns_halves
from distprune.layers.shapes import LayerShape, Removable

if TYPE_CHECKING:
    from distprune.layers.architecture import Architecture

#: What families call their norms of queries and keys, which values don't pass through.
HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")

#: What families call a norm of a head's values; it may have no weights, so that no tensor tells of it.
VALUE_NORM = "v_norm"


def find_removable(architecture: Architecture, index: int) -> Removable:
    """What may go, found out by building the layer's class on the meta device."""
    family, layer = architecture.family, architecture.dense_layer(index)
    found: dict[str, bool] = {}
    if layer.attention is not None and not layer.attention.shape.is_factored:
        shape = layer.attention.shape
        beside = {name.split(".")[1] for name in layer.rest if architecture.names(index).is_in_attention(name)}
        normed = beside.intersection(HEAD_NORMS)
        # Gates, norms or sinks of what attention gives know their values one by one.
        has_values_of_its_own = outputs_of(layer.attention.query) != shape.query_heads * shape.query_key_dim
        attention = getattr(_module(architecture, index, layer.shape), family.attention)
        mixes = family.mixes_pairs
        if mixes is None:
            mixes = turns_halves(type(attention), architecture.config)
        found |= {
            "attention": True,
            "factors": True,
            "heads": can_have_fewer_heads(architecture, index),
            "values": beside == normed and not has_values_of_its_own and not hasattr(attention, VALUE_NORM),
            "pairs": not beside and not has_values_of_its_own and mixes and shape.query_key_dim % 2 == 0,
        }
    if layer.ffn is not None:
        found |= {
            "neurons": can_be_built(architecture, index, layer.shape.with_ffn(width=1)),
            "branch": family.ffn is not None and isinstance(layer.ffn, FeedForward) and layer.ffn.branch is None,
            "ffn": family.ffn is not None,
        }
    if isinstance(layer.ffn, Experts):
        fewer = replace(layer.ffn.shape, count=layer.ffn.fewest)
        found["experts"] = can_be_built(architecture, index, replace(layer.shape, ffn=fewer))
    return Removable(**found)


def can_have_fewer_heads(architecture: Architecture, index: int) -> bool:
    family, shape = architecture.family, architecture.dense_shape(index)
    if family.head_dim is None or family.kv_heads is None:
        return False
    if shape.attention is None or shape.attention.query_heads == 1:
        return False
    return can_be_built(architecture, index, shape.with_attention(query_heads=1, kv_heads=1))


def can_be_built(architecture: Architecture, index: int, shape: LayerShape) -> bool:
    """Whether the class, built with a shape's numbers, has the tensors of that shape and no others."""
    try:
        module = _module(architecture, index, shape)
    except (ValueError, RuntimeError, AssertionError, TypeError, ZeroDivisionError):
        return False
    tensors = architecture.layer_tensors(index, shape)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == tensors


def _module(architecture: Architecture, index: int, shape: LayerShape) -> nn.Module:
    from distprune.layers.module import empty_layer  # which imports what imports this module

    return empty_layer(architecture, index, shape)
