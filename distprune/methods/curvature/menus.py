"""What attention and feed-forward networks may become, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, lcm

import numpy as np
from numpy.typing import NDArray

from distprune.budgets import Menu, Target, aligned
from distprune.layers.shapes import AttentionShape, FeedForwardShape
from distprune.methods.base import Profile

#: Widths of an FFN on its menu, where single steps of the alignment are spent at the end; and prices of ranks.
MOST_WIDTHS = 64
#: An option of a menu: the shape that a part may have, None where it may go whole; and what that costs.
Option = tuple[AttentionShape | None, float] | tuple[FeedForwardShape | None, float]


@dataclass(frozen=True)
class Reach:
    """How far parts may be cut.

    Attributes:
        align: widths are multiples of it.
        least: a part keeps at least this share of every width, or goes whole.
        keeps_attention: whether no layer's attention goes whole.
    """

    align: int
    least: float
    keeps_attention: bool = False

    def widths(self, dense: int) -> list[int]:
        """The widths that one of ``dense`` may be cut to, ascending, itself the last."""
        first = aligned(self.least * dense, self.align, most=dense)
        return [*range(first, dense, self.align), dense]

    def groups(self, dense: int) -> range:
        """How many of ``dense`` KV groups may stay, from all to the fewest."""
        fewest = dense - min(dense - 1, round((1 - self.least) * dense))
        return range(dense, fewest - 1, -1)


def attention_menu(target: Target, index: int, profile: Profile, reach: Reach) -> Menu:
    """Fewer KV groups, value neurons and rotary pairs; or all heads, fewer value neurons and factored projections; or,
    but in the first layer that has attention, none of it."""
    options: list[Option] = [*narrower_heads(target, index, profile, reach)]
    if "query_costs" in profile and target.removable(index).factors:
        options += factored(target, index, profile, reach)
    if may_lose_attention(target, index, reach):
        options.append((None, float(profile["group_costs"][-1])))
    shapes, costs = map(list, zip(*options, strict=True))
    return Menu(index, "attention", shapes, costs, [target.attention_amount(index, shape) for shape in shapes])


def may_lose_attention(target: Target, index: int, reach: Reach) -> bool:
    """Whether the layer's attention may go whole: one layer at least must keep it, and the first that has it does."""
    first = next(place for place, shape in enumerate(target.dense_shapes) if shape.attention)
    return index != first and target.removable(index).attention and not reach.keeps_attention


def narrower_heads(target: Target, index: int, profile: Profile, reach: Reach) -> Iterator[Option]:
    """Every number of groups, values and pairs that may stay."""
    dense, order = target.dense_shape(index).attention, profile["group_order"]
    value_costs, pair_costs = profile["value_costs"][order].numpy(), profile["pair_costs"][order].numpy()
    for shape in head_shapes(target, index, reach):
        gone = dense.kv_heads - shape.kv_heads
        pairs = (dense.query_key_dim - shape.query_key_dim) // 2
        lost = value_costs[gone:, shape.value_dim].sum() + pair_costs[gone:, pairs].sum()
        yield shape, float(profile["group_costs"][gone]) + float(lost)


def head_shapes(target: Target, index: int, reach: Reach) -> Iterator[AttentionShape]:
    """The shapes that attention may have by fewer groups, values and pairs."""
    dense, removable = target.dense_shape(index).attention, target.removable(index)
    # Pairs go in twos of coordinates.
    by_pairs = replace(reach, align=lcm(2, reach.align))
    for groups in reach.groups(dense.kv_heads) if removable.heads else [dense.kv_heads]:
        for value_dim in value_widths(target, index, reach):
            for width in by_pairs.widths(dense.query_key_dim) if removable.pairs else [dense.query_key_dim]:
                heads = {"kv_heads": groups, "query_heads": groups * dense.heads_per_group}
                yield replace(dense, **heads, value_dim=value_dim, query_key_dim=width)


def value_widths(target: Target, index: int, reach: Reach) -> list[int]:
    """The widths that a layer's value heads may have."""
    dense = target.dense_shape(index).attention.value_dim
    return reach.widths(dense) if target.removable(index).values else [dense]


def factored(target: Target, index: int, profile: Profile, reach: Reach) -> Iterator[Option]:
    """For every number of value neurons and at every of many prices, the ranks that cost least."""
    dense = target.dense_shape(index).attention

    def ranks(name: str, shape: AttentionShape) -> tuple[list[int | None], NDArray, NDArray]:
        """The ranks to choose from, None for no factors, what they cost, and what they save."""
        costs = profile[f"{name}_costs"].numpy()
        choices = [None, *range(reach.align, len(costs), reach.align)]
        takes = np.array([target.attention_amount(index, replace(shape, **{f"{name}_rank": rank})) for rank in choices])
        return choices, np.array([0.0, *costs[reach.align :: reach.align]]), takes[0] - takes

    fixed = {f"{name}_rank": ranks(name, dense) for name in ("query", "key")}
    for value_dim in value_widths(target, index, reach):
        narrower = replace(dense, value_dim=value_dim)
        lost = float(profile["value_costs"][:, value_dim].sum())
        tables = fixed | {"output_rank": ranks("output", narrower)}
        seen = set()
        for price in prices(tables.values()):
            places = {name: int((costs - price * savings).argmin()) for name, (_, costs, savings) in tables.items()}
            if (found := tuple(places.values())) not in seen:
                seen.add(found)
                change = {name: tables[name][0][place] for name, place in places.items()}
                cost = sum(float(tables[name][1][place]) for name, place in places.items())
                yield replace(narrower, **change), lost + cost


def prices(tables: Iterable[tuple[list[int | None], NDArray, NDArray]]) -> NDArray:
    """Costs of a unit of the resource, from less than that of any first step to more than that of any last."""
    slopes = [costs[savings > 0] / savings[savings > 0] for _, costs, savings in tables]
    slopes = np.concatenate(slopes)
    slopes = slopes[slopes > 0]
    return np.geomspace(slopes.min() / 2, 100 * slopes.max(), MOST_WIDTHS) if len(slopes) else np.zeros(0)


def ffn_menu(target: Target, index: int, profile: Profile, reach: Reach) -> Menu:
    """A few of the widths, the narrow ones with branches of some ranks too; and none at all."""
    dense, removable, cost_of = target.dense_shape(index).ffn, target.removable(index), costs_by_width(profile)
    has_branches = "branch_savings" in profile and removable.branch
    shares = branch_shares(profile, cost_of, reach.align) if has_branches else {}
    options: list[Option] = [(None, cost_of(0))] if removable.ffn else []
    every = ceil(dense.width / reach.align / MOST_WIDTHS)
    for width in reach.widths(dense.width)[::-every] if removable.neurons else [dense.width]:
        options.append((replace(dense, width=width), cost_of(width)))
        for rank, share_at in shares.items() if width < dense.width else ():
            if (share := share_at(width)) > 0:
                options.append((replace(dense, width=width, branch_rank=rank), (1 - share) * cost_of(width)))
    # A branch beside a network that is hardly narrower takes more than the whole network.
    most = target.ffn_amount(index, dense)
    options = [(shape, cost) for shape, cost in options if target.ffn_amount(index, shape) <= most]
    shapes, costs = map(list, zip(*options, strict=True))
    return Menu(index, "ffn", shapes, costs, [target.ffn_amount(index, shape) for shape in shapes])


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


def costs_by_width(profile: Profile, name: str = "ffn") -> Callable[[int], float]:
    """The cost of an FFN's width, linear between the widths at which it is known."""
    widths: NDArray = profile[f"{name}_widths"].flip(0).numpy()
    costs: NDArray = profile[f"{name}_costs"].flip(0).numpy()
    return lambda width: float(np.interp(width, widths, costs))
