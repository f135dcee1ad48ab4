"""The choices that cost least at some prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import inf
from typing import Any

from distprune.budgets import Menu, PartShape, Target
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape
from distprune.methods import Plan, allocate_menus, costs_by_layer, plan_by_menus
from distprune.search.part_options import PartOptions, joined


def affordable_choices(target: Target, parts: Sequence[PartOptions], prices: Sequence[float]) -> list[int]:
    """Of every part the option with which the whole costs least within the target.

    Raises:
        InputError: the smallest options of all parts take more.
    """
    return allocate_menus(target, menus_at(target, parts, prices)).choices


def plan_of_parts(target: Target, parts: Sequence[PartOptions], prices: Sequence[float]) -> tuple[list[int], Plan]:
    """The choices of :func:`affordable_choices`, and the plan that they are.

    Raises:
        InputError: the smallest options of all parts take more.
    """
    menus = menus_at(target, parts, prices)
    allocation = allocate_menus(target, menus)
    by_layer = costs_by_layer(menus, allocation.costs, target.model.num_layers)
    shapes = shapes_of(target, parts, allocation.choices)
    return allocation.choices, Plan(shapes, allocation.cost, allocation.gap, by_layer)


def searched_plan(
    target: Target, menus: Sequence[Menu], parts: Sequence[PartOptions], prices: Sequence[float], align: int
) -> Plan:
    """The plan that a search ends with: the measured one, in finer steps.

    A price holds where it was measured. Of a part with a low one, an option of another kind (fewer heads in place of
    lower ranks) would look cheap and could ruin the model. So each part stays between the sizes beside the measured
    one.

    Args:
        menus: of all parts, with all of their sizes.
        parts: the same parts with the sizes that the library holds.
        prices: of the parts.
        align: FFNs are widened by steps of it with what is left of the budget.
    """
    choices = affordable_choices(target, parts, prices)
    finer = map(around, joined(menus), parts, choices)
    return plan_by_menus(target, [menu.at_price(price) for menu, price in zip(finer, prices, strict=True)], align)


def around(menu: Menu, part: PartOptions, choice: int) -> Menu:
    """The options of a menu that lie between a part's choice and its next smaller or its next larger one."""
    chosen, beside = part.shapes[choice], [*part.shapes[max(0, choice - 1) : choice], *part.shapes[choice + 1 :][:1]]
    places = [
        place
        for place, shape in enumerate(menu.shapes)
        if shape == chosen or any(lies_between(shape, chosen, other) for other in beside)
    ]
    return menu.only(places)


def lies_between(shape: PartShape, one: PartShape, other: PartShape) -> bool:
    """Whether no dimension of a shape is outside those of two others; a part that has gone lies between none."""
    if shape is None or one is None or other is None:
        return False
    dimensions = zip(dimensions_of(shape), dimensions_of(one), dimensions_of(other), strict=True)
    return all(min(first, second) <= own <= max(first, second) for own, first, second in dimensions)


def dimensions_of(shape: AttentionShape | FeedForwardShape | ExpertsShape) -> list[float]:
    """A shape's numbers: a projection without factors has more than any rank, and a branch that is not there none."""
    return [
        value if value is not None else 0 if name == "branch_rank" else inf for name, value in asdict(shape).items()
    ]


def menus_at(target: Target, parts: Sequence[PartOptions], prices: Sequence[float]) -> list[Menu]:
    return [part.menu(target, price) for part, price in zip(parts, prices, strict=True)]


def shapes_of(target: Target, parts: Sequence[PartOptions], choices: Sequence[int]) -> list[LayerShape]:
    """The shapes of all layers with these options of their parts."""
    shapes = target.dense_shapes
    for part, choice in zip(parts, choices, strict=True):
        change: dict[str, Any] = {part.part: part.shapes[choice]}
        shapes[part.layer] = replace(shapes[part.layer], **change)
    return shapes
