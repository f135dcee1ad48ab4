"""Curvature's pruned layers: of the planned shape, and no further from the dense ones than was foretold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distprune.decoder_layer import DecoderLayer, LayerShape, Linear, LowRank, state_of
from distprune.methods import Profile, make_method
from distprune.methods.curvature import Curvature
from distprune.methods.units import keep_rotary_pairs
from distprune.statistics import Gram, LayerStatistics

#: Refits that go wherever the calibration text is served best.
FREE = {"refit_damping": 1e-6, "branch_damping": 1e-7, "damping": 1e-6}
NOTHING = {"query_heads": 0, "kv_heads": 0, "query_key_dim": 0, "value_dim": 0, "output_bias": False}


def profile_of(this, method: Curvature) -> Profile:
    moments = [*method.dense_moments(this.layer.shape), *method.gradient_moments(this.layer.shape)]
    return method.profile(this.layer, this.statistics(moments))


def prune(this, planned: LayerShape, profile: Profile | None = None, **options) -> DecoderLayer:
    method = make_method("curvature", options)
    assert method.pruning_moments(this.layer.shape, planned) == ()
    profile = profile or profile_of(this, method)
    return method.prune(this.layer, planned, LayerStatistics(()), profile, this.observe)


def with_weights(this, **weights: Tensor):
    """The subject with other weights in some projections of its layer."""
    changed = {role: replace(getattr(this.layer, role), weight=weight) for role, weight in weights.items()}
    return replace(this, layer=replace(this.layer, **changed))


def without_groups(shape: LayerShape, gone: int) -> LayerShape:
    heads, left = shape.query_heads // shape.kv_heads, shape.kv_heads - gone
    return replace(shape, kv_heads=left, query_heads=left * heads)


CHANGES = [
    {"ffn_width": 24},
    {"ffn_width": 24, "calibration_rank": 3},
    {"ffn_width": 40, "calibration_rank": 3},
    {"value_dim": 5},
    {"query_key_dim": 4},
    {"query_key_dim": 6, "value_dim": 3, "ffn_width": 17},
    {"query_rank": 6, "ffn_width": 24},
    {"query_rank": 6, "key_rank": 3, "value_dim": 5, "output_rank": 7},
    {"output_rank": 4},
    {"ffn_width": 0, "down_bias": False, "value_dim": 1},
    NOTHING,
    NOTHING | {"ffn_width": 24, "calibration_rank": 5},
    NOTHING | {"ffn_width": 0, "down_bias": False},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_pruned_layer_has_the_planned_shape(any_subject, change):
    planned = replace(any_subject.layer.shape, **change)
    pruned = prune(any_subject, planned)
    assert pruned.shape == planned
    assert any_subject.run(pruned).isfinite().all()


@pytest.mark.parametrize(
    "change", [{}, {"value_dim": 5}, {"query_key_dim": 6, "value_dim": 3, "ffn_width": 17}], ids=str
)
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 3), (6, 3)])
def test_a_layer_with_fewer_groups_has_the_planned_shape(subject, query_heads, kv_heads, change):
    this = subject(query_heads=query_heads, kv_heads=kv_heads)
    for gone in (1, 2):
        planned = without_groups(replace(this.layer.shape, **change), gone)
        pruned = prune(this, planned)
        assert pruned.shape == planned
        assert this.run(pruned).isfinite().all()


def test_normed_heads_lose_values_and_groups(subject):
    this = subject(query_key_norm=True)
    planned = without_groups(replace(this.layer.shape, value_dim=5), 1)
    pruned = prune(this, planned)
    assert pruned.shape == planned
    assert torch.equal(pruned.query_norm, this.layer.query_norm)
    assert this.run(pruned).isfinite().all()


def test_a_layer_that_loses_nothing_is_the_layer_itself(any_subject):
    layer = any_subject.layer
    pruned = prune(any_subject, layer.shape)
    assert all(tensor is state_of(layer)[name] for name, tensor in state_of(pruned).items())


def test_a_layer_is_pruned_to_the_same_bits_again(subject):
    this = subject()
    planned = replace(without_groups(this.layer.shape, 1), value_dim=5, query_key_dim=6, ffn_width=24)
    first, again = (state_of(prune(this, planned)) for _ in range(2))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


# ------------------------------------------------------------------ what doesn't matter


def assert_same_function(this, pruned: DecoderLayer, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(this.run(pruned), this.run(this.layer), rtol=tolerance, atol=tolerance)


def test_neurons_that_feed_nothing_go_without_a_trace(any_subject):
    silent = torch.tensor([0, 3, 4, 17, 18, 30, 39])
    this = with_weights(any_subject, down=any_subject.layer.down.weight.index_fill(1, silent, 0))
    pruned = prune(this, replace(this.layer.shape, ffn_width=33))
    kept = [neuron for neuron in range(40) if neuron not in silent]
    assert torch.equal(pruned.gate.weight, this.layer.gate.weight[kept])
    assert_same_function(this, pruned)


@pytest.mark.parametrize("query_heads", [3, 6])
def test_groups_that_feed_nothing_go_without_a_trace(subject, query_heads):
    this = subject(query_heads=query_heads, kv_heads=3)
    columns = torch.arange(8 * query_heads).unflatten(0, (3, -1))[1]
    this = with_weights(this, output=this.layer.output.weight.index_fill(1, columns, 0))
    pruned = prune(this, without_groups(this.layer.shape, 1))
    kept = this.layer.key.weight.unflatten(0, (3, 8))[[0, 2]].flatten(0, 1)
    assert torch.equal(pruned.key.weight, kept)
    assert_same_function(this, pruned)


def test_rotary_pairs_that_no_query_looks_at_go_without_a_trace(any_subject):
    """The pairs 1 of the first group and 3 of the others, in the queries of all heads of a group."""
    layer, heads = any_subject.layer, any_subject.layer.query_heads
    gone = [1 if head < heads // layer.kv_heads else 3 for head in range(heads)]
    rows = torch.tensor([8 * head + pair + half for head, pair in enumerate(gone) for half in (0, 4)])
    bias = layer.query.bias
    query = Linear(layer.query.weight.index_fill(0, rows, 0), None if bias is None else bias.index_fill(0, rows, 0))
    this = replace(any_subject, layer=replace(layer, query=query))
    pruned = prune(this, replace(layer.shape, query_key_dim=6))
    left = [[0, 2, 3]] + [[0, 1, 2]] * (layer.kv_heads - 1)
    assert pruned.rotary_pairs.tolist() == left
    assert_same_function(this, pruned)


def test_value_neurons_beyond_the_span_of_what_is_read_go_without_a_trace(any_subject):
    """The output reads but five directions of every group's values."""
    layer, generator = any_subject.layer, torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(layer.kv_heads, 8, 8, generator=generator)).Q[..., :5]
    slices = layer.output.weight.unflatten(1, (layer.kv_heads, -1, 8))
    read = torch.einsum("dgmv,gvk,gwk->dgmw", slices, basis, basis).flatten(1)
    this = with_weights(any_subject, output=read)
    assert_same_function(this, prune(this, replace(layer.shape, value_dim=5), **FREE), tolerance=2e-3)


@pytest.mark.parametrize(("role", "rank"), [("query", 5), ("key", 5), ("output", 6)])
def test_projections_of_low_rank_are_factored_without_a_trace(subject, role, rank):
    this = subject(query_heads=4, kv_heads=4)
    left, singular, right = torch.linalg.svd(getattr(this.layer, role).weight)
    singular[rank:] = 0
    this = with_weights(this, **{role: left[:, :24] * singular @ right[:24]})
    pruned = prune(this, replace(this.layer.shape, **{f"{role}_rank": rank}))
    assert isinstance(getattr(pruned, role), LowRank)
    assert_same_function(this, pruned, tolerance=1e-3)


# ------------------------------------------------------------------ the refit


def errors(this, pruned: DecoderLayer, wanted: DecoderLayer, tap: str) -> float:
    """Mean squared distance at a tap, summed over channels, on the calibration activations."""
    change = this.activations(pruned)[tap] - this.activations(wanted)[tap]
    return change.square().sum(dim=1).mean().item()


@pytest.mark.parametrize("refit_damping", [1e-4, 0.03, 1.0])
def test_a_refit_ffn_is_never_further_from_the_dense_one(any_subject, refit_damping):
    profile = profile_of(any_subject, make_method("curvature", {}))
    for width in (8, 24, 36):
        planned = replace(any_subject.layer.shape, ffn_width=width)
        refitted, sliced = (
            prune(any_subject, planned, profile, refit_damping=damping) for damping in (refit_damping, 1e9)
        )
        error, unchanged = (errors(any_subject, layer, any_subject.layer, "ffn_output") for layer in (refitted, sliced))
        assert error < unchanged


@pytest.mark.parametrize("refit_damping", [1e-4, 0.03, 1.0])
@pytest.mark.parametrize(
    "change", [{"value_dim": 5}, {"value_dim": 2, "query_key_dim": 6}, {"query_rank": 6, "value_dim": 4}]
)
def test_refit_attention_is_never_further_from_the_dense_one_with_its_queries_and_keys(
    any_subject, change, refit_damping
):
    profile = profile_of(any_subject, make_method("curvature", {}))
    dense = any_subject.layer.shape
    wanted = prune(any_subject, replace(dense, **change | {"value_dim": dense.value_dim}), profile)
    refitted, sliced = (
        prune(any_subject, replace(dense, **change), profile, refit_damping=damping) for damping in (refit_damping, 1e9)
    )
    error, unchanged = (errors(any_subject, layer, wanted, "attention_output") for layer in (refitted, sliced))
    assert error < unchanged


def test_the_refit_is_ridge_regression_towards_the_weights_of_the_kept_neurons(subject):
    this, damping = subject(), 0.05
    pruned = prune(this, replace(this.layer.shape, ffn_width=25), refit_damping=damping)
    rows = this.layer.gate.weight.tolist()
    kept = [rows.index(row) for row in pruned.gate.weight.tolist()]
    neurons, weight = this.activations()["ffn_neurons"].numpy(), this.layer.down.weight.double().numpy()
    x, y, start = neurons[:, kept], neurons @ weight.T, weight[:, kept]
    gram = x.T @ x / len(x)
    penalty = damping * np.diag(gram).mean()
    expected = np.linalg.solve(gram + penalty * np.eye(len(kept)), x.T @ y / len(x) + penalty * start.T).T
    np.testing.assert_allclose(pruned.down.weight, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert torch.equal(pruned.down.bias, this.layer.down.bias)


@pytest.mark.parametrize("refit_damping", [1e-4, 0.03, 1.0])
def test_a_branch_brings_an_ffn_nearer_to_the_dense_one(any_subject, refit_damping):
    profile, found = profile_of(any_subject, make_method("curvature", {})), []
    for rank in (None, 2, 6):
        planned = replace(any_subject.layer.shape, ffn_width=16, calibration_rank=rank)
        found.append(lost(any_subject, prune(any_subject, planned, profile, refit_damping=refit_damping), "ffn_output"))
    assert found[0] > found[1] > found[2]


# ------------------------------------------------------------------ what was foretold


def lost(this, pruned: DecoderLayer, tap: str) -> float:
    """½E[ΔyᵀC Δy] at a module's output, with C the second moment of the gradient there."""
    change = (this.activations(pruned)[tap] - this.activations()[tap]).numpy()
    metric = this.statistics([Gram(f"{tap}_gradient")]).gram(f"{tap}_gradient").double().numpy()
    return np.einsum("ti,ij,tj->", change, metric, change) / len(change) / 2


@pytest.mark.parametrize("width", [10, 20, 30, 38])
def test_an_ffn_loses_what_its_curve_says(subject, width):
    this = subject()
    profile = profile_of(this, make_method("curvature", FREE))
    pruned = prune(this, replace(this.layer.shape, ffn_width=width), profile, **FREE)
    foretold = profile["ffn_costs"][profile["ffn_widths"] == width].item()
    assert lost(this, pruned, "ffn_output") == pytest.approx(foretold, rel=2e-2)


@pytest.mark.parametrize(("place", "rank"), [(0, 1), (1, 3), (2, 6)])
def test_an_ffn_with_a_branch_loses_so_much_less_as_is_said(subject, place, rank):
    this = subject()
    profile = profile_of(this, make_method("curvature", FREE))
    width = profile["branch_widths"][place].item()
    pruned = prune(this, replace(this.layer.shape, ffn_width=width, calibration_rank=rank), profile, **FREE)
    foretold = profile["ffn_costs"][profile["ffn_widths"] == width] - profile["branch_savings"][place, rank]
    assert lost(this, pruned, "ffn_output") == pytest.approx(foretold.item(), rel=2e-2)


@pytest.mark.parametrize("gone", [1, 2])
def test_attention_loses_with_its_groups_what_their_curve_says(subject, gone):
    this = subject(query_heads=6, kv_heads=3)
    profile = profile_of(this, make_method("curvature", FREE))
    pruned = prune(this, without_groups(this.layer.shape, gone), profile, **FREE)
    assert lost(this, pruned, "attention_output") == pytest.approx(profile["group_costs"][gone].item(), rel=2e-2)


@pytest.mark.parametrize("kept", [2, 4, 6])
def test_attention_of_one_head_loses_with_its_values_what_their_curve_says(subject, kept):
    this = subject(query_heads=1, kv_heads=1)
    profile = profile_of(this, make_method("curvature", FREE))
    pruned = prune(this, replace(this.layer.shape, value_dim=kept), profile, **FREE)
    assert lost(this, pruned, "attention_output") == pytest.approx(profile["value_costs"][0, kept].item(), rel=2e-2)


@pytest.mark.parametrize("rank", [2, 6, 10])
def test_a_factored_output_loses_what_its_curve_says(subject, rank):
    this = subject(query_heads=4, kv_heads=2)
    profile = profile_of(this, make_method("curvature", FREE))
    pruned = prune(this, replace(this.layer.shape, output_rank=rank), profile, **FREE)
    assert lost(this, pruned, "attention_output") == pytest.approx(profile["output_costs"][rank].item(), rel=2e-2)


def test_pairs_that_are_said_to_matter_less_do(subject):
    """The loss itself, half the squared norm of the output, changes least by the pairs that go first."""
    this = subject(query_heads=1, kv_heads=1)
    profile, dense = profile_of(this, make_method("curvature", {})), this.run(this.layer).clone()
    order = profile["pair_order"][0]
    shifts = [
        (this.run(keep_rotary_pairs(this.layer, kept.sort().values[None])) - dense).square().mean().item()
        for kept in (order[1:], order[:-1])
    ]
    assert shifts[0] < shifts[1]
