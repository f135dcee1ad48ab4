"""The choice for all parts of all layers that costs least within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distprune.budgets import Target, allocate, neurons_amount
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.methods.base import Plan, Profile
from distprune.methods.curvature.menus import (
    Menu,
    Reach,
    attention_menu,
    ffn_menu,
    head_shapes,
    may_lose_attention,
)
from distprune.methods.curvature.mixture_menus import mixture_menus, smallest_mixture


def allocate_globally(target: Target, profiles: Sequence[Profile], reach: Reach) -> Plan:
    """Of each menu the option with which the whole costs least.

    Raises:
        InputError: the target can't be reached.
    """
    shapes, menus = target.dense_shapes, []
    for index, (shape, profile) in enumerate(zip(shapes, profiles, strict=True)):
        if shape.attention:
            menus.append(attention_menu(target, index, profile, reach))
        if isinstance(shape.ffn, ExpertsShape):
            menus += mixture_menus(target, index, profile, reach)
        elif shape.ffn:
            menus.append(ffn_menu(target, index, profile, reach))
    rest = target.amount([LayerShape(None, None)] * len(shapes))
    allocation = allocate([menu.curve for menu in menus], target.remaining - rest)
    for menu, choice in zip(menus, allocation.choices, strict=True):
        shapes[menu.layer] = chosen(shapes[menu.layer], menu, choice)
    by_layer = costs_by_layer(menus, allocation.costs, len(shapes))
    return Plan(spend_rest(target, shapes, reach.align), allocation.cost, allocation.gap, by_layer)


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


def smallest(target: Target, reach: Reach) -> list[LayerShape]:
    """The smallest layers that the menus have, factored projections aside."""
    shapes = target.dense_shapes
    for index, dense in enumerate(target.dense_shapes):
        attention, ffn, removable = dense.attention, dense.ffn, target.removable(index)
        if attention:
            options = [None] if may_lose_attention(target, index, reach) else head_shapes(target, index, reach)
            attention = min(options, key=lambda shape: target.attention_amount(index, shape))
        if isinstance(ffn, ExpertsShape):
            ffn = smallest_mixture(target, index, reach)
        elif ffn and removable.neurons:
            ffn = replace(ffn, width=reach.widths(ffn.width)[0])
        shapes[index] = LayerShape(attention, ffn if isinstance(ffn, ExpertsShape) or not removable.ffn else None)
    return shapes
