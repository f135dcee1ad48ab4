"""Layers without some of their units, against the whole layer with zeros where the output projections read those."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.decoder_layer import DecoderLayer, LowRank, state_of
from distprune.methods.units import (
    channels_of,
    head_interaction,
    heads_of_groups,
    keep_heads,
    keep_neurons,
    keep_rotary_pairs,
    neuron_interaction,
    sum_by_unit,
    with_heads,
    without_attention,
    without_ffn,
)


def with_silenced(layer: DecoderLayer, role: str, columns: list[int]) -> DecoderLayer:
    """The layer with zeros in these columns of one of its projections."""
    projection = getattr(layer, role)
    weight = projection.weight.index_fill(1, torch.tensor(columns, dtype=torch.int64), 0)
    return replace(layer, **{role: replace(projection, weight=weight)})


def assert_same_function(subject, layer: DecoderLayer, expected: DecoderLayer) -> None:
    torch.testing.assert_close(subject.run(layer), subject.run(expected), atol=1e-5, rtol=1e-5)


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
    pruned = keep_heads(this.layer, torch.tensor(heads))
    assert pruned.shape == with_heads(this.layer.shape, len(heads), len(heads[0]))
    gone = set(range(query_heads)) - {head for group in heads for head in group}
    columns = [8 * head + channel for head in gone for channel in range(8)]
    assert_same_function(this, pruned, with_silenced(this.layer, "output", columns))


def test_heads_with_norms_of_their_own_can_go_too(subject):
    this = subject(query_key_norm=True)
    assert this.layer.query_norm is not None
    pruned = keep_heads(this.layer, torch.tensor([[2, 3]]))
    assert_same_function(this, pruned, with_silenced(this.layer, "output", list(range(16))))


def test_a_head_narrower_in_its_values_than_in_its_keys_can_go_too(subject):
    this = subject(biases=False)
    narrow = replace(
        this.layer,
        value=replace(this.layer.value, weight=this.layer.value.weight[:10]),
        output=replace(this.layer.output, weight=this.layer.output.weight[:, :20]),
    )
    assert (narrow.shape.value_dim, narrow.shape.query_key_dim) == (5, 8)
    assert_same_function(
        this, keep_heads(narrow, torch.tensor([[2, 3]])), with_silenced(narrow, "output", [*range(10)])
    )


@pytest.mark.parametrize("kept", [[0], [3, 7, 21, 39], list(range(40))])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_a_layer_with_fewer_neurons_is_the_layer_with_the_others_silenced(subject, kept, biases):
    this = subject(biases=biases)
    pruned = keep_neurons(this.layer, torch.tensor(kept))
    assert pruned.shape == replace(this.layer.shape, ffn_width=len(kept))
    gone = [neuron for neuron in range(40) if neuron not in kept]
    assert_same_function(this, pruned, with_silenced(this.layer, "down", gone))


# Of a head of width 8, and of one that has kept its pairs 0, 2 and 3.
PAIRS, THEN = torch.tensor([[0, 2, 3], [0, 1, 3]]), torch.tensor([[1, 2], [0, 2]])


def with_silenced_queries(layer: DecoderLayer, kept: list[list[int]]) -> DecoderLayer:
    """The layer with zeros in all rows of its queries but those of each group's kept pairs."""
    per_group = layer.query_heads // layer.kv_heads
    rows = [
        8 * head + coordinate
        for head in range(layer.query_heads)
        for coordinate in range(8)
        if coordinate % 4 not in kept[head // per_group]
    ]
    query, index = layer.query, torch.tensor(rows)
    bias = None if query.bias is None else query.bias.index_fill(0, index, 0)
    if isinstance(query, LowRank):
        return replace(layer, query=replace(query, left=query.left.index_fill(0, index, 0), bias=bias))
    return replace(layer, query=replace(query, weight=query.weight.index_fill(0, index, 0), bias=bias))


def factored(layer: DecoderLayer) -> DecoderLayer:
    """The layer with random low-rank queries and keys."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for role in ("query", "key"):
        projection = getattr(layer, role)
        right, left = (
            torch.randn(5, 24, generator=generator),
            torch.randn(len(projection.weight), 5, generator=generator),
        )
        factors[role] = LowRank(0.4 * right, 0.4 * left, projection.bias)
    return replace(layer, **factors)


@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low-rank"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("query_heads", [2, 4])
def test_a_layer_with_fewer_rotary_pairs_is_the_layer_with_the_others_silenced(subject, query_heads, biases, low_rank):
    this = subject(query_heads=query_heads, biases=biases)
    layer = factored(this.layer) if low_rank else this.layer
    pruned = keep_rotary_pairs(layer, PAIRS)
    assert pruned.shape == replace(layer.shape, query_key_dim=6)
    assert torch.equal(pruned.rotary_pairs, PAIRS)
    assert_same_function(this, pruned, with_silenced_queries(layer, PAIRS.tolist()))

    fewer = keep_rotary_pairs(pruned, THEN)
    assert fewer.shape == replace(layer.shape, query_key_dim=4)
    assert fewer.rotary_pairs.tolist() == [[2, 3], [0, 3]]
    assert_same_function(this, fewer, with_silenced_queries(layer, [[2, 3], [0, 3]]))


def test_a_group_takes_its_rotary_pairs_with_it(subject):
    this = subject()
    pruned = keep_heads(keep_rotary_pairs(this.layer, PAIRS), torch.tensor([[2, 3]]))
    assert pruned.rotary_pairs.tolist() == [[0, 1, 3]]
    silenced = with_silenced(this.layer, "output", list(range(16)))
    assert_same_function(this, pruned, with_silenced_queries(silenced, PAIRS.tolist()))


def test_all_rotary_pairs_are_the_layer_itself(subject):
    layer = subject().layer
    assert keep_rotary_pairs(layer, torch.arange(4).repeat(2, 1)) is layer


@pytest.mark.parametrize("pairs", [[[0, 1]], [[1, 0], [0, 1]], [[0, 4], [0, 1]], [[-1, 0], [0, 1]], [[1, 1], [0, 1]]])
def test_pairs_that_are_not_there_or_out_of_order_are_refused(subject, pairs):
    with pytest.raises(ValueError, match="ascending indices below 4, a row for each of 2 KV groups"):
        keep_rotary_pairs(subject().layer, torch.tensor(pairs))


def test_normed_queries_keep_all_their_pairs(subject):
    with pytest.raises(ValueError, match="no rotary pair can go"):
        keep_rotary_pairs(subject(query_key_norm=True).layer, PAIRS)


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_a_layer_without_attention_or_ffn_is_the_layer_with_their_output_silenced(subject, biases):
    this = subject(biases=biases, query_key_norm=True)

    def silenced(layer: DecoderLayer, role: str) -> DecoderLayer:
        projection = getattr(layer, role)
        bias = None if projection.bias is None else torch.zeros_like(projection.bias)
        return replace(layer, **{role: replace(projection, weight=torch.zeros_like(projection.weight), bias=bias)})

    assert_same_function(this, without_attention(this.layer), silenced(this.layer, "output"))
    assert_same_function(this, without_ffn(this.layer), silenced(this.layer, "down"))
    nothing = without_ffn(without_attention(this.layer))
    assert state_of(nothing) == {}
    assert torch.equal(this.run(nothing), this.hidden_states)
    assert without_attention(this.layer).shape.kv_heads == without_ffn(this.layer).shape.ffn_width == 0


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
    layer, values = any_subject.layer, any_subject.activations()["attention_values"]
    expected = moment(contributions(values, layer.output.weight, layer.query_heads))
    gram = (values.T @ values / len(values)).float()
    np.testing.assert_allclose(head_interaction(layer, gram), expected, rtol=1e-4, atol=1e-6)


def test_neurons_interact_as_what_they_add_does(any_subject):
    layer, neurons = any_subject.layer, any_subject.activations()["ffn_neurons"]
    expected = moment(contributions(neurons, layer.down.weight, 40))
    gram = (neurons.T @ neurons / len(neurons)).float()
    np.testing.assert_allclose(neuron_interaction(layer, gram), expected, rtol=1e-4, atol=1e-6)
