"""The choice that the original architecture allows: the same widths in every layer.

Where a model has mixtures of experts, these are made alike, and the feed-forward networks of its other layers, few and
the first, are left whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from distprune.budgets import Target, has_plain_heads
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.methods.base import Plan, Profile
from distprune.methods.curvature.menus import Reach, costs_by_width
from distprune.methods.curvature.mixture_menus import counts, mixture_costs
from distprune.methods.even_layers import with_heads


@dataclass(frozen=True)
class Alike:
    """A choice for all layers.

    Attributes:
        shapes: of the layers.
        groups_gone: KV groups that every attention loses.
        width: neurons of every FFN, or of every expert.
        experts: of every mixture; None where there are none.
        unspent: steps of FFN width that the target would leave to FFNs which are whole already.
    """

    shapes: list[LayerShape]
    groups_gone: int
    width: int
    unspent: int
    experts: int | None = None


def allocate_equally(target: Target, profiles: Sequence[Profile], reach: Reach) -> Plan:
    """As many KV groups and as wide an FFN in every layer: of all such pairs that meet the target, the cheapest."""
    choices, is_mixture = choices_alike(target, reach), bool(mixture_layers(target.dense_shapes))
    layers = [
        cost_of_choice(shape, profile, is_mixture) for shape, profile in zip(target.dense_shapes, profiles, strict=True)
    ]

    def cost(choice: Alike) -> float:
        return sum(cost_of(choice) for cost_of in layers)

    nearest = min(choice.unspent for choice in choices)
    best = min((choice for choice in choices if choice.unspent == nearest), key=cost)
    return Plan(best.shapes, cost(best), gap=0.0, by_layer=[cost_of(best) for cost_of in layers])


def cost_of_choice(shape: LayerShape, profile: Profile, is_mixture: bool) -> Callable[[Alike], float]:
    """What a choice costs in one layer, of a model that has mixtures or has none."""
    groups = profile.get("group_costs")
    experts = mixture_costs(profile, shape.ffn) if isinstance(shape.ffn, ExpertsShape) else None
    ffn = costs_by_width(profile) if "ffn_costs" in profile and not is_mixture else None

    def cost(choice: Alike) -> float:
        of_attention = 0.0 if groups is None else float(groups[choice.groups_gone])
        of_experts = experts(choice.experts, choice.width) if experts else 0.0
        return of_attention + of_experts + (ffn(choice.width) if ffn else 0.0)

    return cost


def choices_alike(target: Target, reach: Reach) -> list[Alike]:
    """What all layers may become to meet the target, from the fewest groups on."""
    found = (
        widest(target, shapes, gone, reach, experts)
        for fewer_groups, gone in with_groups_alike(target)
        for shapes, experts in with_experts_alike(target, fewer_groups, reach)
    )
    return [choice for choice in found if choice]


def with_experts_alike(
    target: Target, shapes: Sequence[LayerShape], reach: Reach
) -> Iterator[tuple[list[LayerShape], int | None]]:
    """The layers with fewer and fewer experts in every mixture, and how many; as they are where there is none."""
    layers = mixture_layers(shapes)
    if not layers:
        yield [*shapes], None
        return
    for count in counts(target, layers[0], reach):
        yield [shape.with_ffn(count=count) if i in layers else shape for i, shape in enumerate(shapes)], count


def mixture_layers(shapes: Sequence[LayerShape]) -> list[int]:
    return [index for index, shape in enumerate(shapes) if isinstance(shape.ffn, ExpertsShape)]


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


def widest(
    target: Target, shapes: Sequence[LayerShape], gone: int, reach: Reach, experts: int | None = None
) -> Alike | None:
    """The layers with FFNs of the width nearest to what the target leaves beside their attention, if there is one."""
    layers = mixture_layers(shapes) or [index for index, shape in enumerate(shapes) if shape.ffn]
    full = shapes[layers[0]].ffn.width if layers else 0

    def with_width(width: int) -> list[LayerShape]:
        return [shape.with_ffn(width=width) if i in layers else shape for i, shape in enumerate(shapes)]

    def amount_of(steps: int) -> int:
        return target.amount(with_width(min(full, steps * reach.align)))

    whole = ceil(full / reach.align)
    if amount_of(1) == amount_of(whole) or not all(target.removable(index).neurons for index in layers):
        unspent = target.remaining - target.amount(shapes)
        return Alike([*shapes], gone, full, unspent, experts) if unspent >= 0 else None
    steps = nearest_steps(amount_of, whole, target.remaining)
    if steps is None:
        return None
    unspent = (target.remaining - amount_of(whole)) / (amount_of(whole) - amount_of(1)) * (whole - 1)
    width = min(full, steps * reach.align)
    return Alike(with_width(width), gone, width, max(0, round(unspent)), experts)


def nearest_steps(amount_of: Callable[[int], int], most: int, wanted: int) -> int | None:
    """The number of steps, from 1 to ``most``, that take nearest to what is wanted; None where one takes too much by
    more than half of the next.

    Args:
        amount_of: what so many steps take; no more steps take less.
    """
    below = bisect_right(range(1, most + 1), wanted, key=amount_of)
    if below == most:
        return most
    if below == 0:
        return 1 if 2 * (amount_of(1) - wanted) <= amount_of(2) - amount_of(1) else None
    return min(below, below + 1, key=lambda steps: abs(amount_of(steps) - wanted))
