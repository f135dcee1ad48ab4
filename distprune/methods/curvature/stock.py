"""The choice that the original architecture allows: the same widths in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from distprune.budgets import Target, has_plain_heads
from distprune.decoder_layer import LayerShape
from distprune.methods.base import Plan, Profile
from distprune.methods.curvature.menus import Reach, ffn_costs_by_width


def allocate_equally(target: Target, profiles: Sequence[Profile], reach: Reach) -> Plan:
    """As many KV groups and as wide an FFN in every layer: of all such pairs that meet the target, the cheapest."""
    costs_of = [ffn_costs_by_width(profile) for profile in profiles]

    def cost(shape: LayerShape) -> float:
        gone = target.config.num_key_value_heads - shape.kv_heads
        groups = sum(float(profile["group_costs"][gone]) for profile in profiles)
        return groups + sum(cost_of(shape.ffn_width) for cost_of in costs_of)

    nearest = min(unspent for _, unspent in equal_shapes(target, reach))
    shapes = [shape for shape, unspent in equal_shapes(target, reach) if unspent == nearest]
    best = min(shapes, key=cost)
    return Plan([best] * len(profiles), cost(best), gap=0.0)


def equal_shapes(target: Target, reach: Reach) -> list[tuple[LayerShape, int]]:
    """The shapes that all layers may have to meet the target, and how many steps of FFN width each leaves unused."""
    dense, found = target.dense_shapes[0], []
    for groups in range(1, dense.kv_heads + 1):
        shape = replace(dense, kv_heads=groups, query_heads=groups * (dense.query_heads // dense.kv_heads))
        if has_plain_heads(target.config, shape) and (fitting := widest(target, shape, reach)):
            found.append((replace(shape, ffn_width=fitting[0]), fitting[1]))
    return found


def widest(target: Target, shape: LayerShape, reach: Reach) -> tuple[int, int] | None:
    """The FFN width nearest to what the target leaves beside the attention of ``shape``, if there is one; and how many
    steps of width would be left of that by an FFN that is whole."""
    layers, full = target.config.num_hidden_layers, target.config.intermediate_size
    one, two = (target.amount([replace(shape, ffn_width=width)] * layers) for width in (reach.align, 2 * reach.align))
    if one == two:
        return (full, target.remaining - one) if one <= target.remaining else None
    steps, whole = 1 + round((target.remaining - one) / (two - one)), ceil(full / reach.align)
    return (min(full, steps * reach.align), max(0, steps - whole)) if steps >= 1 else None
