"""Finding the parts of a layer in its family's class."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from distprune.families import Family
from distprune.layers.empty import empty_weights
from distprune.layers.names import LayerNames
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape


def describe(family: Family, cls: type[nn.Module], config: PreTrainedConfig, index: int) -> DecoderLayer:
    """A layer of a class that is built from a configuration, on the meta device.

    What is not made as the family's names say, a linear-attention mixer or experts, is in the layer's ``rest``.
    """
    with empty_weights():
        module = cls(config, index)
    shape = LayerShape(attention_shape(family, module, config), ffn_shape(family, module))
    return LayerNames(family, shape.attention).layer_from_state(module.state_dict(), shape)


def attention_shape(family: Family, module: nn.Module, config: PreTrainedConfig) -> AttentionShape | None:
    """The shape of a layer's attention; None where it is of a kind that is not known."""
    attention = getattr(module, family.attention, None)
    inputs = [family.qkv.name] if family.qkv else [family.query, family.key, family.value]
    if attention is None or not are_linear(attention, *inputs, family.output):
        return None
    heads = getattr(config, family.heads)
    groups = (getattr(config, family.kv_heads, None) if family.kv_heads else None) or heads
    output = getattr(attention, family.output)
    width = output.in_features // heads
    shape = AttentionShape(heads, groups, width, width, output_bias=output.bias is not None)
    return shape if fits(family, attention, shape) else None


def fits(family: Family, attention: nn.Module, shape: AttentionShape) -> bool:
    """Whether the projections have the widths of grouped-query attention; queries may have gates beside them."""
    queries, groups = shape.query_heads * shape.query_key_dim, shape.kv_heads * shape.query_key_dim
    if family.qkv:
        return getattr(attention, family.qkv.name).out_features == queries + 2 * groups
    query, key, value = (getattr(attention, name).out_features for name in (family.query, family.key, family.value))
    return query % queries == 0 and key == value == groups


def ffn_shape(family: Family, module: nn.Module) -> FeedForwardShape | None:
    """The shape of a layer's feed-forward network; None where it is of a kind that is not known."""
    ffn = module if family.ffn is None else getattr(module, family.ffn, None)
    if family.gate_up is not None:
        inputs = [family.gate_up.name]
    else:
        inputs = [family.up] if family.gate is None else [family.gate, family.up]
    if not are_linear(ffn, *inputs, family.down):
        return None
    down = getattr(ffn, family.down)
    is_gated = family.gate_up is not None or family.gate is not None
    return FeedForwardShape(down.in_features, down_bias=down.bias is not None, is_gated=is_gated)


def are_linear(module: nn.Module | None, *names: str) -> bool:
    """Whether a module has linear maps of these names."""
    return module is not None and all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
