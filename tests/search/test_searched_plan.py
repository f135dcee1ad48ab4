"""The plan that a search ends with: finer than what it measured, and of the same kind."""

from __future__ import annotations

import pytest
from tiny_architectures import tiny

from distprune.budgets import Menu, Target
from distprune.layers.shapes import AttentionShape, FeedForwardShape
from distprune.methods.curvature import Curvature
from distprune.search import PartOptions, affordable_choices, library_options, searched_plan
from distprune.search.part_options import amount_of
from distprune.search.searched_plan import around, lies_between

WHOLE = AttentionShape(4, 2, 16, 16)
FACTORED = AttentionShape(4, 2, 16, 12, query_rank=24)
FEWER_HEADS = AttentionShape(2, 1, 16, 16)


@pytest.mark.parametrize(
    ("shape", "one", "other", "lies"),
    [
        (AttentionShape(4, 2, 16, 14), WHOLE, FACTORED, True),
        (AttentionShape(4, 2, 16, 14, query_rank=32), WHOLE, FACTORED, True),
        (AttentionShape(4, 2, 16, 14, query_rank=16), WHOLE, FACTORED, False),
        (AttentionShape(4, 2, 16, 14, key_rank=24), FACTORED, AttentionShape(4, 2, 16, 8, query_rank=16), False),
        (FEWER_HEADS, WHOLE, FACTORED, False),
        (WHOLE, FEWER_HEADS, None, False),
        (None, FACTORED, FEWER_HEADS, False),
        (FeedForwardShape(20, branch_rank=8), FeedForwardShape(24), FeedForwardShape(16, branch_rank=8), True),
        (FeedForwardShape(20, branch_rank=16), FeedForwardShape(24), FeedForwardShape(16, branch_rank=8), False),
    ],
)
def test_a_shape_lies_between_two_that_no_dimension_of_it_is_outside(shape, one, other, lies):
    assert lies_between(shape, one, other) == lies_between(shape, other, one) == lies


def test_an_option_of_another_kind_is_not_taken_however_cheap():
    factored = [AttentionShape(4, 2, 16, 16, query_rank=rank) for rank in (48, 40, 32, 24, 16)]
    menu = Menu(0, "attention", [WHOLE, *factored, FEWER_HEADS], [0, 1, 2, 3, 4, 5, 0.1], [10, 9, 8, 7, 6, 5, 4])
    part = PartOptions(0, "attention", [WHOLE, factored[1], factored[3], factored[4]], [0, 2, 4, 5])
    assert around(menu, part, 2).shapes == factored[1:]
    assert around(menu, part, 3).shapes == factored[3:]
    assert around(menu, part, 0).shapes == [WHOLE, *factored[:2]]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("sparsity", [0.2, 0.4])
def test_each_part_stays_between_the_sizes_beside_the_one_that_was_measured(family, sparsity):
    model = tiny(family)
    target, method = Target(model, sparsity), Curvature()
    menus = method.menus(target, [method.even_profile(shape) for shape in model.dense_shapes], 8)
    parts = library_options(target, menus)
    prices = [1e-3 if number % 2 else 1.0 for number in range(len(parts))]
    plan = searched_plan(target, menus, parts, prices, 8)
    assert target.amount(plan) <= target.remaining
    for part, choice in zip(parts, affordable_choices(target, parts, prices), strict=True):
        if part.part == "attention":  # what is left of the budget widens networks
            found = amount_of(target, part.layer, part.part, plan[part.layer].attention)
            amounts = part.menu(target).amounts
            assert amounts[min(choice + 1, len(amounts) - 1)] <= found <= amounts[max(choice - 1, 0)]
