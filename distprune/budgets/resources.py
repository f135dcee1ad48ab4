"""What a budget may be of, and how much of it a layer of some shape takes.

Every amount is a whole number, a layer's is the sum of its attention's and its FFN's, and the decoder's is the sum of
its layers'. A module takes the norm before it along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from distprune.decoder_layer import origin_of
from distprune.modeling import ROTARY_PAIRS, LayerShape, PrunedConfig, layer_tensor_shapes

#: - parameters: numbers stored, norms and biases included
#: - flops: for one token, twice the multiply-adds of all linear maps and of attention to ``CONTEXT`` tokens
#: - kv-cache: bytes of keys and values that a token leaves
#: - bytes: of the tensors in the checkpoint
Resource = Literal["parameters", "flops", "kv-cache", "bytes"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)

#: How many tokens the generated one looks at, or as many as a sliding window shows it.
CONTEXT = 2048

FFN_PREFIXES = ("mlp.", "post_attention_layernorm.")

#: Changes that leave the other part of a shape alone, so that layers are told apart by no more than what is asked of.
NO_ATTENTION = {
    **dict.fromkeys(("query_heads", "kv_heads", "query_key_dim", "value_dim"), 0),
    **dict.fromkeys(("query_rank", "key_rank", "output_rank"), None),
    "output_bias": False,
}
NO_FFN = {"ffn_width": 0, "calibration_rank": None, "down_bias": False}


#: Bytes of one number of each tensor of a dense layer, by the tensor's name in the layer.
ItemSizes = Mapping[str, int]


@dataclass(frozen=True)
class StoredSizes:
    """How large a dense checkpoint's numbers are, which may differ from tensor to tensor.

    Attributes:
        layers: of each layer.
        outer: bytes in all outside the decoder layers.
    """

    layers: tuple[ItemSizes, ...]
    outer: int


def amount(
    resource: Resource, config: PrunedConfig, index: int, shape: LayerShape, sizes: ItemSizes | None = None
) -> int:
    """What layer ``index`` takes if it has ``shape``.

    ``sizes`` are for bytes: how the dense layer is stored; by default, all of it in the configuration's dtype.
    """
    parts = attention_amount, ffn_amount
    return sum(part(resource, config, index, shape, sizes) for part in parts)


def attention_amount(
    resource: Resource, config: PrunedConfig, index: int, shape: LayerShape, sizes: ItemSizes | None = None
) -> int:
    """What its attention takes, whatever the shape of its FFN."""
    if resource == "kv-cache":
        return shape.kv_heads * (shape.query_key_dim + shape.value_dim) * itemsize(config)
    tensors = layer_tensor_shapes(config, index, replace(shape, **NO_FFN))
    # Which rotary pairs are left is told by indices, which are no parameters.
    own = {name: dims for name, dims in tensors.items() if not name.startswith(FFN_PREFIXES) and name != ROTARY_PAIRS}
    if resource == "flops":
        seen = context(config, index)
        return linear_flops(own) + 2 * shape.query_heads * (shape.query_key_dim + shape.value_dim) * seen
    return stored(resource, config, own, sizes)


def ffn_amount(
    resource: Resource, config: PrunedConfig, index: int, shape: LayerShape, sizes: ItemSizes | None = None
) -> int:
    """What its FFN takes, with the linear branch beside it, whatever the shape of its attention."""
    if resource == "kv-cache":
        return 0
    tensors = layer_tensor_shapes(config, index, replace(shape, **NO_ATTENTION))
    own = {name: dims for name, dims in tensors.items() if name.startswith(FFN_PREFIXES)}
    return linear_flops(own) if resource == "flops" else stored(resource, config, own, sizes)


def outer_amount(resource: Resource, config: PrunedConfig, sizes: StoredSizes | None = None) -> int:
    """What is taken outside the decoder layers: by embedding, final norm and head."""
    table = (config.vocab_size, config.hidden_size)
    if resource == "kv-cache":
        return 0
    if resource == "flops":
        return linear_flops({"head": table})  # an embedding is looked up
    if resource == "bytes" and sizes:
        return sizes.outer
    tables = {"embedding": table} if config.tie_word_embeddings else {"embedding": table, "head": table}
    return stored(resource, config, {**tables, "norm": (config.hidden_size,)})


def stored(
    resource: Resource, config: PrunedConfig, tensors: Mapping[str, tuple[int, ...]], sizes: ItemSizes | None = None
) -> int:
    """Numbers in tensors of these shapes, or bytes."""
    if resource == "bytes" and sizes:
        return sum(math.prod(dims) * sizes[origin_of(name, sizes)] for name, dims in tensors.items())
    return sum(map(math.prod, tensors.values())) * (itemsize(config) if resource == "bytes" else 1)


def linear_flops(tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Of all linear maps among tensors of these shapes, for one token."""
    return sum(2 * math.prod(dims) for dims in tensors.values() if len(dims) == 2)


def context(config: PrunedConfig, index: int) -> int:
    """How many tokens attention of layer ``index`` looks at."""
    sliding = config.layer_types[index] == "sliding_attention"
    return min(CONTEXT, config.sliding_window) if sliding else CONTEXT


def itemsize(config: PrunedConfig) -> int:
    """Bytes of a number where the model is in the configuration's dtype."""
    return (config.dtype or torch.float32).itemsize
