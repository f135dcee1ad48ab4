"""Ways to prune a decoder layer without a method: what is kept of it, chosen at random, and the same as zeros.

Each edit gives the layer as it is after it, and a dense layer that computes the same: the original with zeros, or with
the product of two factors, in the places of what is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from distprune.layers.parts import Attention, DecoderLayer, Experts, FeedForward, Linear, LowRank, slice_linear

#: From a layer to what is left of it, and to the dense layer that computes the same.
Edit = Callable[[DecoderLayer], tuple[DecoderLayer, DecoderLayer]]


def kept(of: int, count: int, seed: int = 0) -> Tensor:
    """Some of the first ``of`` numbers, ascending."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def rows_of(heads: Tensor, width: int) -> Tensor:
    """The rows of some heads in a projection."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def zeroed(linear: Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Linear:
    """The map with zeros everywhere but in some rows (and their biases) or columns."""
    weight, bias = torch.zeros_like(linear.weight), linear.bias
    if columns is not None:
        weight[:, columns] = linear.weight[:, columns]
    else:
        weight[rows] = linear.weight[rows]
        if bias is not None:
            bias = torch.zeros_like(bias)
            bias[rows] = linear.bias[rows]
    return Linear(weight, bias)


def fewer_neurons(count: int) -> Edit:
    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        ffn = layer.ffn
        neurons = kept(len(ffn.up.weight), count)
        narrow = replace(
            ffn,
            gate=ffn.gate and slice_linear(ffn.gate, rows=neurons),
            up=slice_linear(ffn.up, rows=neurons),
            down=slice_linear(ffn.down, columns=neurons),
        )
        return replace(layer, ffn=narrow), replace(layer, ffn=replace(ffn, down=zeroed(ffn.down, columns=neurons)))

    return edit


def fewer_groups(count: int) -> Edit:
    """KV groups go, with all their query heads."""

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        attention, shape = layer.attention, layer.attention.shape
        groups = kept(shape.kv_heads, count)
        heads = rows_of(groups, shape.heads_per_group)
        query_width = len(attention.query.weight) // shape.query_heads  # some families' queries have gates beside them
        queries, keys = rows_of(heads, query_width), rows_of(groups, shape.query_key_dim)
        values, attended = rows_of(groups, shape.value_dim), rows_of(heads, shape.value_dim)
        narrow = Attention(
            len(heads),
            count,
            query=slice_linear(attention.query, rows=queries),
            key=slice_linear(attention.key, rows=keys),
            value=slice_linear(attention.value, rows=values),
            output=slice_linear(attention.output, columns=attended),
        )
        dense = replace(attention, output=zeroed(attention.output, columns=attended))
        return replace(layer, attention=narrow), replace(layer, attention=dense)

    return edit


def narrower_values(width: int) -> Edit:
    """Value neurons go, the same ones from every head."""

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        attention, shape = layer.attention, layer.attention.shape
        neurons = kept(shape.value_dim, width)

        def of(heads: int) -> Tensor:
            return (torch.arange(heads)[:, None] * shape.value_dim + neurons).flatten()

        rows, columns = of(shape.kv_heads), of(shape.query_heads)
        narrow = replace(
            attention,
            value=slice_linear(attention.value, rows=rows),
            output=slice_linear(attention.output, columns=columns),
        )
        dense = replace(attention, output=zeroed(attention.output, columns=columns))
        return replace(layer, attention=narrow), replace(layer, attention=dense)

    return edit


def fewer_pairs(count: int) -> Edit:
    """Rotary pairs go, others from each KV group."""

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        attention, shape = layer.attention, layer.attention.shape
        half = shape.query_key_dim // 2
        pairs = torch.stack([kept(half, count, seed=group) for group in range(shape.kv_heads)])
        places = torch.cat([pairs, pairs + half], dim=1)

        def rows(of_heads: Tensor) -> Tensor:
            return (torch.arange(len(of_heads))[:, None] * shape.query_key_dim + of_heads).flatten()

        queries, keys = rows(places.repeat_interleave(shape.heads_per_group, 0)), rows(places)
        narrow = replace(
            attention,
            query=slice_linear(attention.query, rows=queries),
            key=slice_linear(attention.key, rows=keys),
            rotary_pairs=pairs,
        )
        dense = replace(attention, query=zeroed(attention.query, rows=queries), key=zeroed(attention.key, rows=keys))
        return replace(layer, attention=narrow), replace(layer, attention=dense)

    return edit


def low_rank(linear: Linear, rank: int) -> tuple[LowRank, Linear]:
    """Two factors, and their product."""
    u, s, vh = torch.linalg.svd(linear.weight.float(), full_matrices=False)
    left, right = (u[:, :rank] * s[:rank]).to(linear.weight), vh[:rank].to(linear.weight)
    return LowRank(right.contiguous(), left.contiguous(), linear.bias), Linear(left @ right, linear.bias)


def factored(**ranks: int) -> Edit:
    """Projections, by their names in :class:`~distprune.layers.parts.Attention`, become products of two factors."""

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        both = {name: low_rank(getattr(layer.attention, name), rank) for name, rank in ranks.items()}
        return tuple(
            replace(layer, attention=replace(layer.attention, **{name: each[which] for name, each in both.items()}))
            for which in (0, 1)
        )

    return edit


def in_turn(*edits: Edit) -> Edit:
    """One edit after the other; the edits must be of different things, since each starts from whole ones."""

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        dense = layer
        for each in edits:
            layer, dense = each(layer)[0], each(dense)[1]
        return layer, dense

    return edit


def without_attention(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
    output = layer.attention.output
    bias = None if output.bias is None else torch.zeros_like(output.bias)
    silent = replace(layer.attention, output=Linear(torch.zeros_like(output.weight), bias))
    return replace(layer, attention=None), replace(layer, attention=silent)


def without_ffn(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
    return replace(layer, ffn=None), replace(layer, ffn=silent(layer.ffn))


def silent(ffn: FeedForward | Experts) -> FeedForward | Experts:
    """The network, or the mixture of experts, whose output is zero."""
    if isinstance(ffn, Experts):
        bias = None if ffn.down_bias is None else torch.zeros_like(ffn.down_bias)
        shared = None if ffn.shared is None else silent(ffn.shared)
        return replace(ffn, down=torch.zeros_like(ffn.down), down_bias=bias, shared=shared)
    bias = None if ffn.down.bias is None else torch.zeros_like(ffn.down.bias)
    return replace(ffn, down=Linear(torch.zeros_like(ffn.down.weight), bias))


def unchanged(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
    return layer, layer


def with_branch(rank: int) -> Edit:
    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        weight = layer.ffn.down.weight
        generator = torch.Generator().manual_seed(rank)
        right, left = (torch.randn(*dims, generator=generator) for dims in ((rank, len(weight)), (len(weight), rank)))
        scale = weight.float().std()
        branch = LowRank((right * scale).to(weight), (left * scale).to(weight))
        branched = replace(layer, ffn=replace(layer.ffn, branch=branch))
        return branched, branched

    return edit


def with_biases(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
    """The two output projections get biases."""

    def biased(linear: Linear | LowRank) -> Linear | LowRank:
        weight = linear.weight if isinstance(linear, Linear) else linear.left
        generator = torch.Generator().manual_seed(len(weight))
        return replace(linear, bias=(0.1 * torch.randn(len(weight), generator=generator)).to(weight))

    attention, ffn = layer.attention, layer.ffn
    changed = replace(
        layer,
        attention=replace(attention, output=biased(attention.output)),
        ffn=replace(ffn, down=biased(ffn.down)),
    )
    return changed, changed
