"""Prices: what measurements say beyond predictions, and nothing of what all have in common."""

from __future__ import annotations

import pytest
from tiny_architectures import tiny

from distprune.budgets import Menu, Target
from distprune.methods.curvature import Curvature
from distprune.search import (
    Change,
    PartOptions,
    affordable_choices,
    changed_choices,
    corrected_prices,
    library_options,
    part_of_the_way,
    shapes_of,
)

PARTS = [PartOptions(index, "ffn", (1, 2, 3), (0.0, 1.0, 3.0)) for index in range(5)]
CHOICES = [1] * 5


def measured(factors, common=1.0):
    """What changes cost if each part costs a multiple of what is predicted."""
    return {
        change: common * factors[change.part] * (PARTS[0].costs[change.choice] - PARTS[0].costs[1])
        for change in changed_choices(PARTS, CHOICES)
    }


def test_every_part_is_changed_to_its_neighbouring_sizes():
    parts = PARTS[:2]
    assert changed_choices(parts, [0, 1]) == [Change(0, 1), Change(1, 0), Change(1, 2)]
    assert Change(1, 2).of([0, 1]) == [0, 2]


@pytest.mark.parametrize("common", [1.0, 3.0])
def test_predictions_that_are_right_but_for_a_common_factor_leave_prices(common):
    assert corrected_prices(PARTS, CHOICES, [1.0] * 5, measured([1] * 5, common)) == pytest.approx([1.0] * 5)


def test_a_part_that_costs_more_than_its_like_becomes_dearer():
    prices = corrected_prices(PARTS, CHOICES, [1.0] * 5, measured([1, 1, 1, 2, 0.5]))
    # Predicted changes are 1 and 2, so one is trusted as a change of 1.5 that was measured to be as predicted.
    assert prices == pytest.approx([1, 1, 1, (6 + 1.5) / 4.5, (1.5 + 1.5) / 4.5])


def test_a_step_changes_a_price_by_a_factor_of_three_at_most():
    prices = corrected_prices(PARTS, CHOICES, [1.0, 1, 1, 2, 2], measured([1, 1, 1, 1000, -1000]))
    assert prices[3:] == pytest.approx([6, 2 / 3])


def test_measurements_that_tell_nothing_leave_prices():
    flat = [PartOptions(0, "ffn", (1, 2), (0.0, 0.0))]
    assert corrected_prices(flat, [0], [1.5], {Change(0, 1): 0.2}) == [1.5]
    assert corrected_prices(PARTS, CHOICES, [1.0] * 5, measured([-1] * 5)) == [1.0] * 5


def test_part_of_the_way_is_so_on_a_logarithmic_scale():
    assert part_of_the_way([1.0, 2.0], [4.0, 2.0], 0.5) == pytest.approx([2.0, 2.0])


def profiles_of(model):
    method = Curvature()
    return method, [method.even_profile(model.dense_shape(index)) for index in range(model.num_layers)]


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
def test_a_library_has_the_dense_part_first_and_few_smaller_ones(family):
    model = tiny(family)
    target = Target(model, 0.3)
    method, profiles = profiles_of(model)
    parts = library_options(target, method.menus(target, profiles, 8))
    assert len({(part.layer, part.part) for part in parts}) == len(parts)
    for part in parts:
        amounts = part.menu(target).amounts
        assert part.shapes[0] == getattr(target.dense_shape(part.layer), part.part)
        assert list(amounts) == sorted(amounts, reverse=True)
        assert list(part.costs) == sorted(part.costs)
        assert len(part.shapes) <= 9
        assert PartOptions.from_json(part.to_json()).menu(target) == part.menu(target)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_choices_meet_the_target(sparsity):
    model = tiny()
    target = Target(model, sparsity)
    method, profiles = profiles_of(model)
    parts = library_options(target, method.menus(Target(model, 0.3), profiles, 8))
    choices = affordable_choices(target, parts, [1.0] * len(parts))
    shapes = shapes_of(target, parts, choices)
    assert target.amount(shapes) <= target.remaining
    assert (shapes == target.dense_shapes) == (sparsity == 0)


def test_dear_parts_keep_more():
    model = tiny()
    target = Target(model, 0.4)
    method, profiles = profiles_of(model)
    parts = library_options(target, method.menus(target, profiles, 8))
    dear = [10.0 if part.layer == 1 else 1.0 for part in parts]
    amounts = [
        target.layer_amount(1, shapes_of(target, parts, affordable_choices(target, parts, prices))[1])
        for prices in ([1.0] * len(parts), dear)
    ]
    assert amounts[0] < amounts[1]


def test_a_menu_at_a_price_costs_as_many_times_as_much():
    menu = Menu(0, "ffn", [None], [2.0], [3])
    assert menu.at_price(1.5) == Menu(0, "ffn", [None], [3.0], [3])
