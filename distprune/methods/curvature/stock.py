"""The choice that the original architecture allows: the same widths in every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from distprune.budgets import Target, has_plain_heads
from distprune.layers.shapes import LayerShape
from distprune.methods.base import Plan, Profile
from distprune.methods.curvature.menus import Reach, ffn_costs_by_width
from distprune.methods.even_layers import with_heads


@dataclass(frozen=True)
class Alike:
    """A choice for all layers.

    Attributes:
        shapes: of the layers.
        groups_gone: KV groups that every attention loses.
        width: neurons of every FFN.
        unspent: steps of FFN width that the target would leave to FFNs which are whole already.
    """

    shapes: list[LayerShape]
    groups_gone: int
    width: int
    unspent: int


def allocate_equally(target: Target, profiles: Sequence[Profile], reach: Reach) -> Plan:
    """As many KV groups and as wide an FFN in every layer: of all such pairs that meet the target, the cheapest."""
    attentions = [profile for profile in profiles if "group_costs" in profile]
    ffns = [ffn_costs_by_width(profile) for profile in profiles if "ffn_costs" in profile]

    def cost(choice: Alike) -> float:
        groups = sum(float(profile["group_costs"][choice.groups_gone]) for profile in attentions)
        return groups + sum(cost_of(choice.width) for cost_of in ffns)

    choices = choices_alike(target, reach)
    nearest = min(choice.unspent for choice in choices)
    best = min((choice for choice in choices if choice.unspent == nearest), key=cost)
    return Plan(best.shapes, cost(best), gap=0.0)


def choices_alike(target: Target, reach: Reach) -> list[Alike]:
    """What all layers may become to meet the target, from the fewest groups on."""
    found = (widest(target, shapes, gone, reach) for shapes, gone in with_groups_alike(target))
    return [choice for choice in found if choice]


def with_groups_alike(target: Target) -> Iterator[tuple[list[LayerShape], int]]:
    """The layers with fewer and fewer groups gone, in so far as a plain configuration can say it; and how many are."""
    dense = target.dense_shapes
    layers = [index for index, shape in enumerate(dense) if shape.attention]
    if not (layers and all(target.removable(index).heads for index in layers)):
        yield dense, 0
        return
    attention = dense[layers[0]].attention
    for groups in range(1, attention.kv_heads + 1):
        shape = with_heads(dense[layers[0]], groups, attention.heads_per_group)
        if has_plain_heads(target.model, shape):
            shapes = [with_heads(s, groups, attention.heads_per_group) if s.attention else s for s in dense]
            yield shapes, attention.kv_heads - groups


def widest(target: Target, shapes: Sequence[LayerShape], gone: int, reach: Reach) -> Alike | None:
    """The layers with FFNs of the width nearest to what the target leaves beside their attention, if there is one."""
    layers = [index for index, shape in enumerate(shapes) if shape.ffn]
    full = shapes[layers[0]].ffn.width if layers else 0

    def with_width(width: int) -> list[LayerShape]:
        return [shape.with_ffn(width=width) if shape.ffn else shape for shape in shapes]

    one, two = (target.amount(with_width(width)) for width in (reach.align, 2 * reach.align))
    if one == two or not all(target.removable(index).neurons for index in layers):
        unspent = target.remaining - target.amount(shapes)
        return Alike([*shapes], gone, full, unspent) if unspent >= 0 else None
    steps, whole = 1 + round((target.remaining - one) / (two - one)), ceil(full / reach.align)
    if steps < 1:
        return None
    width = min(full, steps * reach.align)
    return Alike(with_width(width), gone, width, max(0, steps - whole))
