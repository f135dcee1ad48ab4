"""The choices that cost least at some prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distprune.budgets import Menu, Target
from distprune.layers.shapes import LayerShape
from distprune.methods import Plan, allocate_menus, costs_by_layer, spend_rest
from distprune.search.part_options import PartOptions


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


def searched_plan(target: Target, parts: Sequence[PartOptions], prices: Sequence[float], align: int) -> Plan:
    """The plan that a search ends with: its sizes are those that were measured, and not others at the same prices.

    A price holds where it was measured. Of a part with a low one, an option of another kind (fewer heads in place of
    lower ranks) can look cheap and ruin the model. What the parts' coarse sizes leave of the budget widens FFNs.
    """
    _, plan = plan_of_parts(target, parts, prices)
    return spend_rest(target, plan, align)


def menus_at(target: Target, parts: Sequence[PartOptions], prices: Sequence[float]) -> list[Menu]:
    return [part.menu(target, price) for part, price in zip(parts, prices, strict=True)]


def shapes_of(target: Target, parts: Sequence[PartOptions], choices: Sequence[int]) -> list[LayerShape]:
    """The shapes of all layers with these options of their parts."""
    shapes = target.dense_shapes
    for part, choice in zip(parts, choices, strict=True):
        change: dict[str, Any] = {part.part: part.shapes[choice]}
        shapes[part.layer] = replace(shapes[part.layer], **change)
    return shapes
