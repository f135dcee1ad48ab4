"""Curvature's pruned layers: of the planned shape, and no further from the dense ones than was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distprune.engine.worker.dense_states import DenseStates
from distprune.layers.parts import DecoderLayer, Linear, LowRank, outputs_of
from distprune.layers.shapes import LayerShape
from distprune.layers.sites import ATTENDED, ATTENTION_OUTPUT, FFN_OUTPUT, NEURONS, Site
from distprune.methods import LayerToPrune, Profile, make_method
from distprune.methods.even_layers import with_heads
from distprune.methods.units import keep_rotary_pairs
from distprune.statistics import Gram, LayerStatistics, Moment, sites_of

#: Refits that go wherever the calibration text is served best.
FREE = {"refit_damping": 1e-6, "branch_damping": 1e-7, "damping": 1e-6}


def profile_of(this, options: Mapping[str, object] = FREE) -> Profile:
    return this.profile(make_method("curvature", options))


def prune(this, planned: LayerShape, profile: Profile | None = None, **options) -> DecoderLayer:
    method = make_method("curvature", options)
    assert method.pruning_moments(this.layer.shape, planned) == ()
    return this.prune(method, planned, profile)


def with_weights(this, **weights: Tensor):
    """The subject with other weights in some projections of its layer."""
    changed = {}
    for part in ("attention", "ffn"):
        before = getattr(this.layer, part)
        own = {
            role: replace(getattr(before, role), weight=new) for role, new in weights.items() if hasattr(before, role)
        }
        changed[part] = replace(before, **own)
    return this.changed(**changed)


def without_groups(shape: LayerShape, gone: int) -> LayerShape:
    return with_heads(shape, shape.attention.kv_heads - gone, shape.attention.heads_per_group)


#: Changes of attention, None where it goes, and of the FFN.
CHANGES = [
    ({}, {"width": 24}),
    ({}, {"width": 24, "branch_rank": 3}),
    ({}, {"width": 40, "branch_rank": 3}),
    ({"value_dim": 5}, {}),
    ({"query_key_dim": 4}, {}),
    ({"query_key_dim": 6, "value_dim": 3}, {"width": 17}),
    ({"query_rank": 6}, {"width": 24}),
    ({"query_rank": 6, "key_rank": 3, "value_dim": 5, "output_rank": 7}, {}),
    ({"output_rank": 4}, {}),
    ({"value_dim": 1}, None),
    (None, {}),
    (None, {"width": 24, "branch_rank": 5}),
    (None, None),
]


def changed(shape: LayerShape, attention: dict | None, ffn: dict | None) -> LayerShape:
    shape = replace(shape, attention=None) if attention is None else shape.with_attention(**attention)
    return replace(shape, ffn=None) if ffn is None else shape.with_ffn(**ffn)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_pruned_layer_has_the_planned_shape(any_subject, change):
    pruned = prune(any_subject, changed(any_subject.layer.shape, *change))
    assert any_subject.run(pruned).isfinite().all()
    assert pruned.rest is any_subject.layer.rest


@pytest.mark.parametrize(
    "change", [({}, {}), ({"value_dim": 5}, {}), ({"query_key_dim": 6, "value_dim": 3}, {"width": 17})], ids=str
)
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 3), (6, 3)])
def test_a_layer_with_fewer_groups_has_the_planned_shape(subject, query_heads, kv_heads, change):
    this = subject(query_heads=query_heads, kv_heads=kv_heads)
    for gone in (1, 2):
        pruned = prune(this, without_groups(changed(this.layer.shape, *change), gone))
        assert this.run(pruned).isfinite().all()


def test_normed_heads_lose_values_and_groups(subject):
    this = subject("qwen3")
    pruned = prune(this, without_groups(this.layer.shape.with_attention(value_dim=5), 1))
    assert torch.equal(pruned.rest["self_attn.q_norm.weight"], this.layer.rest["self_attn.q_norm.weight"])
    assert this.run(pruned).isfinite().all()


@pytest.mark.parametrize("change", [{"width": 24}, {"width": 24, "branch_rank": 3}], ids=str)
def test_an_ffn_without_a_gate_is_narrowed(gateless, change):
    pruned = prune(gateless, gateless.layer.shape.with_ffn(**change))
    assert pruned.ffn.gate is None and outputs_of(pruned.ffn.up) == 24
    assert pruned.attention is gateless.attention
    assert gateless.run(pruned).isfinite().all()


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_layer_without_a_part_loses_of_the_other(subject, part):
    """A part that never was there stays away; only what is there is looked at."""
    this = subject()
    partial = this.changed(**{part: None})
    other = {"attention": ({}, {"width": 24, "branch_rank": 3}), "ffn": ({"value_dim": 5}, {})}[part]
    pruned = prune(partial, replace(changed(this.layer.shape, *other), **{part: None}))
    assert this.run(pruned).isfinite().all()


def test_a_layer_that_loses_nothing_is_the_layer_itself(any_subject):
    assert prune(any_subject, any_subject.layer.shape) is any_subject.layer


def test_a_layer_is_pruned_to_the_same_bits_again(subject):
    this = subject()
    planned = changed(without_groups(this.layer.shape, 1), {"value_dim": 5, "query_key_dim": 6}, {"width": 24})
    first, again = (this.model.names(0).state_of(prune(this, planned)) for _ in range(2))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


# ------------------------------------------------------------------ towards the dense model


def towards_dense(this, planned: LayerShape, own: Tensor, **options) -> DecoderLayer:
    """The layer pruned on hidden states of its own, beside the dense model's."""
    method, runner = make_method("curvature", FREE | options), this._runner
    states = DenseStates(runner, this.layer, 0, this.hidden_states, this.run(this.layer))

    def observe(variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        statistics = LayerStatistics(moments)
        update, sites = states.observing(statistics.update, sites_of(moments))
        runner.observe(variation, 0, own, update, sites)
        return statistics

    assert method.aims_at_dense(this.layer.shape) == (options["dense_aim"] > 0)
    given = LayerToPrune(
        0, this.layer, planned, LayerStatistics(()), this.profile(method), observe, sparsity=0.3, sees_errors=True
    )
    return method.prune(given)


@pytest.mark.parametrize("aim", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("change", [{"width": 24}, {"width": 24, "branch_rank": 3}], ids=str)
def test_an_ffn_aims_as_far_as_asked_at_the_dense_models_hidden_states(subject, change, aim):
    this, own = subject(biases=False), pushed(subject(biases=False))
    pruned = towards_dense(this, this.layer.shape.with_ffn(**change), own, dense_aim=aim)
    without = replace(pruned, ffn=replace(pruned.ffn, down=zeroed(pruned.ffn.down)))
    whole = this._runner.run(this.layer, 0, own)
    wanted = whole + aim * (this.run(this.layer) - whole)
    expected = least_squares(this, pruned, own, NEURONS, wanted - this._runner.run(without, 0, own))
    np.testing.assert_allclose(pruned.ffn.down.weight.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("aim", [0.0, 0.4, 1.0])
def test_attention_aims_as_far_as_asked_at_the_dense_models_hidden_states(subject, aim):
    this, own = subject(biases=False), pushed(subject(biases=False))
    pruned = towards_dense(this, this.layer.shape.with_attention(value_dim=5), own, dense_aim=aim)
    pruned, dense = replace(pruned, ffn=None), replace(this.layer, ffn=None)
    without = replace(pruned, attention=replace(pruned.attention, output=zeroed(pruned.attention.output)))
    whole = this._runner.run(dense, 0, own)
    wanted = whole + aim * (this.run(dense) - whole)
    expected = least_squares(this, pruned, own, ATTENDED, wanted - this._runner.run(without, 0, own))
    np.testing.assert_allclose(pruned.attention.output.weight.numpy(), expected, atol=2e-3)


def pushed(this) -> Tensor:
    """Hidden states such as layers that were pruned before give."""
    return this.hidden_states + 0.3 * torch.randn(this.hidden_states.shape, generator=torch.Generator().manual_seed(1))


def zeroed(projection: Linear) -> Linear:
    return Linear(torch.zeros_like(projection.weight))


def least_squares(this, layer: DecoderLayer, own: Tensor, inputs: Site, wanted: Tensor) -> np.ndarray:
    """The map from what is seen at a site to what is wanted, (out, in), in float64 on all tokens."""
    seen: list[Tensor] = []
    this._runner.run(layer, 0, own, observe=lambda batch: seen.append(batch[inputs].double()), sites={inputs})
    solution, *_ = np.linalg.lstsq(torch.cat(seen).numpy(), wanted.flatten(0, 1).double().numpy(), rcond=None)
    return solution.T


# ------------------------------------------------------------------ what doesn't matter


def assert_same_function(this, pruned: DecoderLayer, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(this.run(pruned), this.run(this.layer), rtol=tolerance, atol=tolerance)


def test_neurons_that_feed_nothing_go_without_a_trace(any_subject):
    silent = torch.tensor([0, 3, 4, 17, 18, 30, 39])
    this = with_weights(any_subject, down=any_subject.ffn.down.weight.index_fill(1, silent, 0))
    pruned = prune(this, this.layer.shape.with_ffn(width=33))
    kept = [neuron for neuron in range(40) if neuron not in silent]
    assert torch.equal(pruned.ffn.gate.weight, this.ffn.gate.weight[kept])
    assert_same_function(this, pruned)


@pytest.mark.parametrize("query_heads", [3, 6])
def test_groups_that_feed_nothing_go_without_a_trace(subject, query_heads):
    this = subject(query_heads=query_heads, kv_heads=3)
    columns = torch.arange(8 * query_heads).unflatten(0, (3, -1))[1]
    this = with_weights(this, output=this.attention.output.weight.index_fill(1, columns, 0))
    pruned = prune(this, without_groups(this.layer.shape, 1))
    kept = this.attention.key.weight.unflatten(0, (3, 8))[[0, 2]].flatten(0, 1)
    assert torch.equal(pruned.attention.key.weight, kept)
    assert_same_function(this, pruned)


def test_rotary_pairs_that_no_query_looks_at_go_without_a_trace(any_subject):
    """The pairs 1 of the first group and 3 of the others, in the queries of all heads of a group."""
    attention, heads = any_subject.attention, any_subject.attention.query_heads
    gone = [1 if head < heads // attention.kv_heads else 3 for head in range(heads)]
    rows = torch.tensor([8 * head + pair + half for head, pair in enumerate(gone) for half in (0, 4)])
    weight, bias = attention.query.weight, attention.query.bias
    query = Linear(weight.index_fill(0, rows, 0), None if bias is None else bias.index_fill(0, rows, 0))
    this = any_subject.changed(attention=replace(attention, query=query))
    pruned = prune(this, this.layer.shape.with_attention(query_key_dim=6))
    left = [[0, 2, 3]] + [[0, 1, 2]] * (attention.kv_heads - 1)
    assert pruned.attention.rotary_pairs.tolist() == left
    assert_same_function(this, pruned)


def test_value_neurons_beyond_the_span_of_what_is_read_go_without_a_trace(any_subject):
    """The output reads but five directions of every group's values."""
    attention, generator = any_subject.attention, torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(attention.kv_heads, 8, 8, generator=generator)).Q[..., :5]
    slices = attention.output.weight.unflatten(1, (attention.kv_heads, -1, 8))
    read = torch.einsum("dgmv,gvk,gwk->dgmw", slices, basis, basis).flatten(1)
    this = with_weights(any_subject, output=read)
    assert_same_function(this, prune(this, this.layer.shape.with_attention(value_dim=5), **FREE), tolerance=2e-3)


@pytest.mark.parametrize(("role", "rank"), [("query", 5), ("key", 5), ("output", 6)])
def test_projections_of_low_rank_are_factored_without_a_trace(subject, role, rank):
    this = subject(query_heads=4, kv_heads=4)
    left, singular, right = torch.linalg.svd(getattr(this.attention, role).weight)
    singular[rank:] = 0
    this = with_weights(this, **{role: left[:, :24] * singular @ right[:24]})
    pruned = prune(this, this.layer.shape.with_attention(**{f"{role}_rank": rank}))
    assert isinstance(getattr(pruned.attention, role), LowRank)
    assert_same_function(this, pruned, tolerance=1e-3)


# ------------------------------------------------------------------ the refit


def errors(this, pruned: DecoderLayer, wanted: DecoderLayer, site: Site) -> float:
    """Mean squared distance at a site, summed over channels, on the calibration activations."""
    change = this.activations(pruned)[site] - this.activations(wanted)[site]
    return change.square().sum(dim=1).mean().item()


@pytest.mark.parametrize("refit_damping", [1e-4, 0.03, 1.0])
def test_a_refit_ffn_is_never_further_from_the_dense_one(any_subject, refit_damping):
    profile = profile_of(any_subject, {})
    for width in (8, 24, 36):
        planned = any_subject.layer.shape.with_ffn(width=width)
        refitted, sliced = (
            prune(any_subject, planned, profile, refit_damping=damping) for damping in (refit_damping, 1e9)
        )
        error, unchanged = (errors(any_subject, layer, any_subject.layer, FFN_OUTPUT) for layer in (refitted, sliced))
        assert error < unchanged


@pytest.mark.parametrize("refit_damping", [1e-4, 0.03, 1.0])
@pytest.mark.parametrize(
    "change", [{"value_dim": 5}, {"value_dim": 2, "query_key_dim": 6}, {"query_rank": 6, "value_dim": 4}]
)
def test_refit_attention_is_never_further_from_the_dense_one_with_its_queries_and_keys(
    any_subject, change, refit_damping
):
    profile = profile_of(any_subject, {})
    dense = any_subject.layer.shape
    wanted = prune(any_subject, dense.with_attention(**change | {"value_dim": 8}), profile)
    refitted, sliced = (
        prune(any_subject, dense.with_attention(**change), profile, refit_damping=damping)
        for damping in (refit_damping, 1e9)
    )
    error, unchanged = (errors(any_subject, layer, wanted, ATTENTION_OUTPUT) for layer in (refitted, sliced))
    assert error < unchanged


def test_the_refit_is_ridge_regression_towards_the_weights_of_the_kept_neurons(subject):
    assert_ridge(subject())


def test_the_refit_of_an_ffn_without_a_gate_is_the_same(gateless):
    assert_ridge(gateless)


def assert_ridge(this) -> None:
    damping = 0.05
    pruned = prune(this, this.layer.shape.with_ffn(width=25), refit_damping=damping).ffn
    rows = this.ffn.up.weight.tolist()
    kept = [rows.index(row) for row in pruned.up.weight.tolist()]
    neurons, weight = this.activations()[NEURONS].numpy(), this.ffn.down.weight.double().numpy()
    x, y, start = neurons[:, kept], neurons @ weight.T, weight[:, kept]
    gram = x.T @ x / len(x)
    penalty = damping * np.diag(gram).mean()
    expected = np.linalg.solve(gram + penalty * np.eye(len(kept)), x.T @ y / len(x) + penalty * start.T).T
    np.testing.assert_allclose(pruned.down.weight, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert pruned.down.bias is this.ffn.down.bias


@pytest.mark.parametrize("refit_damping", [1e-4, 0.03, 1.0])
def test_a_branch_brings_an_ffn_nearer_to_the_dense_one(any_subject, refit_damping):
    profile, found = profile_of(any_subject, {}), []
    for rank in (None, 2, 6):
        planned = any_subject.layer.shape.with_ffn(width=16, branch_rank=rank)
        found.append(lost(any_subject, prune(any_subject, planned, profile, refit_damping=refit_damping), FFN_OUTPUT))
    assert found[0] > found[1] > found[2]


# ------------------------------------------------------------------ what was predicted


def lost(this, pruned: DecoderLayer, site: Site) -> float:
    """½E[ΔyᵀC Δy] at a module's output, with C the second moment of the gradient there."""
    change = (this.activations(pruned)[site] - this.activations()[site]).numpy()
    metric = this.statistics([Gram(site.gradient)]).gram(site.gradient).double().numpy()
    return np.einsum("ti,ij,tj->", change, metric, change) / len(change) / 2


@pytest.mark.parametrize("width", [10, 20, 30, 38])
def test_an_ffn_loses_what_its_curve_says(subject, width):
    this = subject()
    profile = profile_of(this)
    pruned = prune(this, this.layer.shape.with_ffn(width=width), profile, **FREE)
    predicted = profile["ffn_costs"][profile["ffn_widths"] == width].item()
    assert lost(this, pruned, FFN_OUTPUT) == pytest.approx(predicted, rel=2e-2)


@pytest.mark.parametrize(("place", "rank"), [(0, 1), (1, 3), (2, 6)])
def test_an_ffn_with_a_branch_loses_so_much_less_as_is_said(subject, place, rank):
    this = subject()
    profile = profile_of(this)
    width = profile["branch_widths"][place].item()
    pruned = prune(this, this.layer.shape.with_ffn(width=width, branch_rank=rank), profile, **FREE)
    predicted = profile["ffn_costs"][profile["ffn_widths"] == width] - profile["branch_savings"][place, rank]
    assert lost(this, pruned, FFN_OUTPUT) == pytest.approx(predicted.item(), rel=2e-2)


@pytest.mark.parametrize("gone", [1, 2])
def test_attention_loses_with_its_groups_what_their_curve_says(subject, gone):
    this = subject(query_heads=6, kv_heads=3)
    profile = profile_of(this)
    pruned = prune(this, without_groups(this.layer.shape, gone), profile, **FREE)
    assert lost(this, pruned, ATTENTION_OUTPUT) == pytest.approx(profile["group_costs"][gone].item(), rel=2e-2)


@pytest.mark.parametrize("kept", [2, 4, 6])
def test_attention_of_one_head_loses_with_its_values_what_their_curve_says(subject, kept):
    this = subject(query_heads=1, kv_heads=1)
    profile = profile_of(this)
    pruned = prune(this, this.layer.shape.with_attention(value_dim=kept), profile, **FREE)
    assert lost(this, pruned, ATTENTION_OUTPUT) == pytest.approx(profile["value_costs"][0, kept].item(), rel=2e-2)


@pytest.mark.parametrize("rank", [2, 6, 10])
def test_a_factored_output_loses_what_its_curve_says(subject, rank):
    this = subject(query_heads=4, kv_heads=2)
    profile = profile_of(this)
    pruned = prune(this, this.layer.shape.with_attention(output_rank=rank), profile, **FREE)
    assert lost(this, pruned, ATTENTION_OUTPUT) == pytest.approx(profile["output_costs"][rank].item(), rel=2e-2)


def test_pairs_that_are_said_to_matter_less_do(subject):
    """The loss itself, half the squared norm of the output, changes least by the pairs that go first."""
    this = subject(query_heads=1, kv_heads=1)
    profile, dense = profile_of(this, {}), this.run(this.layer).clone()
    order = profile["pair_order"][0]
    shifts = [
        (this.run_with(attention=keep_rotary_pairs(this.attention, kept.sort().values[None])) - dense).square().mean()
        for kept in (order[1:], order[:-1])
    ]
    assert shifts[0] < shifts[1]
