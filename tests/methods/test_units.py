"""Parts without some of their units, against the whole part with zeros where the output projections read those."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.layers.parts import Attention, FeedForward, Linear, LowRank
from distprune.layers.sites import ATTENDED, NEURONS
from distprune.methods.even_layers import with_heads
from distprune.methods.units import (
    channels_of,
    head_interaction,
    heads_of_groups,
    keep_heads,
    keep_neurons,
    keep_rotary_pairs,
    keep_values,
    neuron_interaction,
    rotate_values,
    sum_by_unit,
)


def without_columns(projection: Linear, columns: list[int]) -> Linear:
    """The projection with zeros in these columns."""
    return replace(projection, weight=projection.weight.index_fill(1, torch.tensor(columns, dtype=torch.int64), 0))


def silent_heads(attention: Attention, columns: list[int]) -> Attention:
    return replace(attention, output=without_columns(attention.output, columns))


def silent_neurons(ffn: FeedForward, neurons: list[int]) -> FeedForward:
    return replace(ffn, down=without_columns(ffn.down, neurons))


def assert_same_function(this, part: Attention | FeedForward, expected: Attention | FeedForward) -> None:
    """Of the layer with either."""
    name = "attention" if isinstance(part, Attention) else "ffn"
    found, wanted = (this.run_with(**{name: each}) for each in (part, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "heads"),
    [
        (4, 4, [[0], [2], [3]]),  # one head a group
        (4, 2, [[2, 3]]),  # a whole group goes
        (4, 2, [[1], [2]]),  # one head of each group goes
        (6, 2, [[3, 5]]),  # a group and a head of the other
        (6, 1, [[0, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),  # nothing goes
    ],
)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_a_layer_with_fewer_heads_is_the_layer_with_the_others_silenced(subject, query_heads, kv_heads, heads, biases):
    this = subject(query_heads=query_heads, kv_heads=kv_heads, biases=biases)
    pruned = keep_heads(this.attention, torch.tensor(heads))
    assert pruned.shape == with_heads(this.layer.shape, len(heads), len(heads[0])).attention
    gone = set(range(query_heads)) - {head for group in heads for head in group}
    columns = [8 * head + channel for head in gone for channel in range(8)]
    assert_same_function(this, pruned, silent_heads(this.attention, columns))


def test_heads_with_norms_of_their_own_can_go_too(subject):
    this = subject("qwen3", attention_bias=True)
    assert "self_attn.q_norm.weight" in this.layer.rest
    pruned = keep_heads(this.attention, torch.tensor([[2, 3]]))
    assert_same_function(this, pruned, silent_heads(this.attention, list(range(16))))


def test_biases_on_queries_keys_and_values_alone_go_with_their_heads(subject):
    this = subject("qwen2")
    assert this.attention.value.bias is not None and this.attention.output.bias is None
    pruned = keep_heads(this.attention, torch.tensor([[0, 1]]))
    assert_same_function(this, pruned, silent_heads(this.attention, list(range(16, 32))))


def test_a_head_narrower_in_its_values_than_in_its_keys_can_go_too(subject):
    this = subject(biases=False)
    narrow = keep_values(this.attention, torch.arange(5).expand(2, 5))
    assert (narrow.shape.value_dim, narrow.shape.query_key_dim) == (5, 8)
    assert_same_function(this, keep_heads(narrow, torch.tensor([[2, 3]])), silent_heads(narrow, [*range(10)]))


@pytest.mark.parametrize("kept", [[[0], [0]], [[0, 3, 7], [1, 2, 4]]])
def test_attention_with_fewer_values_is_the_attention_with_the_others_silenced(any_subject, kept):
    attention = any_subject.attention
    kept = [kept[group % 2] for group in range(attention.kv_heads)]
    pruned = keep_values(attention, torch.tensor(kept))
    per_group = attention.query_heads // attention.kv_heads
    columns = [
        8 * head + channel
        for head in range(attention.query_heads)
        for channel in range(8)
        if channel not in kept[head // per_group]
    ]
    assert_same_function(any_subject, pruned, silent_heads(attention, columns))


def test_rotating_values_with_their_biases_leaves_the_function_unchanged(any_subject):
    attention = any_subject.attention
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(attention.kv_heads, 8, 8, generator=generator)).Q
    assert_same_function(any_subject, rotate_values(attention, rotation), attention)


@pytest.mark.parametrize("kept", [[0], [3, 7, 21, 39], list(range(40))])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_a_layer_with_fewer_neurons_is_the_layer_with_the_others_silenced(subject, kept, biases):
    this = subject(biases=biases)
    pruned = keep_neurons(this.ffn, torch.tensor(kept))
    assert pruned.shape == replace(this.ffn.shape, width=len(kept))
    assert_same_function(this, pruned, silent_neurons(this.ffn, [n for n in range(40) if n not in kept]))


def test_neurons_without_a_gate_can_go_too(gateless):
    pruned = keep_neurons(gateless.ffn, torch.tensor([3, 7, 21]))
    assert pruned.gate is None and pruned.shape == replace(gateless.ffn.shape, width=3)
    assert_same_function(gateless, pruned, silent_neurons(gateless.ffn, [n for n in range(40) if n not in (3, 7, 21)]))


# Of a head of width 8, and of one that has kept its pairs 0, 2 and 3.
PAIRS, THEN = torch.tensor([[0, 2, 3], [0, 1, 3]]), torch.tensor([[1, 2], [0, 2]])


def with_silenced_queries(attention: Attention, kept: list[list[int]]) -> Attention:
    """Attention with zeros in all rows of its queries but those of each group's kept pairs."""
    per_group = attention.query_heads // attention.kv_heads
    rows = [
        8 * head + coordinate
        for head in range(attention.query_heads)
        for coordinate in range(8)
        if coordinate % 4 not in kept[head // per_group]
    ]
    query, index = attention.query, torch.tensor(rows)
    bias = None if query.bias is None else query.bias.index_fill(0, index, 0)
    if isinstance(query, LowRank):
        return replace(attention, query=replace(query, left=query.left.index_fill(0, index, 0), bias=bias))
    return replace(attention, query=replace(query, weight=query.weight.index_fill(0, index, 0), bias=bias))


def factored(attention: Attention) -> Attention:
    """Attention with random low-rank queries and keys."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for role in ("query", "key"):
        projection = getattr(attention, role)
        right, left = (
            torch.randn(5, 24, generator=generator),
            torch.randn(len(projection.weight), 5, generator=generator),
        )
        factors[role] = LowRank(0.4 * right, 0.4 * left, projection.bias)
    return replace(attention, **factors)


@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low-rank"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("query_heads", [2, 4])
def test_a_layer_with_fewer_rotary_pairs_is_the_layer_with_the_others_silenced(subject, query_heads, biases, low_rank):
    this = subject(query_heads=query_heads, biases=biases)
    attention = factored(this.attention) if low_rank else this.attention
    pruned = keep_rotary_pairs(attention, PAIRS)
    assert pruned.shape == replace(attention.shape, query_key_dim=6)
    assert torch.equal(pruned.rotary_pairs, PAIRS)
    assert_same_function(this, pruned, with_silenced_queries(attention, PAIRS.tolist()))

    fewer = keep_rotary_pairs(pruned, THEN)
    assert fewer.shape == replace(attention.shape, query_key_dim=4)
    assert fewer.rotary_pairs.tolist() == [[2, 3], [0, 3]]
    assert_same_function(this, fewer, with_silenced_queries(attention, [[2, 3], [0, 3]]))


def test_a_group_takes_its_rotary_pairs_with_it(subject):
    this = subject()
    pruned = keep_heads(keep_rotary_pairs(this.attention, PAIRS), torch.tensor([[2, 3]]))
    assert pruned.rotary_pairs.tolist() == [[0, 1, 3]]
    silenced = silent_heads(this.attention, list(range(16)))
    assert_same_function(this, pruned, with_silenced_queries(silenced, PAIRS.tolist()))


def test_all_rotary_pairs_are_the_attention_itself(subject):
    attention = subject().attention
    assert keep_rotary_pairs(attention, torch.arange(4).repeat(2, 1)) is attention


@pytest.mark.parametrize("pairs", [[[0, 1]], [[1, 0], [0, 1]], [[0, 4], [0, 1]], [[-1, 0], [0, 1]], [[1, 1], [0, 1]]])
def test_pairs_that_are_not_there_or_out_of_order_are_refused(subject, pairs):
    with pytest.raises(ValueError, match="ascending indices below 4, a row for each of 2 KV groups"):
        keep_rotary_pairs(subject().attention, torch.tensor(pairs))


def test_heads_channels_and_sums_go_by_units_in_a_row():
    heads = heads_of_groups(torch.tensor([0, 2]), heads_per_group=3)
    assert heads.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert channels_of(torch.tensor([1, 3]), width=2).tolist() == [2, 3, 6, 7]
    assert channels_of(heads, width=2).tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert sum_by_unit(torch.arange(6), units=3).tolist() == [1, 5, 9]


def contributions(values: torch.Tensor, weight: torch.Tensor, units: int) -> np.ndarray:
    """What every unit adds to a projection's output, (units, tokens, d), one unit at a time."""
    slices = np.split(values.numpy(), units, axis=1), np.split(weight.double().numpy(), units, axis=1)
    return np.stack([piece @ part.T for piece, part in zip(*slices, strict=True)])


def moment(parts: np.ndarray) -> np.ndarray:
    return np.einsum("utd,vtd->uv", parts, parts) / parts.shape[1]


def test_heads_interact_as_what_they_add_does(any_subject):
    attention, values = any_subject.attention, any_subject.activations()[ATTENDED]
    expected = moment(contributions(values, attention.output.weight, attention.query_heads))
    gram = (values.T @ values / len(values)).float()
    np.testing.assert_allclose(head_interaction(attention, gram), expected, rtol=1e-4, atol=1e-6)


def test_neurons_interact_as_what_they_add_does(any_subject):
    ffn, neurons = any_subject.ffn, any_subject.activations()[NEURONS]
    expected = moment(contributions(neurons, ffn.down.weight, 40))
    gram = (neurons.T @ neurons / len(neurons)).float()
    np.testing.assert_allclose(neuron_interaction(ffn, gram), expected, rtol=1e-4, atol=1e-6)
