"""Whole units of a layer, and the layer without some of them: query heads and their KV groups, rotary pairs, neurons
of the FFN, and attention and FFN as a whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distprune.decoder_layer import DecoderLayer, LayerShape, Linear, LowRank, slice_linear
from distprune.solvers import channels_of


def with_heads(shape: LayerShape, kv_heads: int, heads_per_group: int) -> LayerShape:
    """The shape with that many KV groups, and query heads in each."""
    return replace(shape, kv_heads=kv_heads, query_heads=kv_heads * heads_per_group)


def heads_of_groups(groups: Tensor, heads_per_group: int) -> Tensor:
    """The query heads of the given KV groups, a row for each, (groups, heads_per_group)."""
    return groups[:, None] * heads_per_group + torch.arange(heads_per_group, device=groups.device)


def sum_by_unit(channels: Tensor, units: int) -> Tensor:
    """One number a unit from one a channel, (units · width,) to (units,)."""
    return channels.unflatten(0, (units, -1)).sum(dim=1)


def keep_heads(layer: DecoderLayer, heads: Tensor) -> DecoderLayer:
    """The layer with the given query heads and the KV groups that they are of.

    Args:
        layer: a dense layer.
        heads: (groups, heads per group), indices of query heads, a row for each KV group that stays; ascending.
    """
    groups = heads[:, 0] // (layer.query_heads // layer.kv_heads)
    head_dim = len(layer.query.weight) // layer.query_heads
    value_dim = len(layer.value.weight) // layer.kv_heads
    return replace(
        layer,
        query_heads=heads.numel(),
        kv_heads=len(groups),
        query=slice_linear(layer.query, rows=channels_of(heads, head_dim)),
        key=slice_linear(layer.key, rows=channels_of(groups, head_dim)),
        value=slice_linear(layer.value, rows=channels_of(groups, value_dim)),
        output=slice_linear(layer.output, columns=channels_of(heads, value_dim)),
        rotary_pairs=None if layer.rotary_pairs is None else layer.rotary_pairs[groups],
    )


def keep_rotary_pairs(layer: DecoderLayer, pairs: Tensor) -> DecoderLayer:
    """The layer whose queries and keys are left with the given rotary pairs, a group's query heads with its key's.

    Args:
        layer: its queries and keys may be dense or low-rank, and may have lost pairs before.
        pairs: (groups, kept), which of the pairs that each KV group now has stay; ascending. Pair i of a head of
            width p is its coordinates i and i + p/2.

    Raises:
        ValueError: the layer norms its queries and keys, or the pairs are not as many or not in the order asked for.
    """
    if layer.query_norm is not None:
        raise ValueError("queries and keys are normed over all coordinates of a head, so no rotary pair can go")
    half = layer.shape.query_key_dim // 2
    ascending = (pairs.diff(dim=1) > 0).all() and pairs.min() >= 0 and pairs.max() < half
    if len(pairs) != layer.kv_heads or not ascending:
        raise ValueError(f"pairs must be ascending indices below {half}, a row for each of {layer.kv_heads} KV groups")
    if pairs.shape[1] == half:
        return layer
    rows = torch.cat([pairs, pairs + half], dim=1)
    key_rows = rows + 2 * half * torch.arange(layer.kv_heads, device=rows.device)[:, None]
    query_rows = rows.repeat_interleave(layer.query_heads // layer.kv_heads, dim=0)
    query_rows = query_rows + 2 * half * torch.arange(layer.query_heads, device=rows.device)[:, None]
    return replace(
        layer,
        query=keep_outputs(layer.query, query_rows.flatten()),
        key=keep_outputs(layer.key, key_rows.flatten()),
        rotary_pairs=pairs if layer.rotary_pairs is None else layer.rotary_pairs.gather(1, pairs),
    )


def keep_outputs(projection: Linear | LowRank, rows: Tensor) -> Linear | LowRank:
    """A dense or low-rank projection with the given outputs, indices (kept,)."""
    if isinstance(projection, Linear):
        return slice_linear(projection, rows=rows)
    left = slice_linear(Linear(projection.left, projection.bias), rows=rows)
    return LowRank(projection.right, left.weight, left.bias)


def rotate_values(layer: DecoderLayer, rotation: Tensor) -> DecoderLayer:
    """Rotate each KV group's value neurons in W_v and W_o by orthogonal (g, v, v); the function is unchanged."""
    value, bias = layer.value.weight.float().unflatten(0, (layer.kv_heads, -1)), layer.value.bias
    if bias is not None:
        bias = (bias.float().unflatten(0, (layer.kv_heads, 1, -1)) @ rotation).flatten()
    return replace(
        layer,
        value=Linear((rotation.mT @ value).flatten(0, 1), bias),
        output=Linear(join_output_slices(output_slices(layer) @ rotation[:, None]), layer.output.bias),
    )


def keep_values(layer: DecoderLayer, neurons: Tensor) -> DecoderLayer:
    """The layer with the given value neurons, indices (g, kept), a row for each KV group."""
    per_group = output_slices(layer)
    rows = (neurons + torch.arange(layer.kv_heads, device=neurons.device)[:, None] * layer.shape.value_dim).flatten()
    columns = neurons[:, None, None].expand(*per_group.shape[:3], neurons.shape[1])
    return replace(
        layer,
        value=slice_linear(layer.value, rows=rows),
        output=Linear(join_output_slices(per_group.gather(3, columns)), layer.output.bias),
    )


def output_slices(layer: DecoderLayer) -> Tensor:
    """The output projection in float32, cut by KV group and query head, (g, m, d, v) with m = h / g."""
    heads_per_group = layer.query_heads // layer.kv_heads
    return layer.output.weight.float().unflatten(1, (layer.kv_heads, heads_per_group, -1)).permute(1, 2, 0, 3)


def join_output_slices(slices: Tensor) -> Tensor:
    """The inverse of :func:`output_slices`: (g, m, d, v) to (d, g·m·v)."""
    return slices.permute(2, 0, 1, 3).flatten(1).contiguous()


def without_attention(layer: DecoderLayer) -> DecoderLayer:
    """The layer without its attention and the norm before it."""
    roles = ("attention_norm", "query", "key", "value", "output", "query_norm", "key_norm", "rotary_pairs")
    return replace(layer, query_heads=0, kv_heads=0, **dict.fromkeys(roles))


def without_ffn(layer: DecoderLayer) -> DecoderLayer:
    """The layer without its FFN, the norm before it and the linear branch beside it."""
    return replace(layer, **dict.fromkeys(("ffn_norm", "gate", "up", "down", "calibration")))


def keep_neurons(layer: DecoderLayer, neurons: Tensor) -> DecoderLayer:
    """The layer with the given neurons of its FFN, indices in ascending order."""
    return replace(
        layer,
        gate=slice_linear(layer.gate, rows=neurons),
        up=slice_linear(layer.up, rows=neurons),
        down=slice_linear(layer.down, columns=neurons),
    )


def row_energy(projection: Linear) -> Tensor:
    """The squared norm of what feeds every output, (out,), in float32."""
    return projection.weight.to(torch.float32, copy=True).square_().sum(dim=1)


def column_energy(projection: Linear) -> Tensor:
    """The squared norm of what every input feeds, (in,), in float32."""
    return projection.weight.to(torch.float32, copy=True).square_().sum(dim=0)


def head_interaction(layer: DecoderLayer, gram: Tensor) -> Tensor:
    """E⟨c_u, c_v⟩ of what every two query heads add to the attention's output, (h, h), from E[zᵀz], (h·v, h·v)."""
    weights = layer.output.weight.float().unflatten(1, (layer.query_heads, -1)).movedim(1, 0)
    blocks = gram.unflatten(0, (layer.query_heads, -1)).unflatten(2, (layer.query_heads, -1))
    return torch.einsum("udi,uivj,vdj->uv", weights, blocks, weights)


def neuron_interaction(layer: DecoderLayer, gram: Tensor) -> Tensor:
    """E⟨c_u, c_v⟩ of what every two neurons add to the FFN's output, (f, f): (W_dᵀW_d) ∘ E[aᵀa]."""
    weight = layer.down.weight.float()
    return (weight.mT @ weight).mul_(gram)
