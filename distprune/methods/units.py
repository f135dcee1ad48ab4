"""Whole units of a layer's parts, and the parts without some of them: query heads and their KV groups, value neurons,
rotary pairs, and neurons of a feed-forward network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distprune.layers.parts import Attention, FeedForward, Linear, Projection, slice_linear
from distprune.solvers import channels_of


def heads_of_groups(groups: Tensor, heads_per_group: int) -> Tensor:
    """The query heads of the given KV groups, a row for each, (groups, heads_per_group)."""
    return groups[:, None] * heads_per_group + torch.arange(heads_per_group, device=groups.device)


def sum_by_unit(channels: Tensor, units: int) -> Tensor:
    """One number a unit from one a channel, (units · width,) to (units,)."""
    return channels.unflatten(0, (units, -1)).sum(dim=1)


# ---------------------------------------------------------------- attention


def keep_heads(attention: Attention, heads: Tensor) -> Attention:
    """Dense attention with the given query heads and the KV groups that they are of.

    Args:
        attention: none of its projections is factored.
        heads: (groups, heads per group), indices of query heads, a row for each KV group that stays; ascending.
    """
    shape, pairs = attention.shape, attention.rotary_pairs
    groups = heads[:, 0] // shape.heads_per_group
    # Some families' queries have gates beside them.
    query_dim = len(attention.query.weight) // shape.query_heads
    return Attention(
        query_heads=heads.numel(),
        kv_heads=len(groups),
        query=slice_linear(attention.query, rows=channels_of(heads, query_dim)),
        key=slice_linear(attention.key, rows=channels_of(groups, shape.query_key_dim)),
        value=slice_linear(attention.value, rows=channels_of(groups, shape.value_dim)),
        output=slice_linear(attention.output, columns=channels_of(heads, shape.value_dim)),
        rotary_pairs=None if pairs is None else pairs[groups],
    )


def keep_rotary_pairs(attention: Attention, pairs: Tensor) -> Attention:
    """Attention whose queries and keys are left with the given rotary pairs, a group's query heads with its key's.

    Args:
        attention: its queries and keys may be dense or low-rank, and may have lost pairs before.
        pairs: (groups, kept), which of the pairs that each KV group now has stay; ascending. Pair i of a head of
            width p is its coordinates i and i + p/2.

    Raises:
        ValueError: the pairs are not as many or not in the order asked for.
    """
    shape = attention.shape
    half = shape.query_key_dim // 2
    ascending = (pairs.diff(dim=1) > 0).all() and pairs.min() >= 0 and pairs.max() < half
    if len(pairs) != shape.kv_heads or not ascending:
        raise ValueError(f"pairs must be ascending indices below {half}, a row for each of {shape.kv_heads} KV groups")
    if pairs.shape[1] == half:
        return attention
    rows = torch.cat([pairs, pairs + half], dim=1)
    key_rows = rows + 2 * half * torch.arange(shape.kv_heads, device=rows.device)[:, None]
    query_rows = rows.repeat_interleave(shape.heads_per_group, dim=0)
    query_rows = query_rows + 2 * half * torch.arange(shape.query_heads, device=rows.device)[:, None]
    kept = attention.rotary_pairs
    return replace(
        attention,
        query=keep_outputs(attention.query, query_rows.flatten()),
        key=keep_outputs(attention.key, key_rows.flatten()),
        rotary_pairs=pairs if kept is None else kept.gather(1, pairs),
    )


def keep_outputs(projection: Projection, rows: Tensor) -> Projection:
    """A dense or low-rank projection with the given outputs, indices (kept,)."""
    if isinstance(projection, Linear):
        return slice_linear(projection, rows=rows)
    left = slice_linear(Linear(projection.left, projection.bias), rows=rows)
    return replace(projection, left=left.weight, bias=left.bias)


def rotate_values(attention: Attention, rotation: Tensor) -> Attention:
    """Rotate each KV group's value neurons in W_v and W_o by orthogonal (g, v, v); the function is unchanged."""
    groups, bias = attention.kv_heads, attention.value.bias
    value = attention.value.weight.float().unflatten(0, (groups, -1))
    if bias is not None:
        bias = (bias.float().unflatten(0, (groups, 1, -1)) @ rotation).flatten()
    return replace(
        attention,
        value=Linear((rotation.mT @ value).flatten(0, 1), bias),
        output=Linear(join_output_slices(output_slices(attention) @ rotation[:, None]), attention.output.bias),
    )


def keep_values(attention: Attention, neurons: Tensor) -> Attention:
    """Attention with the given value neurons, indices (g, kept), a row for each KV group."""
    groups, per_group = attention.kv_heads, output_slices(attention)
    rows = (neurons + torch.arange(groups, device=neurons.device)[:, None] * attention.shape.value_dim).flatten()
    columns = neurons[:, None, None].expand(*per_group.shape[:3], neurons.shape[1])
    return replace(
        attention,
        value=slice_linear(attention.value, rows=rows),
        output=Linear(join_output_slices(per_group.gather(3, columns)), attention.output.bias),
    )


def output_slices(attention: Attention) -> Tensor:
    """The output projection in float32, cut by KV group and query head, (g, m, d, v) with m = h / g."""
    per_group = attention.query_heads // attention.kv_heads
    return attention.output.weight.float().unflatten(1, (attention.kv_heads, per_group, -1)).permute(1, 2, 0, 3)


def join_output_slices(slices: Tensor) -> Tensor:
    """The inverse of :func:`output_slices`: (g, m, d, v) to (d, g·m·v)."""
    return slices.permute(2, 0, 1, 3).flatten(1).contiguous()


def head_interaction(attention: Attention, gram: Tensor) -> Tensor:
    """E⟨c_u, c_v⟩ of what every two query heads add to the attention's output, (h, h), from E[zᵀz], (h·v, h·v)."""
    heads = attention.query_heads
    weights = attention.output.weight.float().unflatten(1, (heads, -1)).movedim(1, 0)
    blocks = gram.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    return torch.einsum("udi,uivj,vdj->uv", weights, blocks, weights)


# ---------------------------------------------------------------- the feed-forward network


def keep_neurons(ffn: FeedForward, neurons: Tensor) -> FeedForward:
    """A feed-forward network with the given neurons, indices in ascending order."""
    return replace(
        ffn,
        gate=ffn.gate and slice_linear(ffn.gate, rows=neurons),
        up=slice_linear(ffn.up, rows=neurons),
        down=slice_linear(ffn.down, columns=neurons),
    )


def neuron_interaction(ffn: FeedForward, gram: Tensor) -> Tensor:
    """E⟨c_u, c_v⟩ of what every two neurons add to the network's output, (f, f): (W_dᵀW_d) ∘ E[aᵀa]."""
    weight = ffn.down.weight.float()
    return (weight.mT @ weight).mul_(gram)


# ---------------------------------------------------------------- projections


def row_energy(projection: Linear) -> Tensor:
    """The squared norm of what feeds every output, (out,), in float32."""
    return projection.weight.to(torch.float32, copy=True).square_().sum(dim=1)


def column_energy(projection: Linear) -> Tensor:
    """The squared norm of what every input feeds, (in,), in float32."""
    return projection.weight.to(torch.float32, copy=True).square_().sum(dim=0)
