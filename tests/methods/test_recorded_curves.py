"""What curvature's plan leaves in the record: what each layer costs, and the curves that it was chosen from."""

from __future__ import annotations

import pytest
import torch
from tiny_architectures import tiny

from distprune.budgets import Target, parameters_by_part
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape
from distprune.methods import make_method
from distprune.methods.curvature.recorded_curves import POINTS, recorded_curves

ATTENTION = AttentionShape(query_heads=4, kv_heads=2, query_key_dim=8, value_dim=4)
OF_ATTENTION = {
    "group_costs": torch.tensor([0.0, 1.0, 4.0]),  # of going without none, one and both
    "value_costs": torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.0], [6.0, 4.0, 2.0, 1.0, 0.0]]),  # of keeping 0, 1...
    "pair_costs": torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 1.0, 1.5, 2.0]]),
}


def points(curve) -> dict[int, float]:
    return dict(zip(curve.kept, curve.costs, strict=True))


def test_costs_are_told_by_how_much_stays():
    profile = OF_ATTENTION | {"ffn_widths": torch.tensor([8, 4, 0]), "ffn_costs": torch.tensor([0.0, 1.0, 7.0])}
    profile["query_costs"] = torch.tensor([9.0, 4.0, 1.0])
    curves = recorded_curves(LayerShape(ATTENTION, FeedForwardShape(8)), profile)
    assert points(curves["attention.kv_heads"]) == {0: 4, 1: 1, 2: 0}
    assert points(curves["attention.value_dim"]) == {0: 11, 1: 7, 2: 4, 3: 2, 4: 0}
    assert points(curves["attention.query_key_dim"]) == {0: 6, 2: 4.5, 4: 3, 6: 1.5, 8: 0}
    assert points(curves["attention.query_rank"]) == {0: 9, 1: 4, 2: 1}
    assert points(curves["ffn.width"]) == {0: 7, 4: 1, 8: 0}
    assert "attention.key_rank" not in curves


def test_of_a_mixture_the_experts_that_are_worth_least_go_first():
    costs = torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.5, 1.0], [0.0, 1.0, 2.0]])
    profile = {"expert_widths": torch.tensor([8, 4, 0]), "expert_costs": costs}
    curves = recorded_curves(LayerShape(None, ExpertsShape(3, 8)), profile)
    assert points(curves["ffn.count"]) == {3: 0, 2: 1, 1: 3, 0: 8}
    assert points(curves["ffn.width"]) == {8: 0, 4: 2.5, 0: 8}


def test_a_long_curve_keeps_few_points_and_both_ends():
    costs = torch.arange(1000, 0, -1.0)
    curve = recorded_curves(LayerShape(ATTENTION, None), OF_ATTENTION | {"key_costs": costs})["attention.key_rank"]
    assert len(curve.kept) == POINTS
    assert (curve.kept[0], curve.kept[-1], curve.costs[0], curve.costs[-1]) == (0, 999, 1000, 1)
    assert all(1000 - kept == pytest.approx(cost, rel=1e-3) for kept, cost in points(curve).items())


@pytest.mark.parametrize(("model_type", "layout"), [("llama", "free"), ("llama", "stock"), ("mixtral", "free")])
def test_layers_cost_together_what_the_plan_predicts(model_type, layout):
    method = make_method("curvature", {})
    target = Target(tiny(model_type), 0.3, layout=layout)
    plan = method.plan(target, [method.even_profile(shape) for shape in target.dense_shapes], 4)
    assert len(plan.by_layer) == 3
    assert sum(plan.by_layer) == pytest.approx(plan.predicted_loss)
    assert plan.predicted_loss > 0


def test_heapr_tells_what_each_layer_costs_too():
    method = make_method("heapr", {})
    target = Target(tiny("deepseek_v3"), 0.001)
    plan = method.plan(target, [method.even_profile(shape) for shape in target.dense_shapes], 1)
    assert plan.by_layer[:2] == [0, 0]  # no mixtures
    assert sum(plan.by_layer) == pytest.approx(plan.predicted_loss)


def test_parameters_of_a_mixture_by_part():
    model = tiny("qwen2_moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=40)
    shape = LayerShape(model.dense_shape(0).attention, ExpertsShape(3, 8, shared_width=20, per_token=2))
    parts = parameters_by_part(model, 0, shape)
    assert parts["experts"] == 3 * 3 * 8 * 24
    assert parts["shared expert"] == 3 * 20 * 24
    assert parts["router"] == 3 * 24 + 24  # and the shared expert's gate
    assert set(parts) == {"attention", "experts", "shared expert", "router", "rest"}
