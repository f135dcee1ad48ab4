"""Layers without some of their units, against the whole layer with zeros where the output projections read those."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.decoder_layer import DecoderLayer
from distprune.methods.units import (
    channels_of,
    head_interaction,
    heads_of_groups,
    keep_heads,
    keep_neurons,
    neuron_interaction,
    sum_by_unit,
    with_heads,
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
