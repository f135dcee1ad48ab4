"""What a mixture of experts may become, and what that costs: fewer experts, narrower ones, less beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import ceil

from scipy.interpolate import interp1d
from torch import Tensor

from distprune.budgets import Menu, Target
from distprune.layers.shapes import ExpertsShape
from distprune.methods.base import Profile
from distprune.methods.curvature.menus import Reach, costs_by_width
from distprune.methods.mixtures import best_experts

#: So many numbers of experts are on a layer's menu.
MOST_COUNTS = 24
#: And so many widths, each with every number of experts.
MOST_WIDTHS = 24


def mixture_menus(target: Target, index: int, profile: Profile, reach: Reach) -> list[Menu]:
    """Fewer experts, and narrower ones; and, on a menu of its own where it may have a width of its own, the network
    that every token passes through."""
    dense = target.dense_shape(index).ffn
    assert isinstance(dense, ExpertsShape)
    has_menu = dense.shared_width is not None and target.removable(index).neurons
    shared = [shared_menu(target, index, dense, profile, reach)] if has_menu else []
    bare = replace(dense, shared_width=None) if has_menu else dense
    cost_of, options = mixture_costs(profile, dense), []
    for count in counts(target, index, reach):
        for width in widths(target, index, reach):
            options.append((replace(bare, count=count, width=width), cost_of(count, width)))
    shapes, costs = map(list, zip(*options, strict=True))
    return [Menu(index, "ffn", shapes, costs, [target.ffn_amount(index, shape) for shape in shapes]), *shared]


def shared_menu(target: Target, index: int, dense: ExpertsShape, profile: Profile, reach: Reach) -> Menu:
    cost_of = costs_by_width(profile, "shared")
    options = reach.widths(dense.shared_width)
    every = ceil(len(options) / MOST_WIDTHS)
    shapes = [replace(dense, shared_width=width) for width in options[::-every]]
    beside = target.ffn_amount(index, replace(dense, shared_width=None))
    amounts = [target.ffn_amount(index, shape) - beside for shape in shapes]
    return Menu(index, "shared", shapes, [cost_of(shape.shared_width) for shape in shapes], amounts)


def counts(target: Target, index: int, reach: Reach) -> list[int]:
    """How many experts may stay, from all to the fewest."""
    dense = target.dense_shape(index).ffn
    if not target.removable(index).experts:
        return [dense.count]
    fewest = max(dense.fewest, ceil(reach.least * dense.count))
    step = dense.groups * ceil((dense.count - fewest) / dense.groups / MOST_COUNTS) if dense.count > fewest else 1
    return [*range(dense.count, fewest - 1, -step)]


def widths(target: Target, index: int, reach: Reach) -> list[int]:
    """How many neurons each may keep, from all to the fewest."""
    dense = target.dense_shape(index).ffn
    if not target.removable(index).neurons:
        return [dense.width]
    options = reach.widths(dense.width)
    return options[:: -ceil(len(options) / MOST_WIDTHS)]


def mixture_costs(profile: Profile, dense: ExpertsShape) -> Callable[[int, int], float]:
    """What it costs to keep so many experts, of such a width."""
    known, costs = profile["expert_widths"].flip(0).numpy(), profile["expert_costs"].flip(1).numpy()
    worth, shared = costs[:, 0], costs_by_width(profile, "shared") if dense.shared_count else None
    at = cache(interp1d(known, costs, axis=1))
    kept = cache(lambda count: kept_experts(profile, count, dense.groups).numpy())

    def cost_of(count: int, width: int) -> float:
        gone = worth.sum() - worth[kept(count)].sum()
        beside = shared(dense.shared_count * width) if shared else 0.0
        return float(gone + at(width)[kept(count)].sum()) + beside

    return cost_of


def kept_experts(profile: Profile, count: int, groups: int) -> Tensor:
    """The experts that are worth most, their numbers ascending."""
    return best_experts(profile["expert_costs"][:, -1], count, groups)


def smallest_mixture(target: Target, index: int, reach: Reach) -> ExpertsShape:
    """The smallest that is on the menus."""
    dense = target.dense_shape(index).ffn
    smallest = replace(dense, count=counts(target, index, reach)[-1], width=widths(target, index, reach)[-1])
    if dense.shared_width is None or not target.removable(index).neurons:
        return smallest
    return replace(smallest, shared_width=reach.widths(dense.shared_width)[0])
