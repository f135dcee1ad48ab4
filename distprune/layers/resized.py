"""Parts on the meta device in another shape than they have: what their tensors would be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distprune.layers.parts import Attention, Experts, FeedForward, Linear, LowRank, Projection, outputs_of
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape


def resize_attention(attention: Attention, shape: AttentionShape) -> Attention:
    """The attention in a shape whose numbers of heads, widths and ranks may differ from its own."""
    hidden = inputs_of(attention.query)
    query_width = outputs_of(attention.query) // attention.query_heads  # some families' queries carry gates along
    if shape.query_key_dim != attention.shape.query_key_dim:
        query_width = shape.query_key_dim
    pairs = None
    if shape.query_key_dim < attention.shape.query_key_dim or attention.rotary_pairs is not None:
        pairs = torch.empty(shape.kv_heads, shape.query_key_dim // 2, dtype=torch.int64, device="meta")
    return Attention(
        shape.query_heads,
        shape.kv_heads,
        query=projection(attention.query, shape.query_heads * query_width, hidden, shape.query_rank),
        key=projection(attention.key, shape.kv_heads * shape.query_key_dim, hidden, shape.key_rank),
        value=matrix(attention.value, shape.kv_heads * shape.value_dim, hidden),
        output=with_bias(
            projection(attention.output, hidden, shape.query_heads * shape.value_dim, shape.output_rank),
            shape.output_bias,
        ),
        rotary_pairs=pairs,
    )


def resize_ffn(ffn: FeedForward, shape: FeedForwardShape) -> FeedForward:
    """The feed-forward network in another shape; a network has a gate or not, whatever the shape."""
    hidden, rank = inputs_of(ffn.up), shape.branch_rank
    down = matrix(ffn.down, hidden, shape.width)
    return FeedForward(
        gate=None if ffn.gate is None else matrix(ffn.gate, shape.width, hidden),
        up=matrix(ffn.up, shape.width, hidden),
        down=replace(down, bias=added_bias(down, shape.down_bias)),
        branch=None
        if rank is None
        else LowRank(empty_like(ffn.up.weight, rank, hidden), empty_like(ffn.up.weight, hidden, rank)),
    )


def resize_experts(experts: Experts, shape: ExpertsShape) -> Experts:
    """The mixture with another number of experts, of another width."""
    _, projections, _, hidden = experts.inputs.shape
    count, width, shared = shape.count, shape.width, shape.shared
    bias, down_bias, correction = experts.input_bias, experts.down_bias, experts.correction
    return replace(
        experts,
        router=matrix(experts.router, count, hidden),
        inputs=empty_like(experts.inputs, count, projections, width, hidden),
        down=empty_like(experts.down, count, hidden, width),
        input_bias=None if bias is None else empty_like(bias, count, projections, width),
        down_bias=None if down_bias is None else empty_like(down_bias, count, hidden),
        correction=None if correction is None else empty_like(correction, count),
        shared=None if experts.shared is None or shared is None else resize_ffn(experts.shared, shared),
    )


def inputs_of(linear: Projection) -> int:
    """How wide a projection's input is."""
    return (linear.weight if isinstance(linear, Linear) else linear.right).shape[1]


def matrix(like: Linear, outputs: int, inputs: int) -> Linear:
    bias = None if like.bias is None else empty_like(like.bias, outputs)
    return Linear(empty_like(like.weight, outputs, inputs), bias)


def projection(like: Projection, outputs: int, inputs: int, rank: int | None = None) -> Projection:
    weight = like.weight if isinstance(like, Linear) else like.left
    bias = None if like.bias is None else empty_like(like.bias, outputs)
    if rank is None:
        return Linear(empty_like(weight, outputs, inputs), bias)
    return LowRank(empty_like(weight, rank, inputs), empty_like(weight, outputs, rank), bias)


def with_bias(linear: Projection, wanted: bool) -> Projection:
    return replace(linear, bias=added_bias(linear, wanted))


def added_bias(linear: Projection, wanted: bool) -> Tensor | None:
    """The projection's bias, or one that it is to get."""
    if not wanted or linear.bias is not None:
        return linear.bias
    weight = linear.weight if isinstance(linear, Linear) else linear.left
    return empty_like(weight, len(weight))


def empty_like(tensor: Tensor, *dims: int) -> Tensor:
    return torch.empty(*dims, dtype=tensor.dtype, device="meta")
