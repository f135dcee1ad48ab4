"""Shapes that a plan expects: those of the method's own plan, with every layer and unit worth about as much."""

from __future__ import annotations

import pytest
from by_gradient import ByGradient

from distprune.budgets import RESOURCES, Target, is_stock
from distprune.methods import METHODS, make_method
from distprune.modeling import PrunedConfig
from distprune.planning.shapes import expected_shapes

LAYERS, ALIGN = 4, 8


def config(kv_heads: int) -> PrunedConfig:
    sizes = {"vocab_size": 50, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": LAYERS}
    return PrunedConfig(**sizes, num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=32)


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.6, 0.9])
def test_curvatures_global_plan_is_within_its_budget_whatever_the_target(kv_heads, resource, sparsity):
    target = Target(config(kv_heads), sparsity, resource=resource)
    shapes = expected_shapes(make_method("curvature", {}), target, ALIGN)
    left = target.remaining - target.amount(shapes)
    assert 0 <= left <= 0.04 * target.dense
    assert shapes[0].has_attention


@pytest.mark.parametrize("resource", ["parameters", "flops", "bytes"])
def test_curvatures_equal_plan_is_one_of_the_original_architecture(resource):
    target = Target(config(4), 0.3, resource=resource, stock=True)
    shapes = expected_shapes(make_method("curvature", {}), target, ALIGN)
    assert is_stock(target.config, shapes)
    assert target.amount(shapes) == pytest.approx(target.remaining, rel=0.02)


def test_at_moderate_targets_no_module_of_curvatures_goes_whole():
    shapes = expected_shapes(make_method("curvature", {}), Target(config(4), 0.3), ALIGN)
    assert all(shape.has_attention and shape.has_ffn for shape in shapes)
    assert max(shape.ffn_width for shape in shapes) < 1024


def test_a_plan_that_reads_profiles_nobody_knows_is_taken_to_narrow_all_layers_alike():
    method, target = ByGradient(), Target(config(4), 0.3)
    assert not method.dense_moments(config(4).dense_shape())
    shapes = expected_shapes(method, target, ALIGN)
    widths = [shape.ffn_width for shape in shapes]
    assert max(widths) - min(widths) <= ALIGN
    assert target.amount(shapes) == pytest.approx(target.remaining, rel=0.01)


def test_a_plan_that_reads_no_profile_is_the_methods_own():
    target, method = Target(config(4), 0.3), make_method("llm-pruner", {"first_layers": 0.25})
    assert expected_shapes(method, target, ALIGN) == method.plan(target, (), ALIGN)


def test_a_run_of_a_method_with_gradient_moments_alone_can_be_planned(plan, monkeypatch):
    monkeypatch.setitem(METHODS, "by-gradient", ByGradient)
    planned = plan(method="by-gradient", sparsity=0.3)
    assert "gradient pass" in [stage.name for stage in planned.stages]
    removed = 1 - planned.decoder_parameters_after / planned.decoder_parameters_before
    assert removed == pytest.approx(0.3, abs=0.02)
