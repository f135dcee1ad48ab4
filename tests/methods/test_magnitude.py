"""Magnitude pruning, and the uniform budget that it has in common with Wanda-sp."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_architectures import tiny

from distprune.budgets import Target, decoder_parameters, is_heterogeneous
from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.methods.even_layers import with_heads
from distprune.methods.magnitude import Magnitude
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.methods.wanda_sp import WandaSp

HEADS = pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 3), (6, 3), (8, 4)])
METHODS = pytest.mark.parametrize("method", [Magnitude(), WandaSp()], ids=lambda method: method.name)


def llama(layers: int = 5, **changes) -> Architecture:
    sizes = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 16}
    return tiny(**sizes | changes, num_hidden_layers=layers)


def group_norm(attention, group: int) -> float:
    """The norm of all weights that leave with a KV group, picked one head at a time."""
    width, heads_per_group = 8, attention.query_heads // attention.kv_heads
    parts = [projection.weight[width * group : width * (group + 1)] for projection in (attention.key, attention.value)]
    for head in range(heads_per_group * group, heads_per_group * (group + 1)):
        span = slice(width * head, width * (head + 1))
        parts += [attention.query.weight[span], attention.output.weight[:, span]]
    return np.linalg.norm(np.concatenate([part.double().numpy().ravel() for part in parts]))


def neuron_norm(ffn, neuron: int) -> float:
    parts = ffn.up.weight[neuron], ffn.down.weight[:, neuron], *([ffn.gate.weight[neuron]] if ffn.gate else [])
    return np.linalg.norm(np.concatenate([part.double().numpy() for part in parts]))


def largest(scores: list[float], keep: int) -> torch.Tensor:
    return torch.from_numpy(np.sort(np.argsort(scores)[len(scores) - keep :]))


@HEADS
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_the_units_of_the_largest_weights_stay_and_stay_as_they_are(subject, query_heads, kv_heads, biases):
    this = subject(query_heads=query_heads, kv_heads=kv_heads, biases=biases)
    planned = with_heads(this.layer.shape, kv_heads - 1, query_heads // kv_heads).with_ffn(width=24)
    groups = largest([group_norm(this.attention, group) for group in range(kv_heads)], kv_heads - 1)
    neurons = largest([neuron_norm(this.ffn, neuron) for neuron in range(40)], 24)
    heads = heads_of_groups(groups, query_heads // kv_heads)
    expected = this.run_with(attention=keep_heads(this.attention, heads), ffn=keep_neurons(this.ffn, neurons))
    assert torch.equal(this.run(this.prune(Magnitude(), planned)), expected)


def test_neurons_without_a_gate_are_worth_their_two_vectors(gateless):
    neurons = largest([neuron_norm(gateless.ffn, neuron) for neuron in range(40)], 24)
    pruned = gateless.prune(Magnitude(), gateless.layer.shape.with_ffn(width=24))
    assert torch.equal(gateless.run(pruned), gateless.run_with(ffn=keep_neurons(gateless.ffn, neurons)))


@pytest.mark.parametrize("role", ["query", "key", "value", "output"])
def test_a_group_stays_for_the_weights_of_any_of_its_projections(subject, role):
    this = subject(query_heads=6, kv_heads=3)
    projection, axis = getattr(this.attention, role), int(role == "output")
    middle = torch.ones(projection.weight.shape[axis])
    middle[len(middle) // 3 : 2 * len(middle) // 3] = 5
    weight = projection.weight * (middle if axis else middle[:, None])
    this = this.changed(attention=replace(this.attention, **{role: replace(projection, weight=weight)}))
    pruned = this.prune(Magnitude(), with_heads(this.layer.shape, 1, 2))
    assert torch.equal(pruned.attention.key.weight, this.attention.key.weight[8:16])


def test_it_asks_for_nothing_of_the_data(subject):
    method, shape = Magnitude(), subject().layer.shape
    assert not method.dense_moments(shape) and not method.pruning_moments(shape, shape.with_ffn(width=8))


@METHODS
@pytest.mark.parametrize(("sparsity", "groups"), [(0.1, 3), (0.3, 2), (0.45, 2), (0.55, 1)])
def test_the_plan_meets_its_target_with_the_same_shape_in_every_layer(method, sparsity, groups):
    target = Target(llama(), sparsity)
    plan = method.plan(target, (), 8)
    assert abs(decoder_parameters(target.model, plan) - target.remaining) <= 8 * 3 * 36 / 2
    assert is_heterogeneous(target.model, plan)
    assert {(shape.attention.kv_heads, shape.attention.query_heads) for shape in plan} == {(groups, 2 * groups)}
    widths = [shape.ffn.width for shape in plan]
    assert all(width % 8 == 0 for width in widths) and max(widths) - min(widths) <= 8


@METHODS
def test_one_kv_group_stays_whatever_the_target(method):
    model = llama(num_key_value_heads=1, intermediate_size=960)
    assert {shape.attention.kv_heads for shape in method.plan(Target(model, 0.7), (), 8)} == {1}


@METHODS
def test_embeddings_that_count_cost_more_groups(method):
    target = Target(llama(vocab_size=1200, intermediate_size=384), 0.4, count_embeddings=True)
    assert target.decoder_sparsity > 0.5
    assert {shape.attention.kv_heads for shape in method.plan(target, (), 8)} == {1}


@METHODS
def test_a_plan_of_sparsity_zero_is_the_dense_model_and_leaves_the_layer_as_it_is(subject, method):
    this = subject()
    assert method.plan(Target(this.model, 0.0), (), 8) == [this.layer.shape]
    pruned = this.prune(method, this.layer.shape)
    assert pruned.attention is this.attention and pruned.ffn is this.ffn


@METHODS
def test_a_target_out_of_reach_is_refused_before_any_weight_is_read(method):
    model = llama(num_key_value_heads=1, num_attention_heads=6, intermediate_size=32)
    with pytest.raises(InputError, match=r"sparsity 0\.8 can't be reached"):
        method.check_target(Target(model, 0.8), 8)
    method.check_target(Target(model, 0.3), 8)
