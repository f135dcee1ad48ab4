"""Olica on attention: rotated and dropped value neurons, low-rank queries and keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distprune.decoder_layer import DecoderLayer, Linear
from distprune.methods import Olica
from distprune.methods.olica import factor_queries_and_keys, prune_values, rotated_gram
from distprune.methods.units import output_slices, rotate_values
from distprune.solvers import orthogonal_output_rotation, uncorrelated_rotation
from distprune.statistics import HeadGram, Power


def measured(subject, layer: DecoderLayer | None = None):
    heads = subject.layer.query_heads
    return subject.statistics(
        [Power("attention_input"), Power("attention_output"), HeadGram("attention_values", heads)], layer
    )


def assert_same_function(subject, layer: DecoderLayer) -> None:
    torch.testing.assert_close(subject.run(layer), subject.run(subject.layer), atol=1e-4, rtol=1e-4)


def rotated(subject, decomposition: str) -> tuple[DecoderLayer, Tensor]:
    layer, statistics = subject.layer, measured(subject)
    value_gram = statistics.head_gram("attention_values", layer.query_heads)
    if decomposition == "values":
        rotation = uncorrelated_rotation(value_gram.unflatten(0, (layer.kv_heads, -1)).mean(dim=1))
    else:
        rotation = orthogonal_output_rotation(output_slices(layer), statistics.rms("attention_output"))
    return rotate_values(layer, rotation), rotated_gram(value_gram, rotation)


@pytest.mark.parametrize("decomposition", ["values", "weights"])
def test_rotating_values_leaves_the_layers_function_unchanged(any_subject, decomposition):
    layer, _ = rotated(any_subject, decomposition)
    assert layer.shape == any_subject.layer.shape
    assert (layer.value.weight - any_subject.layer.value.weight).abs().max() > 0.1
    assert_same_function(any_subject, layer)


@pytest.mark.parametrize("decomposition", ["values", "weights"])
def test_the_rotated_value_gram_is_what_is_measured_on_the_rotated_layer(any_subject, decomposition):
    layer, value_gram = rotated(any_subject, decomposition)
    again = measured(any_subject, layer).head_gram("attention_values", layer.query_heads)
    torch.testing.assert_close(value_gram, again, atol=1e-3, rtol=1e-3)


def test_rotated_values_are_uncorrelated_over_the_query_heads_of_their_group(any_subject):
    layer, _ = rotated(any_subject, "values")
    values = any_subject.activations(layer)["attention_values"].numpy()
    heads = np.split(values, layer.query_heads, axis=1)
    heads_per_group = layer.query_heads // layer.kv_heads
    for group in range(layer.kv_heads):
        stacked = np.concatenate(heads[group * heads_per_group : (group + 1) * heads_per_group])
        gram = stacked.T @ stacked
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4 * gram.max())
        assert (np.diff(np.diag(gram)) <= 1e-4 * gram.max()).all()


def kept_neurons(original: Linear, pruned: Linear, groups: int) -> list[list[int]]:
    """For each group, which of the original's rows the pruned layer has, by comparing them."""
    before, after = (linear.weight.unflatten(0, (groups, -1)) for linear in (original, pruned))
    equal = (after[:, :, None] == before[:, None]).all(dim=-1)
    assert (equal.sum(dim=-1) == 1).all()
    return equal.int().argmax(dim=-1).tolist()


def without_values(layer: DecoderLayer, kept: list[list[int]]) -> DecoderLayer:
    """The layer at its full width, with zeros in place of what the dropped value neurons compute."""
    mask = torch.zeros(layer.kv_heads, layer.shape.value_dim)
    for group, neurons in enumerate(kept):
        mask[group, neurons] = 1
    bias = None if layer.value.bias is None else layer.value.bias * mask.flatten()
    return replace(layer, value=Linear(layer.value.weight * mask.flatten()[:, None], bias))


@pytest.mark.parametrize("keep", [1, 5, 7])
def test_pruning_values_drops_as_many_of_every_group_and_changes_no_other(any_subject, keep):
    layer, statistics = any_subject.layer, measured(any_subject)
    value_gram = statistics.head_gram("attention_values", layer.query_heads)
    pruned = prune_values(layer, keep, statistics.rms("attention_input"), value_gram)
    assert pruned.shape == replace(layer.shape, value_dim=keep)
    kept = kept_neurons(layer.value, pruned.value, layer.kv_heads)
    assert [len(set(neurons)) for neurons in kept] == [keep] * layer.kv_heads
    zeroed = without_values(layer, kept)
    torch.testing.assert_close(any_subject.run(pruned), any_subject.run(zeroed), atol=1e-4, rtol=1e-4)


def value_importance(subject, layer: DecoderLayer) -> np.ndarray:
    """‖row of W_v ∘ rms(x)‖ + ‖columns of W_o · rms(z)‖ from the samples, one neuron at a time, (groups, width)."""
    taps = {tap: values.numpy() for tap, values in subject.activations(layer).items()}
    value, output = layer.value.weight.double().numpy(), layer.output.weight.double().numpy()
    width, heads_per_group = layer.shape.value_dim, layer.query_heads // layer.kv_heads
    rms = {tap: np.sqrt((taps[tap] ** 2).mean(axis=0)) for tap in ("attention_input", "attention_values")}
    importance = np.zeros((layer.kv_heads, width))
    for group in range(layer.kv_heads):
        for neuron in range(width):
            energy = 0.0
            for head in range(group * heads_per_group, (group + 1) * heads_per_group):
                column = head * width + neuron
                energy += np.sum((output[:, column] * rms["attention_values"][column]) ** 2)
            row = value[group * width + neuron] * rms["attention_input"]
            importance[group, neuron] = np.linalg.norm(row) + np.sqrt(energy)
    return importance


def test_the_value_neurons_kept_are_the_most_important(any_subject):
    layer, statistics = any_subject.layer, measured(any_subject)
    value_gram = statistics.head_gram("attention_values", layer.query_heads)
    expected = np.sort(np.argsort(-value_importance(any_subject, layer), axis=1)[:, :5], axis=1)
    pruned = prune_values(layer, 5, statistics.rms("attention_input"), value_gram)
    assert kept_neurons(layer.value, pruned.value, layer.kv_heads) == expected.tolist()


def test_queries_and_keys_are_as_near_as_their_ranks_allow_on_the_calibration_inputs(any_subject):
    layer = any_subject.layer
    planned = replace(layer.shape, query_rank=9, key_rank=4)
    factored = factor_queries_and_keys(layer, planned, measured(any_subject).rms("attention_input"))
    rms = np.sqrt((any_subject.activations()["attention_input"].numpy() ** 2).mean(axis=0))
    for before, after, rank in ((layer.query, factored.query, 9), (layer.key, factored.key, 4)):
        scaled = before.weight.double().numpy() * rms
        error = scaled - after.left.double().numpy() @ after.right.double().numpy() * rms
        optimum = np.linalg.norm(np.linalg.svd(scaled, compute_uv=False)[rank:])
        assert np.linalg.norm(error) == pytest.approx(optimum, rel=1e-4)
        assert after.bias is before.bias


@pytest.mark.parametrize("decomposition", ["values", "weights", "none"])
def test_pruning_at_full_width_and_full_rank_leaves_the_function_unchanged(any_subject, decomposition):
    layer, method = any_subject.layer, Olica(decomposition=decomposition)
    full = {"query_rank": min(24, 8 * layer.query_heads), "key_rank": min(24, 8 * layer.kv_heads)}
    planned = replace(layer.shape, **full)
    profile = method.profile(layer, any_subject.statistics(method.dense_moments(layer.shape)))
    statistics = any_subject.statistics(method.pruning_moments(layer.shape, planned))
    pruned = method.prune(layer, planned, statistics, profile, any_subject.observe)
    assert pruned.shape == planned
    assert_same_function(any_subject, pruned)


@pytest.mark.parametrize("decomposition", ["values", "weights", "none"])
def test_pruning_rotates_the_values_first_and_then_drops_the_least_important(any_subject, decomposition):
    dense, method = any_subject.layer, Olica(decomposition=decomposition)
    planned = replace(dense.shape, value_dim=5, query_rank=9, key_rank=4)
    profile = method.profile(dense, any_subject.statistics(method.dense_moments(dense.shape)))
    statistics = any_subject.statistics(method.pruning_moments(dense.shape, planned))
    pruned = method.prune(dense, planned, statistics, profile, any_subject.observe)

    layer = dense if decomposition == "none" else rotated(any_subject, decomposition)[0]
    kept = np.sort(np.argsort(-value_importance(any_subject, layer), axis=1)[:, :5], axis=1)
    expected = layer.value.weight.unflatten(0, (layer.kv_heads, -1))
    expected = torch.cat([rows[neurons] for rows, neurons in zip(expected, kept, strict=True)])
    torch.testing.assert_close(pruned.value.weight, expected, atol=1e-4, rtol=1e-4)
