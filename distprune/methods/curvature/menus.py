"""What every module may become, and the choice for all of them that costs least within the budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, lcm

import numpy as np
from numpy.typing import NDArray

from distprune.budgets import Curve, Target, aligned, allocate
from distprune.decoder_layer import LayerShape
from distprune.methods.base import Plan, Profile

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


def allocate_globally(target: Target, profiles: Sequence[Profile], reach: Reach) -> Plan:
    """Of each menu the option with which the whole costs least.

    Raises:
        InputError: the target can't be reached.
    """
    shapes, amounts, menus = target.dense_shapes, Amounts(target), []
    for index, (shape, profile) in enumerate(zip(shapes, profiles, strict=True)):
        menus += [
            attention_menu(target, amounts, index, shape, profile, reach),
            ffn_menu(amounts, index, shape, profile, reach),
        ]
    allocation = allocate([menu.curve for menu in menus], target.remaining)
    for menu, choice in zip(menus, allocation.choices, strict=True):
        shapes[menu.layer] = replace(shapes[menu.layer], **menu.changes[choice])
    return Plan(spend_rest(target, shapes, reach.align), allocation.cost, allocation.gap)


class Amounts:
    """What modules take of the budgeted resource; counted once for all layers that are alike."""

    def __init__(self, target: Target):
        self._target = target
        self._known: dict[Hashable, int] = {}

    def attention(self, index: int, dense: LayerShape, change: Change) -> int:
        return self._count(self._target.attention_amount, index, dense, change)

    def ffn(self, index: int, dense: LayerShape, change: Change) -> int:
        return self._count(self._target.ffn_amount, index, dense, change)

    def _count(self, amount: Callable[..., int], index: int, dense: LayerShape, change: Change) -> int:
        key = amount.__name__, self._kind(index), dense, *change.items()
        if key not in self._known:
            self._known[key] = amount(index, replace(dense, **change))
        return self._known[key]

    def _kind(self, index: int) -> Hashable:
        sizes = self._target.sizes
        return self._target.config.layer_types[index], *(sizes.layers[index].items() if sizes else ())


def attention_menu(
    target: Target, amounts: Amounts, index: int, dense: LayerShape, profile: Profile, reach: Reach
) -> Menu:
    """Fewer KV groups, value neurons and rotary pairs; or all heads, fewer value neurons and factored projections; or,
    but in the first layer, none of it."""
    options = [*narrower_heads(target, dense, profile, reach)]
    if "query_costs" in profile:
        options += factored(amounts, index, dense, profile, reach)
    if index > 0:  # one layer at least must keep its attention
        options.append((NO_ATTENTION, float(profile["group_costs"][-1])))
    changes, costs = map(list, zip(*options, strict=True))
    return Menu(index, changes, costs, [amounts.attention(index, dense, change) for change in changes])


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
    amounts: Amounts, index: int, dense: LayerShape, profile: Profile, reach: Reach
) -> Iterator[tuple[Change, float]]:
    """For every number of value neurons and at every of many prices, the ranks that cost least."""

    def ranks(name: str, change: Change) -> tuple[list[int | None], NDArray, NDArray]:
        """The ranks to choose from, None for no factors, what they cost, and what they save."""
        costs = profile[f"{name}_costs"].numpy()
        choices = [None, *range(reach.align, len(costs), reach.align)]
        takes = np.array([amounts.attention(index, dense, {**change, f"{name}_rank": rank}) for rank in choices])
        return choices, np.array([0.0, *costs[reach.align :: reach.align]]), takes[0] - takes

    fixed = {f"{name}_rank": ranks(name, {}) for name in ("query", "key")}
    for value_dim in reach.widths(dense.value_dim):
        lost = float(profile["value_costs"][:, value_dim].sum())
        tables = fixed | {"output_rank": ranks("output", {"value_dim": value_dim})}
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


def ffn_menu(amounts: Amounts, index: int, dense: LayerShape, profile: Profile, reach: Reach) -> Menu:
    """A few of the widths, the narrow ones with branches of some ranks too; and none at all."""
    cost_of, every = ffn_costs_by_width(profile), ceil(dense.ffn_width / reach.align / MOST_WIDTHS)
    shares = branch_shares(profile, cost_of, reach.align) if "branch_savings" in profile else {}
    options: list[tuple[Change, float]] = [(NO_FFN, cost_of(0))]
    for width in reach.widths(dense.ffn_width)[::-every]:
        options.append(({"ffn_width": width}, cost_of(width)))
        for rank, share_at in shares.items() if width < dense.ffn_width else ():
            if (share := share_at(width)) > 0:
                options.append(({"ffn_width": width, "calibration_rank": rank}, (1 - share) * cost_of(width)))
    changes, costs = map(list, zip(*options, strict=True))
    return Menu(index, changes, costs, [amounts.ffn(index, dense, change) for change in changes])


def branch_shares(profile: Profile, cost_of: Callable[[int], float], align: int) -> dict[int, Callable[[int], float]]:
    """For some ranks of a branch, the share that it saves of what an FFN costs, by the FFN's width."""
    widths, savings = profile["branch_widths"].flip(0).numpy(), profile["branch_savings"].flip(0).numpy()
    costs = np.array([[cost_of(width)] for width in widths])
    shares = np.divide(savings, costs, out=np.zeros_like(savings), where=costs > 0).clip(0, 1)
    return {
        rank: partial(np.interp, xp=widths, fp=shares[:, rank]) for rank in branch_ranks(align, shares.shape[1] - 1)
    }


def branch_ranks(align: int, most: int) -> Iterator[int]:
    """Multiples of ``align``, farther and farther apart, since a branch's last ranks do least."""
    rank = align
    while rank <= most:
        yield rank
        rank += max(align, rank // 4 // align * align)


def spend_rest(target: Target, shapes: Sequence[LayerShape], align: int) -> list[LayerShape]:
    """Widen FFNs by single steps of ``align`` with what the coarser steps of the menus have left of the budget.

    It is less than a step of any menu, so where it goes hardly matters: to the FFNs that have lost most.
    """
    shapes, full = list(shapes), target.config.intermediate_size
    left = target.remaining - target.amount(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: shapes[index].ffn_width):
        while 0 < shapes[index].ffn_width < full:
            wider = replace(shapes[index], ffn_width=min(full, shapes[index].ffn_width + align))
            step = sum(sign * target.ffn_amount(index, shape) for sign, shape in ((1, wider), (-1, shapes[index])))
            if step > left or step == 0:
                break
            shapes[index], left = wider, left - step
    return shapes


def smallest(target: Target, reach: Reach) -> list[LayerShape]:
    """The smallest options of all menus."""
    first, *others = target.dense_shapes
    width = first.query_key_dim if target.config.query_key_norm else reach.widths(first.query_key_dim)[0]
    narrow = {"kv_heads": 1, "query_heads": first.query_heads // first.kv_heads, "query_key_dim": width}
    least = replace(first, **narrow, value_dim=reach.widths(first.value_dim)[0], **NO_FFN)
    return [least, *(replace(shape, **NO_ATTENTION, **NO_FFN) for shape in others)]


def ffn_costs_by_width(profile: Profile) -> Callable[[int], float]:
    """The cost of an FFN's width, linear between the widths at which it is known."""
    widths: NDArray = profile["ffn_widths"].flip(0).numpy()
    costs: NDArray = profile["ffn_costs"].flip(0).numpy()
    return lambda width: float(np.interp(width, widths, costs))
