"""Shapes that a plan expects: those of the method's own plan, with every layer and unit worth about as much."""

from __future__ import annotations

import pytest
from by_gradient import ByGradient
from kinds_of_methods import OF_ALL_MODELS
from latency_tables import made_up_table
from tiny_architectures import tiny

from distprune.budgets import RESOURCES, Target, is_stock
from distprune.layers.architecture import Architecture
from distprune.methods import make_method

LAYERS, ALIGN = 4, 8


def model(kv_heads: int) -> Architecture:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "head_dim": 32}
    return tiny(**sizes, num_attention_heads=8, num_key_value_heads=kv_heads)


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.6, 0.9])
def test_curvatures_global_plan_is_within_its_budget_whatever_the_target(kv_heads, resource, sparsity):
    dense = model(kv_heads)
    target = Target(dense, sparsity, resource=resource, latencies=made_up_table(dense))
    shapes = make_method("curvature", {}).even_shapes(target, ALIGN)
    left = target.remaining - target.amount(shapes)
    assert 0 <= left <= 0.04 * target.dense
    assert shapes[0].attention is not None


@pytest.mark.parametrize("resource", ["parameters", "flops", "bytes", "latency"])
def test_curvatures_equal_plan_is_one_of_the_original_architecture(resource):
    target = Target(model(4), 0.3, resource=resource, layout="stock", latencies=made_up_table(model(4)))
    shapes = make_method("curvature", {}).even_shapes(target, ALIGN)
    assert is_stock(target.model, shapes)
    assert target.amount(shapes) == pytest.approx(target.remaining, rel=0.02)


def test_at_moderate_targets_no_part_of_curvatures_goes_whole():
    shapes = make_method("curvature", {}).even_shapes(Target(model(4), 0.3), ALIGN)
    assert all(shape.attention and shape.ffn for shape in shapes)
    assert max(shape.ffn.width for shape in shapes) < 1024


@pytest.mark.parametrize("name", OF_ALL_MODELS)
def test_every_method_expects_to_meet_its_target(name):
    target = Target(model(4), 0.3)
    shapes = make_method(name, {}).even_shapes(target, ALIGN)
    assert target.amount(shapes) == pytest.approx(target.remaining, rel=0.02)


def test_a_plan_that_reads_profiles_nobody_knows_is_taken_to_narrow_all_layers_alike():
    target = Target(model(4), 0.3)
    shapes = ByGradient().even_shapes(target, ALIGN)
    widths = [shape.ffn.width for shape in shapes]
    assert max(widths) - min(widths) <= ALIGN
    assert target.amount(shapes) == pytest.approx(target.remaining, rel=0.01)


def test_a_plan_that_reads_no_profile_is_the_methods_own():
    target, method = Target(model(4), 0.3), make_method("llm-pruner", {"first_layers": 0.25})
    assert method.even_shapes(target, ALIGN) == method.plan(target, (), ALIGN)


def test_a_method_of_neurons_alone_keeps_those_that_matter_most_to_the_loss(subject):
    this = subject()
    profile = this.profile(ByGradient())
    pruned = this.prune(ByGradient(), this.layer.shape.with_ffn(width=9), profile)
    best = profile["neurons"].topk(9).indices.sort().values
    assert pruned.ffn.up.weight.tolist() == this.ffn.up.weight[best].tolist()
