"""OOPS: what is chosen and what is refitted, against float64 on the activations themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_architectures import tiny

from distprune.budgets import Target, decoder_parameters, is_heterogeneous
from distprune.errors import ConvergenceWarning, InputError
from distprune.layers.sites import ATTENDED, NEURONS
from distprune.methods import make_method
from distprune.methods.even_layers import with_heads
from distprune.methods.oops import grouped_head_interaction
from distprune.methods.units import head_interaction
from distprune.solvers import box_ridge

HEADS = pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 2), (6, 3), (3, 3)])


def contributions(subject) -> np.ndarray:
    """What every query head adds to the attention's output, (heads, tokens, d)."""
    attention, values = subject.attention, subject.activations()[ATTENDED].numpy()
    slices = np.split(values, attention.query_heads, axis=1)
    weights = np.split(attention.output.weight.double().numpy(), attention.query_heads, axis=1)
    return np.stack([piece @ weight.T for piece, weight in zip(slices, weights, strict=True)])


@HEADS
def test_heads_interact_as_their_contributions_do(subject, query_heads, kv_heads):
    this = subject(query_heads=query_heads, kv_heads=kv_heads)
    method = make_method("oops", {})
    per_group = query_heads // kv_heads
    smaller = with_heads(this.layer.shape, kv_heads - 1, per_group)
    gram = this.statistics(method.pruning_moments(this.layer.shape, smaller)).gram(ATTENDED)
    parts = contributions(this)
    expected = np.einsum("utd,vtd->uv", parts, parts) / parts.shape[1]
    np.testing.assert_allclose(head_interaction(this.attention, gram), expected, rtol=1e-4, atol=1e-6)

    blocks = this.statistics(method.dense_moments(this.layer.shape)).head_gram(ATTENDED, kv_heads)
    for group, found in enumerate(grouped_head_interaction(this.attention, blocks)):
        heads = slice(group * per_group, (group + 1) * per_group)
        np.testing.assert_allclose(found, expected[heads, heads], rtol=1e-4, atol=1e-6)


@HEADS
@pytest.mark.parametrize("selection", ["qp", "score"])
@pytest.mark.parametrize("fewer_heads", [0, 1])
def test_the_pruned_layer_has_the_planned_shape(subject, query_heads, kv_heads, selection, fewer_heads):
    this = subject(query_heads=query_heads, kv_heads=kv_heads)
    kept = max(1, kv_heads - 1)
    per_group = max(1, query_heads // kv_heads - fewer_heads)
    planned = with_heads(this.layer.shape, kept, per_group).with_ffn(width=24)
    pruned = this.prune(make_method("oops", {"selection": selection}), planned)
    assert torch.isfinite(this.run(pruned)).all()


def assert_ridge(this) -> None:
    """That the down projection is refitted to the dense output by ridge regression on the kept neurons."""
    damping = 0.05
    pruned = this.prune(make_method("oops", {"damping": damping}), this.layer.shape.with_ffn(width=25)).ffn
    rows = this.ffn.up.weight.tolist()
    kept = [rows.index(row) for row in pruned.up.weight.tolist()]

    neurons = this.activations()[NEURONS].numpy()
    weight = this.ffn.down.weight.double().numpy()
    x, y, start = neurons[:, kept], neurons @ weight.T, weight[:, kept]
    gram = x.T @ x / len(x)
    penalty = damping * np.diag(gram).mean()
    expected = np.linalg.solve(gram + penalty * np.eye(len(kept)), x.T @ y / len(x) + penalty * start.T).T
    np.testing.assert_allclose(pruned.down.weight, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert pruned.down.bias is this.ffn.down.bias


@pytest.mark.parametrize("biases", [True, False])
def test_the_refit_is_the_ridge_regression_of_the_dense_output_on_the_kept_neurons(subject, biases):
    assert_ridge(subject(biases=biases))


def test_neurons_without_a_gate_are_refitted_alike(gateless):
    assert_ridge(gateless)


@pytest.mark.parametrize("selection", ["qp", "score"])
def test_the_heads_that_say_least_go_from_every_group(subject, selection):
    """Query heads 1, 2 and 4 of 2 groups of 3 give almost nothing; of each group the two greatest can stay."""
    this = subject(query_heads=6, kv_heads=2, biases=False)
    scale = torch.tensor([1.0, 1e-3, 1e-4, 1.0, 1e-4, 1.0]).repeat_interleave(8)
    output = this.attention.output
    quiet = this.changed(attention=replace(this.attention, output=replace(output, weight=output.weight * scale)))
    planned = with_heads(this.layer.shape, 2, 2)
    method = make_method("oops", {"selection": selection, "outlier_weight": 0.0, "damping": 1e-6})
    pruned = quiet.prune(method, planned)
    rows = this.attention.query.weight.unflatten(0, (6, 8))
    assert torch.equal(pruned.attention.query.weight.unflatten(0, (4, 8)), rows[[0, 1, 3, 5]])
    torch.testing.assert_close(this.run(pruned), this.run(quiet.layer), rtol=1e-2, atol=1e-2)


def test_a_program_that_does_not_converge_is_told(subject, monkeypatch):
    solve = box_ridge.__globals__["solve_box_qp"]
    monkeypatch.setitem(box_ridge.__globals__, "solve_box_qp", partial(solve, max_iterations=1))
    this = subject(biases=False)
    with pytest.warns(ConvergenceWarning, match="refit from 24 channels.* rows stopped after"):
        this.prune(make_method("oops", {"radius": 0.1}), this.layer.shape.with_ffn(width=24))


def test_a_radius_bounds_how_far_the_refit_goes(subject):
    this, radius = subject(biases=False), 0.1
    planned = this.layer.shape.with_ffn(width=25)
    free, boxed = (this.prune(make_method("oops", options), planned).ffn for options in ({}, {"radius": radius}))
    rows = this.ffn.gate.weight.tolist()
    weight = this.ffn.down.weight
    start = weight[:, [rows.index(row) for row in boxed.gate.weight.tolist()]]
    bound = radius * weight.square().mean(dim=1, keepdim=True).sqrt() * (1 + 1e-5)
    assert ((boxed.down.weight - start).abs() <= bound).all()
    assert not ((free.down.weight - start).abs() <= bound).all()


def test_choosing_together_tells_apart_neurons_that_can_stand_in_for_each_other(subject):
    """Two strong neurons that cancel each other give nothing: together they can go, one by one they look dear."""
    this = subject(biases=False)
    ffn = this.ffn
    up, down = ffn.up.weight.clone(), ffn.down.weight.clone()
    gate = ffn.gate.weight.clone()
    gate[1], up[1] = gate[0], up[0]
    down[:, 0] = 50.0
    down[:, 1] = -50.0
    weights = {"gate": gate, "up": up, "down": down}
    changed = {name: replace(getattr(ffn, name), weight=value) for name, value in weights.items()}
    cancelling = this.changed(ffn=replace(ffn, **changed))
    planned = this.layer.shape.with_ffn(width=24)

    def keeps_the_pair(selection: str) -> bool:
        options = {"selection": selection, "outlier_weight": 0.0}
        kept = cancelling.prune(make_method("oops", options), planned).ffn.gate.weight
        return (kept == gate[0]).all(dim=1).any().item()

    assert keeps_the_pair("score") and not keeps_the_pair("qp")


def test_a_neuron_that_is_quiet_on_average_is_kept_for_its_outliers(subject):
    this = subject(biases=False)
    method = make_method("oops", {"outlier_weight": 10.0})
    statistics = this.statistics(method.pruning_moments(this.layer.shape, this.layer.shape.with_ffn(width=24)))
    activations = this.activations()[NEURONS].numpy()
    power, peak = (activations**2).mean(axis=0), (activations**2).max(axis=0)
    norms = (this.ffn.down.weight.double().numpy() ** 2).sum(axis=0)
    # torch's median of an even number of values is the lower of the two in the middle.
    expected = 10.0 * norms * peak / np.sort(peak / power)[(len(power) - 1) // 2]
    np.testing.assert_allclose(method._outlier_energy(this.ffn.down, statistics, NEURONS), expected, rtol=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("attention", [True, False])
def test_the_plan_meets_the_target_and_keeps_layers_with_outliers(sparsity, attention):
    layers, width = 5, 96
    model = tiny(hidden_size=32, num_hidden_layers=layers)
    generator = torch.Generator().manual_seed(0)
    profiles = [
        {
            "outlier_ratio": torch.tensor(0.01 * (index + 1)),
            "group_energy": torch.rand(2, generator=generator).sort().values * 5,
            "head_energy": torch.rand(2, 2, generator=generator).sort(dim=1).values * 2,
            "neuron_energy": torch.rand(width, generator=generator).sort().values,
        }
        for index in range(layers)
    ]
    target = Target(model, sparsity)
    plan = make_method("oops", {"attention": attention}).plan(target, profiles, 8)
    one_step = 8 * 3 * 32
    assert abs(decoder_parameters(model, plan) - target.remaining) <= one_step
    assert is_heterogeneous(model, plan)
    assert all(shape.ffn.width % 8 == 0 and 1 <= shape.attention.kv_heads <= 2 for shape in plan)
    assert all(shape.attention.heads_per_group in (1, 2) for shape in plan)
    if not attention:
        assert {shape.attention.kv_heads for shape in plan} == {2}
        widths = [shape.ffn.width for shape in plan]
        assert widths == sorted(widths) and widths[0] < widths[-1]


def test_at_sparsity_zero_nothing_goes():
    model = tiny()
    plan = make_method("oops", {}).plan(Target(model, 0.0), [{}] * 3, 8)
    assert plan == [model.dense_shape(0)] * 3


def test_a_target_below_the_smallest_layers_is_refused_before_any_profile():
    model = tiny(hidden_size=32, num_key_value_heads=4, intermediate_size=16)
    with pytest.raises(InputError, match=r"sparsity 0\.9"):
        make_method("oops", {"attention": False}).check_target(Target(model, 0.9), 8)
    make_method("oops", {}).check_target(Target(model, 0.4), 8)


def test_silent_neurons_do_no_harm(subject):
    this = subject(biases=False)
    gate = this.ffn.gate.weight.clone()
    gate[:30] = 0.0
    silenced = this.changed(ffn=replace(this.ffn, gate=replace(this.ffn.gate, weight=gate)))
    pruned = silenced.prune(make_method("oops", {}), this.layer.shape.with_ffn(width=24))
    torch.testing.assert_close(silenced.run(pruned), silenced.run(silenced.layer), rtol=0.05, atol=0.05)
