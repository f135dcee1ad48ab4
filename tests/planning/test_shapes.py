"""Shapes that a plan expects: those of the method's own plan, with every layer and unit worth about as much."""

from __future__ import annotations

import pytest

from distprune.budgets import RESOURCES, Target, is_stock
from distprune.methods import make_method
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
