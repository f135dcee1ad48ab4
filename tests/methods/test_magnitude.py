"""Magnitude pruning, and the uniform budget that it has in common with Wanda-sp."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.budgets import Target, decoder_parameters
from distprune.errors import InputError
from distprune.methods.magnitude import Magnitude
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons, with_heads
from distprune.methods.wanda_sp import WandaSp
from distprune.modeling import PrunedConfig

HEADS = pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 3), (6, 3), (8, 4)])
METHODS = pytest.mark.parametrize("method", [Magnitude(), WandaSp()], ids=lambda method: method.name)


def llama(layers: int = 5, **changes) -> PrunedConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "vocab_size": 16,
    }
    return PrunedConfig(**sizes | changes, num_hidden_layers=layers)


def group_norm(layer, group: int) -> float:
    """The norm of all weights that leave with a KV group, picked one head at a time."""
    width, heads_per_group = 8, layer.query_heads // layer.kv_heads
    parts = [projection.weight[width * group : width * (group + 1)] for projection in (layer.key, layer.value)]
    for head in range(heads_per_group * group, heads_per_group * (group + 1)):
        span = slice(width * head, width * (head + 1))
        parts += [layer.query.weight[span], layer.output.weight[:, span]]
    return np.linalg.norm(np.concatenate([part.double().numpy().ravel() for part in parts]))


def neuron_norm(layer, neuron: int) -> float:
    parts = layer.gate.weight[neuron], layer.up.weight[neuron], layer.down.weight[:, neuron]
    return np.linalg.norm(np.concatenate([part.double().numpy() for part in parts]))


def largest(scores: list[float], keep: int) -> torch.Tensor:
    return torch.from_numpy(np.sort(np.argsort(scores)[len(scores) - keep :]))


@HEADS
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_the_units_of_the_largest_weights_stay_and_stay_as_they_are(subject, query_heads, kv_heads, biases):
    this, method = subject(query_heads=query_heads, kv_heads=kv_heads, biases=biases), Magnitude()
    layer = this.layer
    planned = replace(with_heads(layer.shape, kv_heads - 1, query_heads // kv_heads), ffn_width=24)
    groups = largest([group_norm(layer, group) for group in range(kv_heads)], kv_heads - 1)
    neurons = largest([neuron_norm(layer, neuron) for neuron in range(40)], 24)
    expected = keep_neurons(keep_heads(layer, heads_of_groups(groups, query_heads // kv_heads)), neurons)

    statistics = this.statistics(method.pruning_moments(layer.shape, planned))
    pruned = method.prune(layer, planned, statistics, {}, this.observe)
    assert pruned.shape == planned
    assert torch.equal(this.run(pruned), this.run(expected))


@pytest.mark.parametrize("role", ["query", "key", "value", "output"])
def test_a_group_stays_for_the_weights_of_any_of_its_projections(subject, role):
    this = subject(query_heads=6, kv_heads=3)
    projection, axis = getattr(this.layer, role), int(role == "output")
    middle = torch.ones(projection.weight.shape[axis])
    middle[len(middle) // 3 : 2 * len(middle) // 3] = 5
    weight = projection.weight * (middle if axis else middle[:, None])
    layer = replace(this.layer, **{role: replace(projection, weight=weight)})
    pruned = Magnitude().prune(layer, with_heads(layer.shape, 1, 2), this.statistics(()), {}, this.observe)
    assert torch.equal(pruned.key.weight, layer.key.weight[8:16])


def test_it_asks_for_nothing_of_the_data(subject):
    method, shape = Magnitude(), subject().layer.shape
    assert not method.dense_moments(shape) and not method.pruning_moments(shape, replace(shape, ffn_width=8))


@METHODS
@pytest.mark.parametrize(("sparsity", "groups"), [(0.1, 3), (0.3, 2), (0.45, 2), (0.55, 1)])
def test_the_plan_meets_its_target_with_the_same_shape_in_every_layer(method, sparsity, groups):
    target = Target(llama(), sparsity)
    plan = method.plan(target, (), 8)
    assert abs(decoder_parameters(target.config, plan) - target.remaining) <= 8 * 3 * 32 / 2
    assert {(shape.kv_heads, shape.query_heads) for shape in plan} == {(groups, 2 * groups)}
    widths = [shape.ffn_width for shape in plan]
    assert all(width % 8 == 0 for width in widths) and max(widths) - min(widths) <= 8


@METHODS
def test_one_kv_group_stays_whatever_the_target(method):
    config = llama(num_key_value_heads=1, intermediate_size=960)
    assert {shape.kv_heads for shape in method.plan(Target(config, 0.7), (), 8)} == {1}


@METHODS
def test_embeddings_that_count_cost_more_groups(method):
    target = Target(llama(vocab_size=1200, intermediate_size=384), 0.4, count_embeddings=True)
    assert target.decoder_sparsity > 0.5
    assert {shape.kv_heads for shape in method.plan(target, (), 8)} == {1}


@METHODS
def test_a_plan_of_sparsity_zero_is_the_dense_model_and_leaves_the_layer_as_it_is(subject, method):
    this = subject()
    assert method.plan(Target(this.config, 0.0), (), 8) == [this.layer.shape]
    statistics = this.statistics(method.pruning_moments(this.layer.shape, this.layer.shape))
    pruned = method.prune(this.layer, this.layer.shape, statistics, {}, this.observe)
    assert torch.equal(this.run(pruned), this.run(this.layer))


@METHODS
def test_a_target_out_of_reach_is_refused_before_any_weight_is_read(method):
    config = llama(num_key_value_heads=1, num_attention_heads=6, intermediate_size=32)
    with pytest.raises(InputError, match=r"sparsity 0\.8 can't be reached"):
        method.check_target(Target(config, 0.8), 8)
    method.check_target(Target(config, 0.3), 8)
