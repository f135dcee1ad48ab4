"""Finding the parts of a layer in its family's class."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from distprune.families import Family
from distprune.layers.empty import empty_weights
from distprune.layers.expert_names import ExpertNames, find_experts
from distprune.layers.names import LayerNames
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape

#: What configurations may call the number of experts that a token is sent to, and that of shared experts, each as wide
#: as the others.
PER_TOKEN = ("num_experts_per_tok", "moe_k", "top_k_experts")
SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts")


def describe(family: Family, cls: type[nn.Module], config: PreTrainedConfig, index: int) -> DecoderLayer:
    """A layer of a class that is built from a configuration, on the meta device.

    What is not made as the family's names say, such as a linear-attention mixer, is in the layer's ``rest``.
    """
    names, shape, state = names_and_shape(family, cls, config, index)
    return names.layer_from_state(state, shape)


def names_and_shape(
    family: Family, cls: type[nn.Module], config: PreTrainedConfig, index: int
) -> tuple[LayerNames, LayerShape, dict[str, Tensor]]:
    """The names of such a layer's tensors, its shape, and its state."""
    with empty_weights():
        module = cls(config, index)
    mixture = None if family.ffn is None else getattr(module, family.ffn, None)
    experts = None if mixture is None else find_experts(mixture)
    if mixture is not None and experts is not None:
        ffn: FeedForwardShape | ExpertsShape | None = experts_shape(family, mixture, experts, config)
    else:
        ffn = ffn_shape(family, module)
    shape = LayerShape(attention_shape(family, module, config), ffn)
    return LayerNames(family, shape.attention, experts), shape, module.state_dict()


def experts_shape(family: Family, mixture: nn.Module, names: ExpertNames, config: PreTrainedConfig) -> ExpertsShape:
    """The shape of a mixture of experts."""
    down = mixture.state_dict()[names.down]
    width = down.shape[1 if names.is_transposed else 2]
    per_token = said(config, *PER_TOKEN)
    groups, chosen_groups = (said(config, name) or 1 for name in ("n_group", "topk_group"))
    # A group is judged by its two best experts.
    fewest = per_token if groups == 1 else groups * max(2, ceil(per_token / chosen_groups))
    shape = ExpertsShape(len(down), width, per_token=per_token, groups=groups, fewest=fewest, is_gated=names.is_gated)
    shared = None if names.shared is None else getattr(mixture, names.shared)
    if not are_linear(shared, *([family.gate] if family.gate else []), family.up, family.down):
        return shape
    shared_width, count = getattr(shared, family.down).in_features, said(config, *SHARED_COUNTS)
    if count and shared_width == count * width:
        return replace(shape, shared_count=count)
    return replace(shape, shared_width=shared_width)


def said(config: PreTrainedConfig, *names: str) -> Any:
    """What a configuration says under the first of some names that it knows; None where it knows none."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


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
