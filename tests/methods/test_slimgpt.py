"""SlimGPT: what goes and how the rest is changed, against float64 on the activations; and its growing sparsities."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch

from distprune.budgets import Target, decoder_parameters, layer_parameters
from distprune.decoder_layer import state_of
from distprune.errors import InputError
from distprune.methods.slimgpt import SlimGPT, incremental_sparsities
from distprune.methods.units import with_heads
from distprune.modeling import PrunedConfig


def llama(layers: int = 10, **changes) -> PrunedConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 192,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 16,
    }
    return PrunedConfig(**sizes | changes, num_hidden_layers=layers)


def prune(subject, method: SlimGPT, planned):
    statistics = subject.statistics(method.pruning_moments(subject.layer.shape, planned))
    return method.prune(subject.layer, planned, statistics, {}, subject.observe)


def surgeon(weight: torch.Tensor, x: torch.Tensor, width: int, keep: int, damping: float):
    """Greedy search over ridge regressions of the whole output: the units that stay, and their weight."""
    weight, x = weight.double().numpy(), x.numpy()
    gram = x.T @ x / len(x)
    gram += damping * np.diag(gram).mean() * np.eye(len(gram))

    def refit(units):
        columns = [unit * width + column for unit in units for column in range(width)]
        fitted = np.linalg.solve(gram[np.ix_(columns, columns)], gram[columns] @ weight.T).T
        change = weight.copy()
        change[:, columns] -= fitted
        return np.trace(change @ gram @ change.T), fitted

    units = list(range(weight.shape[1] // width))
    while len(units) > keep:
        units = min(([u for u in units if u != gone] for gone in units), key=lambda rest: refit(rest)[0])
    return units, refit(units)[1]


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (8, 4), (6, 3)])
def test_groups_leave_one_by_one_at_the_least_error_and_the_rest_is_refitted(subject, query_heads, kv_heads):
    this, method = subject(query_heads=query_heads, kv_heads=kv_heads), SlimGPT()
    layer, per_group = this.layer, query_heads // kv_heads
    values = this.activations()["attention_values"]
    groups, weight = surgeon(layer.output.weight, values, 8 * per_group, 2, method.damping)

    pruned = prune(this, method, with_heads(layer.shape, 2, per_group))
    assert pruned.shape == with_heads(layer.shape, 2, per_group)
    for role, width in (("query", 8 * per_group), ("key", 8), ("value", 8)):
        before, after = getattr(layer, role), getattr(pruned, role)
        assert torch.equal(after.weight, before.weight.unflatten(0, (-1, width))[groups].flatten(0, 1))
        assert torch.equal(after.bias, before.bias.unflatten(0, (-1, width))[groups].flatten())
    np.testing.assert_allclose(pruned.output.weight, weight, rtol=1e-3, atol=1e-5)
    assert torch.equal(pruned.output.bias, layer.output.bias)
    assert all(getattr(pruned, role) is getattr(layer, role) for role in ("gate", "up", "down"))


def test_neurons_leave_at_the_least_error_and_the_rest_is_refitted(any_subject):
    layer, method = any_subject.layer, SlimGPT(largest_batch=1, smallest_batch=1, damping=0.1)
    activations = any_subject.activations()["ffn_neurons"]
    neurons, weight = surgeon(layer.down.weight, activations, 1, 25, method.damping)
    pruned = prune(any_subject, method, replace(layer.shape, ffn_width=25))
    assert torch.equal(pruned.gate.weight, layer.gate.weight[neurons])
    assert torch.equal(pruned.up.weight, layer.up.weight[neurons])
    np.testing.assert_allclose(pruned.down.weight, weight, rtol=1e-3, atol=1e-5)
    assert pruned.down.bias is layer.down.bias
    assert all(getattr(pruned, role) is getattr(layer, role) for role in ("query", "key", "value", "output"))


def test_the_refit_makes_the_layer_nearer_to_the_dense_one(subject):
    this, method = subject(biases=False), SlimGPT(smallest_batch=4)
    planned = replace(with_heads(this.layer.shape, 1, 2), ffn_width=24)
    pruned = prune(this, method, planned)
    assert pruned.shape == planned
    rows = this.layer.gate.weight.tolist()
    neurons = [rows.index(row) for row in pruned.gate.weight.tolist()]
    first = int(torch.equal(pruned.key.weight, this.layer.key.weight[8:]))
    sliced = replace(
        pruned,
        output=replace(pruned.output, weight=this.layer.output.weight[:, 16 * first : 16 * first + 16]),
        down=replace(pruned.down, weight=this.layer.down.weight[:, neurons]),
    )
    dense = this.run(this.layer)
    assert (this.run(pruned) - dense).norm() < 0.9 * (this.run(sliced) - dense).norm()


def test_a_layer_planned_as_it_is_needs_no_moments_and_stays_as_it_is(subject):
    this, method = subject(), SlimGPT()
    shape = this.layer.shape
    assert not method.pruning_moments(shape, shape)
    assert prune(this, method, shape) is this.layer


def test_a_silent_layer_is_pruned_without_dividing_by_zero(subject):
    """Calibration text on which attention and FFN read nothing but zeros."""
    this = subject(biases=False)
    norms = {name: torch.zeros_like(getattr(this.layer, name)) for name in ("attention_norm", "ffn_norm")}
    silent = replace(this, layer=replace(this.layer, **norms))
    planned = replace(with_heads(this.layer.shape, 1, 2), ffn_width=24)
    pruned = prune(silent, SlimGPT(), planned)
    assert pruned.shape == planned
    assert all(tensor.isfinite().all() for tensor in state_of(pruned).values())


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layers", [1, 2, 32])
def test_sparsities_grow_with_the_logarithm_of_the_depth_about_their_mean(sparsity, first, layers):
    sparsities = incremental_sparsities(sparsity, layers, first)
    assert np.mean(sparsities) == pytest.approx(sparsity)
    assert all(0 <= value <= 1 + 1e-12 for value in sparsities)
    start, end = sparsities[0], sparsities[-1]
    expected = [start + (end - start) * log(index + 1) / log(max(layers, 2)) for index in range(layers)]
    assert sparsities == pytest.approx(expected)
    if layers > 1:
        assert start == pytest.approx(first * sparsity) or (start > first * sparsity and end == pytest.approx(1))


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("options", [{}, {"first_layer": 0.5}, {"first_layer": 1.0}])
def test_the_plan_meets_its_target_and_its_layers_follow_the_sparsities(sparsity, options):
    config = llama()
    target, method = Target(config, sparsity), SlimGPT(**options)
    plan = method.plan(target, (), 8)
    step = 8 * 3 * 32
    assert abs(decoder_parameters(config, plan) - target.remaining) <= step / 2
    assert all(shape.ffn_width % 8 == 0 and shape.query_heads == 2 * shape.kv_heads for shape in plan)

    whole = [layer_parameters(config, index, config.layer_shape(index)) for index in range(10)]
    reached = [1 - layer_parameters(config, index, shape) / whole[index] for index, shape in enumerate(plan)]
    expected = incremental_sparsities(sparsity, 10, method.first_layer)
    np.testing.assert_allclose(reached, expected, atol=2 * step / whole[0])


def test_by_default_the_first_layer_keeps_everything_and_the_last_loses_most():
    config = llama()
    plan = SlimGPT().plan(Target(config, 0.3), (), 8)
    assert plan[0] == config.layer_shape(0)
    assert plan[-1].kv_heads < 4 and plan[-1].ffn_width == min(shape.ffn_width for shape in plan)


def test_embeddings_that_count_cost_more_groups():
    target = Target(llama(vocab_size=1500), 0.3, count_embeddings=True)
    plan = SlimGPT(first_layer=1.0).plan(target, (), 8)
    assert 1 - target.decoder_sparsity < 0.625 < 1 - target.sparsity
    assert {shape.kv_heads for shape in plan} == {2}


def test_a_plan_of_sparsity_zero_is_the_dense_model():
    config = llama()
    assert SlimGPT().plan(Target(config, 0.0), (), 8) == [config.layer_shape(0)] * 10


def test_a_target_out_of_reach_is_refused_before_any_weight_is_read():
    config = llama(num_key_value_heads=1, intermediate_size=32)
    with pytest.raises(InputError, match=r"sparsity 0\.8 can't be reached"):
        SlimGPT().check_target(Target(config, 0.8), 8)
    SlimGPT().check_target(Target(config, 0.3), 8)
