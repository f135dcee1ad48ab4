"""What a budget may be of, and how much of it a layer of some shape takes.

Every amount is a whole number. A layer's is the sum of what its attention, its feed-forward network and the rest of it
take, and the decoder's is the sum of its layers'. Norms belong to the rest, which no pruning changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from distprune.latency import LatencyTable
from distprune.layers.architecture import Architecture
from distprune.layers.expert_names import EXPERTS
from distprune.layers.names import origin_of
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape

#: - parameters: numbers stored, norms and biases included
#: - active-parameters: those that a token passes through: of a mixture, as many experts as it is sent to
#: - flops: for one token, twice the multiply-adds of all linear maps and of attention to ``CONTEXT`` tokens
#: - kv-cache: bytes of keys and values that a token leaves
#: - bytes: of the tensors in the checkpoint
#: - latency: nanoseconds of the workloads that were measured, by a table
Resource = Literal["parameters", "active-parameters", "flops", "kv-cache", "bytes", "latency"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)
#: Those that of a mixture count the experts that a token is sent to.
OF_A_TOKEN = ("active-parameters", "flops")

#: How many tokens the generated one looks at, or as many as a sliding window shows it.
CONTEXT = 2048

#: Bytes of one number of each tensor of a dense layer, by the tensor's name in the layer.
ItemSizes = Mapping[str, int]
#: Dimensions of tensors, by name.
Dimensions = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredSizes:
    """How large a dense checkpoint's numbers are, which may differ from tensor to tensor.

    Attributes:
        layers: of each layer.
        outer: bytes in all outside the decoder layers.
    """

    layers: tuple[ItemSizes, ...]
    outer: int


def layer_amount(
    resource: Resource,
    model: Architecture,
    index: int,
    shape: LayerShape,
    sizes: ItemSizes | None = None,
    latencies: LatencyTable | None = None,
) -> int:
    """What layer ``index`` takes if it has ``shape``.

    ``sizes`` are for bytes: how the dense layer is stored; by default, all of it in the model's dtype. ``latencies``
    are for latency, which is known from them alone.
    """
    return (
        attention_amount(resource, model, index, shape.attention, sizes, latencies)
        + ffn_amount(resource, model, index, shape.ffn, sizes, latencies)
        + rest_amount(resource, model, index, sizes, latencies)
    )


def attention_amount(
    resource: Resource,
    model: Architecture,
    index: int,
    shape: AttentionShape | None,
    sizes: ItemSizes | None = None,
    latencies: LatencyTable | None = None,
) -> int:
    """What attention of that shape takes; nothing where there is none."""
    if shape is None:
        return 0
    if resource == "latency":
        return measured(latencies).attention_nanoseconds(index, shape)
    widths = shape.query_key_dim + shape.value_dim
    if resource == "kv-cache":
        return shape.kv_heads * widths * itemsize(model)
    tensors = model.attention_tensors(index, shape)
    if resource == "flops":
        return linear_flops(tensors) + 2 * shape.query_heads * widths * context(model, index)
    return stored(resource, model, tensors, sizes)


def ffn_amount(
    resource: Resource,
    model: Architecture,
    index: int,
    shape: FeedForwardShape | ExpertsShape | None,
    sizes: ItemSizes | None = None,
    latencies: LatencyTable | None = None,
) -> int:
    """What a feed-forward network, or a mixture, of that shape takes, its linear branch included; nothing where there
    is none."""
    if shape is None:
        return 0
    if resource == "latency":
        return measured(latencies).ffn_nanoseconds(index, shape)
    tensors = model.ffn_tensors(index, shape)
    if isinstance(shape, ExpertsShape) and resource in OF_A_TOKEN:
        tensors = {name: of_a_token(name, dims, shape) for name, dims in tensors.items()}
    return tensors_amount(resource, model, tensors, sizes)


def of_a_token(name: str, dims: tuple[int, ...], shape: ExpertsShape) -> tuple[int, ...]:
    """The dimensions of what a token passes through, of a mixture's tensor: of the matrices of all experts those of as
    many as it is sent to, one below the other."""
    if f".{EXPERTS}." not in name:
        return dims
    _, *own = dims
    return (shape.per_token * own[0], own[1]) if len(own) == 2 else (shape.per_token * own[0],)


def rest_amount(
    resource: Resource,
    model: Architecture,
    index: int,
    sizes: ItemSizes | None = None,
    latencies: LatencyTable | None = None,
) -> int:
    """What the tensors of layer ``index`` take that belong to no part, whatever is pruned."""
    if resource == "latency":
        return measured(latencies).rest_nanoseconds(index)
    return tensors_amount(resource, model, model.rest_tensors(index), sizes)


def measured(latencies: LatencyTable | None) -> LatencyTable:
    if latencies is None:
        raise ValueError("latency is known from a table of latencies alone.")
    return latencies


def outer_amount(resource: Resource, model: Architecture, sizes: StoredSizes | None = None) -> int:
    """What is taken outside the decoder layers: by embedding, final norm and head; no latency of theirs is known."""
    if resource == "bytes" and sizes:
        return sizes.outer
    if resource == "flops":
        return linear_flops({"head": (model.vocab_size, model.hidden_size)})  # an embedding is looked up
    return tensors_amount(resource, model, model.outer_tensors())


def tensors_amount(resource: Resource, model: Architecture, tensors: Dimensions, sizes: ItemSizes | None = None) -> int:
    """What tensors take that are no part of attention."""
    if resource == "kv-cache":
        return 0
    return linear_flops(tensors) if resource == "flops" else stored(resource, model, tensors, sizes)


def stored(resource: Resource, model: Architecture, tensors: Dimensions, sizes: ItemSizes | None = None) -> int:
    """Numbers in tensors of these shapes, or bytes."""
    if resource == "bytes" and sizes:
        return sum(math.prod(dims) * sizes[origin_of(name, sizes, model.family)] for name, dims in tensors.items())
    return sum(map(math.prod, tensors.values())) * (itemsize(model) if resource == "bytes" else 1)


def linear_flops(tensors: Dimensions) -> int:
    """Of all linear maps among tensors of these shapes, for one token."""
    return sum(2 * math.prod(dims) for dims in tensors.values() if len(dims) == 2)


def context(model: Architecture, index: int) -> int:
    """How many tokens attention of layer ``index`` looks at."""
    window = model.context(index)
    return CONTEXT if window is None else min(CONTEXT, window)


def itemsize(model: Architecture) -> int:
    """Bytes of a number where the model is in its configuration's dtype."""
    return (model.dtype or torch.float32).itemsize
