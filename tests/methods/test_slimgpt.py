"""SlimGPT: what goes and how the rest is changed, against float64 on the activations; and its growing sparsities."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from tiny_architectures import tiny

from distprune.budgets import Target, decoder_parameters, is_heterogeneous, layer_parameters
from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.layers.parts import map_tensors
from distprune.layers.sites import ATTENDED, NEURONS
from distprune.methods.even_layers import with_heads
from distprune.methods.slimgpt import SlimGPT, incremental_sparsities


def llama(layers: int = 10, **changes) -> Architecture:
    sizes = {"hidden_size": 32, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny(**sizes | {"vocab_size": 16} | changes, num_hidden_layers=layers)


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
    dense, per_group = this.attention, query_heads // kv_heads
    groups, weight = surgeon(dense.output.weight, this.activations()[ATTENDED], 8 * per_group, 2, method.damping)

    pruned = this.prune(method, with_heads(this.layer.shape, 2, per_group))
    for role, width in (("query", 8 * per_group), ("key", 8), ("value", 8)):
        before, after = getattr(dense, role), getattr(pruned.attention, role)
        assert torch.equal(after.weight, before.weight.unflatten(0, (-1, width))[groups].flatten(0, 1))
        assert torch.equal(after.bias, before.bias.unflatten(0, (-1, width))[groups].flatten())
    np.testing.assert_allclose(pruned.attention.output.weight, weight, rtol=1e-3, atol=1e-5)
    assert torch.equal(pruned.attention.output.bias, dense.output.bias)
    assert pruned.ffn is this.ffn


def assert_refitted(this) -> None:
    """That neurons leave one by one at the least error."""
    ffn, method = this.ffn, SlimGPT(largest_batch=1, smallest_batch=1, damping=0.1)
    neurons, weight = surgeon(ffn.down.weight, this.activations()[NEURONS], 1, 25, method.damping)
    pruned = this.prune(method, this.layer.shape.with_ffn(width=25))
    for before, after in zip(ffn.inputs, pruned.ffn.inputs, strict=True):
        assert torch.equal(after.weight, before.weight[neurons])
    np.testing.assert_allclose(pruned.ffn.down.weight, weight, rtol=1e-3, atol=1e-5)
    assert pruned.ffn.down.bias is ffn.down.bias
    assert pruned.attention is this.attention


def test_neurons_leave_at_the_least_error_and_the_rest_is_refitted(any_subject):
    assert_refitted(any_subject)


def test_neurons_without_a_gate_leave_so_too(gateless):
    assert_refitted(gateless)


def test_the_refit_makes_the_layer_nearer_to_the_dense_one(subject):
    this, method = subject(biases=False), SlimGPT(smallest_batch=4)
    pruned = this.prune(method, with_heads(this.layer.shape, 1, 2).with_ffn(width=24))
    rows = this.ffn.gate.weight.tolist()
    neurons = [rows.index(row) for row in pruned.ffn.gate.weight.tolist()]
    first = int(torch.equal(pruned.attention.key.weight, this.attention.key.weight[8:]))
    columns = this.attention.output.weight[:, 16 * first : 16 * first + 16]
    sliced = this.run_with(
        attention=replace(pruned.attention, output=replace(pruned.attention.output, weight=columns)),
        ffn=replace(pruned.ffn, down=replace(pruned.ffn.down, weight=this.ffn.down.weight[:, neurons])),
    )
    dense = this.run(this.layer)
    assert (this.run(pruned) - dense).norm() < 0.9 * (sliced - dense).norm()


def test_a_layer_planned_as_it_is_needs_no_moments_and_stays_as_it_is(subject):
    this, method = subject(), SlimGPT()
    shape = this.layer.shape
    assert not method.pruning_moments(shape, shape)
    pruned = this.prune(method, shape)
    assert pruned.attention is this.attention and pruned.ffn is this.ffn


def test_a_silent_layer_is_pruned_without_dividing_by_zero(subject):
    """Calibration text on which attention and FFN read nothing but zeros."""
    this = subject(biases=False)
    silent = replace(this, layer=replace(this.layer, rest=map_tensors(this.layer.rest, torch.zeros_like)))
    pruned = silent.prune(SlimGPT(), with_heads(this.layer.shape, 1, 2).with_ffn(width=24))
    assert all(tensor.isfinite().all() for tensor in this.model.names(0).state_of(pruned).values())


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
    model = llama()
    target, method = Target(model, sparsity), SlimGPT(**options)
    plan = method.plan(target, (), 8)
    step = 8 * 3 * 32
    assert abs(decoder_parameters(model, plan) - target.remaining) <= step / 2
    assert is_heterogeneous(model, plan)
    assert all(shape.ffn.width % 8 == 0 and shape.attention.heads_per_group == 2 for shape in plan)

    whole = [layer_parameters(model, index, model.dense_shape(index)) for index in range(10)]
    reached = [1 - layer_parameters(model, index, shape) / whole[index] for index, shape in enumerate(plan)]
    expected = incremental_sparsities(sparsity, 10, method.first_layer)
    np.testing.assert_allclose(reached, expected, atol=2 * step / whole[0])


def test_by_default_the_first_layer_keeps_everything_and_the_last_loses_most():
    model = llama()
    plan = SlimGPT().plan(Target(model, 0.3), (), 8)
    assert plan[0] == model.dense_shape(0)
    assert plan[-1].attention.kv_heads < 4 and plan[-1].ffn.width == min(shape.ffn.width for shape in plan)


def test_embeddings_that_count_cost_more_groups():
    target = Target(llama(vocab_size=1500), 0.3, count_embeddings=True)
    plan = SlimGPT(first_layer=1.0).plan(target, (), 8)
    assert 1 - target.decoder_sparsity < 0.625 < 1 - target.sparsity
    assert {shape.attention.kv_heads for shape in plan} == {2}


def test_a_plan_of_sparsity_zero_is_the_dense_model():
    model = llama()
    assert SlimGPT().plan(Target(model, 0.0), (), 8) == [model.dense_shape(0)] * 10


def test_a_target_out_of_reach_is_refused_before_any_weight_is_read():
    model = llama(num_key_value_heads=1, intermediate_size=32)
    with pytest.raises(InputError, match=r"sparsity 0\.8 can't be reached"):
        SlimGPT().check_target(Target(model, 0.8), 8)
    SlimGPT().check_target(Target(model, 0.3), 8)
