"""What every module may become, and the choice for all of them that costs least within the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, lcm

import numpy as np
from numpy.typing import NDArray

from distprune.budgets import (
    Allocation,
    Curve,
    Target,
    aligned,
    allocate,
    attention_amount,
    ffn_amount,
    has_plain_heads,
)
from distprune.decoder_layer import LayerShape
from distprune.errors import InputError
from distprune.methods.base import Profile

#: Widths and heads of a layer without the module.
NO_ATTENTION = {"query_heads": 0, "kv_heads": 0, "query_key_dim": 0, "value_dim": 0, "output_bias": False}
NO_FFN = {"ffn_width": 0, "down_bias": False}
Change = Mapping[str, int | bool | None]

#: Widths of an FFN on its menu, where single steps of the alignment are spent at the end; and prices of ranks.
MOST_WIDTHS = 64


@dataclass(frozen=True)
class Menu:
    """What one module of a layer may become, and what that costs."""

    layer: int
    changes: list[Change]
    costs: list[float]
    amounts: list[int]

    @property
    def curve(self) -> Curve:
        return Curve(self.costs, self.amounts)


@dataclass(frozen=True)
class Reach:
    """How far modules may be cut: widths are multiples of ``align``, and a module keeps at least the share ``least`` of
    every width, or goes whole."""

    align: int
    least: float

    def widths(self, dense: int) -> list[int]:
        """The widths that one of ``dense`` may be cut to, ascending, itself the last."""
        first = aligned(self.least * dense, self.align, most=dense)
        return [*range(first, dense, self.align), dense]


def allocate_globally(target: Target, profiles: Sequence[Profile], reach: Reach) -> tuple[list[LayerShape], Allocation]:
    """The shape of every layer, and what the allocation says of itself.

    Raises:
        InputError: the target can't be reached.
    """
    shapes = target.dense_shapes
    menus = []
    for index, (shape, profile) in enumerate(zip(shapes, profiles, strict=True)):
        menus += [attention_menu(target, index, shape, profile, reach), ffn_menu(target, index, shape, profile, reach)]
    allocation = allocate([menu.curve for menu in menus], target.remaining)
    for menu, choice in zip(menus, allocation.choices, strict=True):
        shapes[menu.layer] = replace(shapes[menu.layer], **menu.changes[choice])
    return spend_rest(target, shapes, reach.align), allocation


def attention_menu(target: Target, index: int, dense: LayerShape, profile: Profile, reach: Reach) -> Menu:
    """Fewer KV groups, value neurons and rotary pairs; or all heads, fewer value neurons and factored projections; or,
    but in the first layer, none of it."""
    options = [*narrower_heads(target, dense, profile, reach)]
    if "query_costs" in profile:
        options += factored(target, index, dense, profile, reach)
    if index > 0:  # one layer at least must keep its attention
        options.append((NO_ATTENTION, float(profile["group_costs"][-1])))
    changes, costs = map(list, zip(*options, strict=True))
    amounts = [attention_amount(target.resource, target.config, index, replace(dense, **change)) for change in changes]
    return Menu(index, changes, costs, amounts)


def narrower_heads(target: Target, dense: LayerShape, profile: Profile, reach: Reach) -> Iterator[tuple[Change, float]]:
    heads, order = dense.query_heads // dense.kv_heads, profile["group_order"]
    value_costs, pair_costs = profile["value_costs"][order].numpy(), profile["pair_costs"][order].numpy()
    pairs = [dense.query_key_dim]
    if not target.config.query_key_norm:
        # Pairs go in twos of coordinates.
        pairs = replace(reach, align=lcm(2, reach.align)).widths(dense.query_key_dim)
    for gone in range(min(dense.kv_heads - 1, round((1 - reach.least) * dense.kv_heads)) + 1):
        without, groups = float(profile["group_costs"][gone]), dense.kv_heads - gone
        for value_dim in reach.widths(dense.value_dim):
            for width in pairs:
                lost = value_costs[gone:, value_dim].sum() + pair_costs[gone:, (dense.query_key_dim - width) // 2].sum()
                change = {"kv_heads": groups, "query_heads": groups * heads}
                yield change | {"value_dim": value_dim, "query_key_dim": width}, without + float(lost)


def factored(
    target: Target, index: int, dense: LayerShape, profile: Profile, reach: Reach
) -> Iterator[tuple[Change, float]]:
    """For every number of value neurons and at every of many prices, the ranks that cost least."""

    def ranks(name: str, shape: LayerShape) -> tuple[list[int | None], NDArray, NDArray]:
        """The ranks to choose from, None for no factors, what they cost, and what they save."""
        costs = profile[f"{name}_costs"].numpy()
        choices = [None, *range(reach.align, len(costs), reach.align)]
        changed = [replace(shape, **{f"{name}_rank": rank}) for rank in choices]
        amounts = np.array([attention_amount(target.resource, target.config, index, each) for each in changed])
        return choices, np.array([0.0, *costs[reach.align :: reach.align]]), amounts[0] - amounts

    fixed = {f"{name}_rank": ranks(name, dense) for name in ("query", "key")}
    for value_dim in reach.widths(dense.value_dim):
        shape = replace(dense, value_dim=value_dim)
        lost = float(profile["value_costs"][:, value_dim].sum())
        tables = fixed | {"output_rank": ranks("output", shape)}
        seen = set()
        for price in prices(tables.values()):
            places = {name: int((costs - price * savings).argmin()) for name, (_, costs, savings) in tables.items()}
            if (found := tuple(places.values())) not in seen:
                seen.add(found)
                change = {name: tables[name][0][place] for name, place in places.items()}
                cost = sum(float(tables[name][1][place]) for name, place in places.items())
                yield {"value_dim": value_dim} | change, lost + cost


def prices(tables: Iterable[tuple[list[int | None], NDArray, NDArray]]) -> NDArray:
    """Costs of a unit of the resource, from less than that of any first step to more than that of any last."""
    slopes = [costs[savings > 0] / savings[savings > 0] for _, costs, savings in tables]
    slopes = np.concatenate(slopes)
    slopes = slopes[slopes > 0]
    return np.geomspace(slopes.min() / 2, 100 * slopes.max(), MOST_WIDTHS) if len(slopes) else np.zeros(0)


def ffn_menu(target: Target, index: int, dense: LayerShape, profile: Profile, reach: Reach) -> Menu:
    """A few of the widths, and none at all."""
    cost_of, every = ffn_costs_by_width(profile), ceil(dense.ffn_width / reach.align / MOST_WIDTHS)
    widths = reach.widths(dense.ffn_width)[::-every]
    changes = [NO_FFN, *({"ffn_width": width} for width in widths)]
    amounts = [ffn_amount(target.resource, target.config, index, replace(dense, **change)) for change in changes]
    return Menu(index, changes, [cost_of(0), *map(cost_of, widths)], amounts)


def spend_rest(target: Target, shapes: Sequence[LayerShape], align: int) -> list[LayerShape]:
    """Widen FFNs by single steps of ``align`` with what the coarser steps of the menus have left of the budget.

    It is less than a step of any menu, so where it goes hardly matters: to the FFNs that have lost most.
    """
    shapes, full = list(shapes), target.config.intermediate_size
    left = target.remaining - target.amount(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: shapes[index].ffn_width):
        while 0 < shapes[index].ffn_width < full:
            wider = replace(shapes[index], ffn_width=min(full, shapes[index].ffn_width + align))
            step = sum(
                sign * ffn_amount(target.resource, target.config, index, shape)
                for sign, shape in ((1, wider), (-1, shapes[index]))
            )
            if step > left or step == 0:
                break
            shapes[index], left = wider, left - step
    return shapes


def allocate_equally(target: Target, profiles: Sequence[Profile], reach: Reach) -> list[LayerShape]:
    """As many KV groups and as wide an FFN in every layer: of all such pairs that meet the target, the cheapest."""
    costs_of = [ffn_costs_by_width(profile) for profile in profiles]

    def cost(shape: LayerShape) -> float:
        gone = target.config.num_key_value_heads - shape.kv_heads
        groups = sum(float(profile["group_costs"][gone]) for profile in profiles)
        return groups + sum(cost_of(shape.ffn_width) for cost_of in costs_of)

    nearest = min(unspent for _, unspent in equal_shapes(target, reach))
    shapes = [shape for shape, unspent in equal_shapes(target, reach) if unspent == nearest]
    return [min(shapes, key=cost)] * len(profiles)


def equal_shapes(target: Target, reach: Reach) -> list[tuple[LayerShape, int]]:
    """The shapes that all layers may have to meet the target, and how many steps of FFN width each leaves unused."""
    dense, found = target.dense_shapes[0], []
    for groups in range(1, dense.kv_heads + 1):
        shape = replace(dense, kv_heads=groups, query_heads=groups * (dense.query_heads // dense.kv_heads))
        if has_plain_heads(target.config, shape) and (fitting := widest(target, shape, reach)):
            found.append((replace(shape, ffn_width=fitting[0]), fitting[1]))
    return found


def check_reachable(target: Target, reach: Reach) -> None:
    """See that the smallest options of all menus meet the target.

    Raises:
        InputError: they don't.
    """
    if target.stock:
        reachable = bool(equal_shapes(target, reach))
    else:
        first, *others = target.dense_shapes
        width = first.query_key_dim if target.config.query_key_norm else reach.widths(first.query_key_dim)[0]
        narrow = {"kv_heads": 1, "query_heads": first.query_heads // first.kv_heads, "query_key_dim": width}
        least = replace(first, **narrow, value_dim=reach.widths(first.value_dim)[0], **NO_FFN)
        absent = [replace(shape, **NO_ATTENTION, **NO_FFN) for shape in others]
        reachable = target.amount([least, *absent]) <= target.remaining
    if not reachable:
        raise InputError(
            f"sparsity {target.sparsity:g} can't be reached"
            + (" with the same widths in every layer. Leave --layout out, or ask" if target.stock else ". Ask")
            + " for a lower --sparsity."
        )


def widest(target: Target, shape: LayerShape, reach: Reach) -> tuple[int, int] | None:
    """The FFN width nearest to what the target leaves beside the attention of ``shape``, if there is one; and how many
    steps of width would be left of that by an FFN that is whole."""
    layers, full = target.config.num_hidden_layers, target.config.intermediate_size
    one, two = (target.amount([replace(shape, ffn_width=width)] * layers) for width in (reach.align, 2 * reach.align))
    if one == two:
        return (full, target.remaining - one) if one <= target.remaining else None
    steps, whole = 1 + round((target.remaining - one) / (two - one)), ceil(full / reach.align)
    return (min(full, steps * reach.align), max(0, steps - whole)) if steps >= 1 else None


def ffn_costs_by_width(profile: Profile) -> Callable[[int], float]:
    """The cost of an FFN's width, linear between the widths at which it is known."""
    widths: NDArray = profile["ffn_widths"].flip(0).numpy()
    costs: NDArray = profile["ffn_costs"].flip(0).numpy()
    return lambda width: float(np.interp(width, widths, costs))
