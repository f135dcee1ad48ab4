"""Olica on attention: rotated and dropped value neurons, low-rank queries and keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distprune.layers.parts import Attention, Linear
from distprune.layers.sites import ATTENDED, ATTENTION_INPUT, ATTENTION_OUTPUT
from distprune.methods.olica import Olica, factor_queries_and_keys, prune_values, rotated_gram
from distprune.methods.units import output_slices, rotate_values
from distprune.solvers import orthogonal_output_rotation, uncorrelated_rotation
from distprune.statistics import HeadGram, Power


def measured(subject, attention: Attention | None = None):
    moments = [Power(ATTENTION_INPUT), Power(ATTENTION_OUTPUT), HeadGram(ATTENDED, subject.attention.query_heads)]
    return subject.statistics(moments, replace(subject.layer, attention=attention or subject.attention))


def assert_same_function(subject, attention: Attention) -> None:
    torch.testing.assert_close(subject.run_with(attention=attention), subject.run(subject.layer), atol=1e-4, rtol=1e-4)


def rotated(subject, decomposition: str) -> tuple[Attention, Tensor]:
    attention, statistics = subject.attention, measured(subject)
    value_gram = statistics.head_gram(ATTENDED, attention.query_heads)
    if decomposition == "values":
        rotation = uncorrelated_rotation(value_gram.unflatten(0, (attention.kv_heads, -1)).mean(dim=1))
    else:
        rotation = orthogonal_output_rotation(output_slices(attention), statistics.rms(ATTENTION_OUTPUT))
    return rotate_values(attention, rotation), rotated_gram(value_gram, rotation)


@pytest.mark.parametrize("decomposition", ["values", "weights"])
def test_rotating_values_leaves_the_layers_function_unchanged(any_subject, decomposition):
    attention, _ = rotated(any_subject, decomposition)
    assert attention.shape == any_subject.attention.shape
    assert (attention.value.weight - any_subject.attention.value.weight).abs().max() > 0.1
    assert_same_function(any_subject, attention)


@pytest.mark.parametrize("decomposition", ["values", "weights"])
def test_the_rotated_value_gram_is_what_is_measured_on_the_rotated_layer(any_subject, decomposition):
    attention, value_gram = rotated(any_subject, decomposition)
    again = measured(any_subject, attention).head_gram(ATTENDED, attention.query_heads)
    torch.testing.assert_close(value_gram, again, atol=1e-3, rtol=1e-3)


def test_rotated_values_are_uncorrelated_over_the_query_heads_of_their_group(any_subject):
    attention, _ = rotated(any_subject, "values")
    values = any_subject.activations(replace(any_subject.layer, attention=attention))[ATTENDED].numpy()
    heads = np.split(values, attention.query_heads, axis=1)
    heads_per_group = attention.query_heads // attention.kv_heads
    for group in range(attention.kv_heads):
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


def without_values(attention: Attention, kept: list[list[int]]) -> Attention:
    """Attention at its full width, with zeros in place of what the dropped value neurons compute."""
    mask = torch.zeros(attention.kv_heads, attention.shape.value_dim)
    for group, neurons in enumerate(kept):
        mask[group, neurons] = 1
    bias = None if attention.value.bias is None else attention.value.bias * mask.flatten()
    return replace(attention, value=Linear(attention.value.weight * mask.flatten()[:, None], bias))


@pytest.mark.parametrize("keep", [1, 5, 7])
def test_pruning_values_drops_as_many_of_every_group_and_changes_no_other(any_subject, keep):
    attention, statistics = any_subject.attention, measured(any_subject)
    value_gram = statistics.head_gram(ATTENDED, attention.query_heads)
    pruned = prune_values(attention, keep, statistics.rms(ATTENTION_INPUT), value_gram)
    assert pruned.shape == replace(attention.shape, value_dim=keep)
    kept = kept_neurons(attention.value, pruned.value, attention.kv_heads)
    assert [len(set(neurons)) for neurons in kept] == [keep] * attention.kv_heads
    zeroed = any_subject.run_with(attention=without_values(attention, kept))
    torch.testing.assert_close(any_subject.run_with(attention=pruned), zeroed, atol=1e-4, rtol=1e-4)


def value_importance(subject, attention: Attention) -> np.ndarray:
    """‖row of W_v ∘ rms(x)‖ + ‖columns of W_o · rms(z)‖ from the samples, one neuron at a time, (groups, width)."""
    seen = subject.activations(replace(subject.layer, attention=attention))
    value, output = attention.value.weight.double().numpy(), attention.output.weight.double().numpy()
    width, heads_per_group = attention.shape.value_dim, attention.query_heads // attention.kv_heads
    rms = {site: np.sqrt((seen[site].numpy() ** 2).mean(axis=0)) for site in (ATTENTION_INPUT, ATTENDED)}
    importance = np.zeros((attention.kv_heads, width))
    for group in range(attention.kv_heads):
        for neuron in range(width):
            energy = 0.0
            for head in range(group * heads_per_group, (group + 1) * heads_per_group):
                column = head * width + neuron
                energy += np.sum((output[:, column] * rms[ATTENDED][column]) ** 2)
            row = value[group * width + neuron] * rms[ATTENTION_INPUT]
            importance[group, neuron] = np.linalg.norm(row) + np.sqrt(energy)
    return importance


def test_the_value_neurons_kept_are_the_most_important(any_subject):
    attention, statistics = any_subject.attention, measured(any_subject)
    value_gram = statistics.head_gram(ATTENDED, attention.query_heads)
    expected = np.sort(np.argsort(-value_importance(any_subject, attention), axis=1)[:, :5], axis=1)
    pruned = prune_values(attention, 5, statistics.rms(ATTENTION_INPUT), value_gram)
    assert kept_neurons(attention.value, pruned.value, attention.kv_heads) == expected.tolist()


def test_queries_and_keys_are_as_near_as_their_ranks_allow_on_the_calibration_inputs(any_subject):
    attention = any_subject.attention
    planned = replace(attention.shape, query_rank=9, key_rank=4)
    factored = factor_queries_and_keys(attention, planned, measured(any_subject).rms(ATTENTION_INPUT))
    rms = np.sqrt((any_subject.activations()[ATTENTION_INPUT].numpy() ** 2).mean(axis=0))
    for before, after, rank in ((attention.query, factored.query, 9), (attention.key, factored.key, 4)):
        scaled = before.weight.double().numpy() * rms
        error = scaled - after.left.double().numpy() @ after.right.double().numpy() * rms
        optimum = np.linalg.norm(np.linalg.svd(scaled, compute_uv=False)[rank:])
        assert np.linalg.norm(error) == pytest.approx(optimum, rel=1e-4)
        assert after.bias is before.bias


@pytest.mark.parametrize("decomposition", ["values", "weights", "none"])
def test_pruning_at_full_width_and_full_rank_leaves_the_function_unchanged(any_subject, decomposition):
    attention = any_subject.attention
    ranks = {f"{name}_rank": min(24, 8 * heads)
             for name, heads in (("query", attention.query_heads), ("key", attention.kv_heads))}  # fmt: skip
    pruned = any_subject.prune(Olica(decomposition=decomposition), any_subject.layer.shape.with_attention(**ranks))
    assert_same_function(any_subject, pruned.attention)
    assert pruned.ffn is any_subject.ffn


@pytest.mark.parametrize("decomposition", ["values", "weights", "none"])
def test_pruning_rotates_the_values_first_and_then_drops_the_least_important(any_subject, decomposition):
    planned = any_subject.layer.shape.with_attention(value_dim=5, query_rank=9, key_rank=4)
    pruned = any_subject.prune(Olica(decomposition=decomposition), planned).attention

    dense = any_subject.attention if decomposition == "none" else rotated(any_subject, decomposition)[0]
    kept = np.sort(np.argsort(-value_importance(any_subject, dense), axis=1)[:, :5], axis=1)
    expected = dense.value.weight.unflatten(0, (dense.kv_heads, -1))
    expected = torch.cat([rows[neurons] for rows, neurons in zip(expected, kept, strict=True)])
    torch.testing.assert_close(pruned.value.weight, expected, atol=1e-4, rtol=1e-4)
