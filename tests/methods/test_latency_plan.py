"""Curvature's plans for a latency: the best of all that its menus have, and made of what a machine is quick at."""

from __future__ import annotations

from itertools import product
from zlib import crc32

import numpy as np
import pytest
from latency_tables import PER_PARAMETER, by_parameters, made_up_table
from random_profiles import profile_of
from tiny_architectures import tiny

from distprune.budgets import Target, layer_parameters
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import LayerShape
from distprune.methods import make_method
from distprune.methods.curvature.menus import Reach, attention_menu, ffn_menu
from distprune.methods.curvature.stock import nearest_steps

SIZES = {"vocab_size": 50, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32}


def model_of(layers: int = 2) -> Architecture:
    return tiny(**SIZES, num_hidden_layers=layers, num_key_value_heads=4)


def planned(target: Target, profiles=None, align: int = 8):
    profiles = profiles or [profile_of(shape, index) for index, shape in enumerate(target.dense_shapes)]
    return make_method("curvature", {}).plan(target, profiles, align)


def noisy(model, index, shape):
    """A machine whose times have no order but that of their widths, and on which no two layers are alike."""
    rng = np.random.default_rng(crc32(repr(shape).encode()))
    return by_parameters(model, index, shape) * (1 + 0.2 * rng.random())


@pytest.mark.parametrize("seconds", [by_parameters, noisy])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_no_choice_of_the_menus_within_the_budget_costs_less(seconds, sparsity):
    model = model_of()
    target = Target(model, sparsity, resource="latency", latencies=made_up_table(model, seconds))
    # Without what would make the menus long.
    kept = ("group_order", "group_costs", "value_costs", "pair_costs", "ffn_widths", "ffn_costs")
    profiles = [
        {name: value for name, value in profile_of(shape, index).items() if name in kept}
        for index, shape in enumerate(target.dense_shapes)
    ]
    align, reach = 16, Reach(16, 0.2)
    plan = planned(target, profiles, align)
    assert target.amount(plan) <= target.remaining

    menus = [menu(target, index, profiles[index], reach) for index in range(2) for menu in (attention_menu, ffn_menu)]
    rest = target.amount([LayerShape(None, None) for shape in target.dense_shapes])
    costs, amounts = np.zeros(1), np.full(1, rest)
    for menu in menus:  # all choices of all menus except those that another one beats in both
        costs = np.add.outer(costs, menu.costs).ravel()
        amounts = np.add.outer(amounts, menu.amounts).ravel()
        order = np.lexsort((costs, amounts))
        costs, amounts = costs[order], amounts[order]
        first = np.append(True, costs[1:] < np.minimum.accumulate(costs)[:-1])
        costs, amounts = costs[first], amounts[first]
    least = costs[amounts <= target.remaining].min()
    assert plan.predicted_loss == pytest.approx(least, rel=2e-6)


def products_of(plan) -> int:
    """How many matrices stand in the plan for others, or beside them."""
    found = 0
    for attention, ffn in ((shape.attention, shape.ffn) for shape in plan):
        if attention:
            ranks = (attention.query_rank, attention.key_rank, attention.output_rank)
            found += sum(rank is not None for rank in ranks)
            found += (attention.value_dim < 32) + (attention.query_key_dim < 32)
        found += bool(ffn and ffn.branch_rank)
    return found


def test_what_a_machine_is_slow_at_is_not_in_the_plan():
    model = model_of(4)

    def slow_at_products(model, index, shape):
        return by_parameters(model, index, shape) + products_of([shape]) * 1e-3

    quick, slow = (
        planned(Target(model, 0.4, resource="latency", latencies=made_up_table(model, seconds)))
        for seconds in (by_parameters, slow_at_products)
    )
    assert products_of(quick) > 0
    assert products_of(slow) == 0


def test_a_plan_takes_attention_where_that_is_what_takes_time():
    model = model_of(4)

    def slow_attention(model, index, shape):
        heads = shape.attention.query_heads if shape.attention else 0
        return PER_PARAMETER * layer_parameters(model, index, shape) / 100 + heads * 1e-3

    plan = planned(Target(model, 0.4, resource="latency", latencies=made_up_table(model, slow_attention)))
    assert sum(shape.attention.query_heads if shape.attention else 0 for shape in plan) <= 0.6 * 4 * 8
    assert all(shape.ffn and shape.ffn.width == 256 for shape in plan)


def in_tiles(model, index, shape):
    """Widths take time in steps of 64, as tiles of a kernel do."""
    tiles = -(-shape.ffn.width // 64) if shape.ffn else 0
    heads = shape.attention.kv_heads if shape.attention else 0
    return np.array([1e-3, 1e-4]) * (tiles + heads + 1)


@pytest.mark.parametrize("layout", ["free", "heterogeneous", "stock"])
def test_widths_that_take_no_longer_are_kept(layout):
    """A width that the grid has just below a step may be had for what a narrower one takes."""
    model = model_of(4)
    target = Target(model, 0.3, resource="latency", layout=layout, latencies=made_up_table(model, in_tiles))
    plan = planned(target)
    left = target.remaining - target.amount(plan)
    step = target.ffn_amount(0, target.dense_shape(0).ffn) / 4
    assert (-2 * step <= left) if layout == "stock" else (left >= 0)
    for index, shape in enumerate(plan):
        if layout != "stock" and shape.ffn and shape.ffn.width < 256 and not shape.ffn.branch_rank:
            wider = target.ffn_amount(index, shape.with_ffn(width=shape.ffn.width + 8).ffn)
            assert wider - target.ffn_amount(index, shape.ffn) > left


def test_the_nearest_steps_are_those_of_a_search_through_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        amounts = np.cumsum(rng.integers(0, 4, size=9)) + 5
        amounts[0] = amounts[1] - rng.integers(0, 4)
        wanted = int(rng.integers(0, 40))
        found = nearest_steps(lambda steps, amounts=amounts: int(amounts[steps - 1]), 9, wanted)
        if wanted < amounts[0]:
            assert found == (1 if 2 * (amounts[0] - wanted) <= amounts[1] - amounts[0] else None)
        else:
            assert abs(amounts[found - 1] - wanted) == abs(amounts - wanted).min()


def test_a_stock_plan_is_the_cheapest_of_those_that_are_as_near_to_the_target():
    model = model_of(3)
    target = Target(model, 0.3, resource="latency", layout="stock", latencies=made_up_table(model))
    profiles = [profile_of(shape, index) for index, shape in enumerate(target.dense_shapes)]
    plan = planned(target, profiles)
    found = {}
    for groups, width in product((1, 2, 4), range(8, 257, 8)):
        shapes = [
            shape.with_attention(kv_heads=groups, query_heads=2 * groups).with_ffn(width=width)
            for shape in target.dense_shapes
        ]
        cost = sum(
            float(profile["group_costs"][4 - groups])
            + np.interp(width, profile["ffn_widths"].flip(0), profile["ffn_costs"].flip(0))
            for profile in profiles
        )
        # As near as half a step of all layers.
        distance = abs(target.amount(shapes) - target.remaining)
        half = 3 * (target.ffn_amount(0, shapes[0].ffn) - target.ffn_amount(0, shapes[0].with_ffn(width=8).ffn))
        half = half / max(1, width // 8 - 1) / 2
        if distance <= half + 2:
            found[groups, width] = cost
    assert (plan[0].attention.kv_heads, plan[0].ffn.width) == min(found, key=found.get)
