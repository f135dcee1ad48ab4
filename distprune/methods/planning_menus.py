"""The choice from all parts' menus that costs least within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distprune.budgets import Allocation, Menu, Target, allocate, neurons_amount
from distprune.layers.shapes import LayerShape
from distprune.methods.base import Plan


def plan_by_menus(target: Target, menus: Sequence[Menu], align: int) -> Plan:
    """Of each menu the option with which the whole costs least; what a layer has no menu for stays.

    Raises:
        InputError: the target can't be reached.
    """
    shapes, allocation = target.dense_shapes, allocate_menus(target, menus)
    for menu, choice in zip(menus, allocation.choices, strict=True):
        shapes[menu.layer] = chosen(shapes[menu.layer], menu, choice)
    by_layer = costs_by_layer(menus, allocation.costs, len(shapes))
    return Plan(spend_rest(target, shapes, align), allocation.cost, allocation.gap, by_layer)


def allocate_menus(target: Target, menus: Sequence[Menu]) -> Allocation:
    """Of each menu the option with which the whole costs least within the target.

    Raises:
        InputError: the smallest options of all menus take more.
    """
    rest = target.amount([LayerShape(None, None)] * target.model.num_layers)
    return allocate([menu.curve for menu in menus], target.remaining - rest)


def costs_by_layer(menus: Sequence[Menu], costs: Sequence[float], layers: int) -> list[float]:
    """What was chosen from the menus of each layer costs."""
    by_layer = [0.0] * layers
    for menu, cost in zip(menus, costs, strict=True):
        by_layer[menu.layer] += cost
    return by_layer


def chosen(shape: LayerShape, menu: Menu, choice: int) -> LayerShape:
    """The layer with a menu's choice for its part; what is shared beside experts has a menu after theirs."""
    if menu.part == "shared":
        return shape.with_ffn(shared_width=menu.shapes[choice].shared_width)
    return replace(shape, **{menu.part: menu.shapes[choice]})


def spend_rest(target: Target, shapes: Sequence[LayerShape], align: int) -> list[LayerShape]:
    """Widen FFNs by single steps of ``align`` with what the coarser steps of the menus have left of the budget.

    It is less than a step of any menu, so where it goes hardly matters: to the FFNs that have lost most.
    """
    shapes, left = list(shapes), target.remaining - target.amount(shapes)
    open_layers = [index for index, shape in enumerate(shapes) if shape.ffn and target.removable(index).neurons]
    for index in sorted(open_layers, key=lambda index: shapes[index].ffn.width):
        full = target.dense_shape(index).ffn.width
        while shapes[index].ffn.width < full:
            more = min(align, full - shapes[index].ffn.width)
            step = neurons_amount(target, index, shapes[index], more)
            if step > left:
                break
            shapes[index], left = shapes[index].with_ffn(width=shapes[index].ffn.width + more), left - step
    return shapes
