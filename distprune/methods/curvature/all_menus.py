"""The menus of all parts of all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from distprune.budgets import Menu, Target
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.methods.base import Profile
from distprune.methods.curvature.menus import Reach, attention_menu, ffn_menu, head_shapes, may_lose_attention
from distprune.methods.curvature.mixture_menus import mixture_menus, smallest_mixture


def all_menus(target: Target, profiles: Sequence[Profile], reach: Reach) -> Iterator[Menu]:
    """The menus of every layer's parts; a network beside experts comes after them, with a menu of its own."""
    for index, (shape, profile) in enumerate(zip(target.dense_shapes, profiles, strict=True)):
        if shape.attention:
            yield attention_menu(target, index, profile, reach)
        if isinstance(shape.ffn, ExpertsShape):
            yield from mixture_menus(target, index, profile, reach)
        elif shape.ffn:
            yield ffn_menu(target, index, profile, reach)


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
