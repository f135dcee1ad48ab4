"""The multiple-choice knapsack problem with its choices relaxed to mixtures, which a sort solves.

Sinha & Zoltners, The multiple-choice knapsack problem (Operations Research 1979): on the lower convex hulls of the
curves, the steps that save most for what they take go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Table(NamedTuple):
    """The options of one item, amounts strictly ascending and costs not ascending.

    Attributes:
        costs: (n,), float64.
        amounts: (n,), int64.
    """

    costs: NDArray[np.float64]
    amounts: NDArray[np.int64]


@dataclass(frozen=True)
class Relaxation:
    """What the relaxed problem says of the whole one.

    Attributes:
        choices: a choice of whole options within the budget, that the relaxed solution is rounded to.
        price: what a unit of the budget is worth, in cost.
        bound: no choice within the budget costs less.
    """

    choices: list[int]
    price: float
    bound: float


def relax(tables: Sequence[Table], budget: int) -> Relaxation:
    """Solve the relaxed problem, in which an item may be a mixture of its options.

    Args:
        tables: the items' options; the smallest of all items fit the ``budget`` together.
        budget: what the amounts may sum to.
    """
    choices = [0] * len(tables)
    left = budget - sum(int(table.amounts[0]) for table in tables)
    price = 0.0
    full: set[int] = set()
    for _, item, option in sorted(chain.from_iterable(map(hull_steps, count(), tables))):
        amounts, costs = tables[item].amounts, tables[item].costs
        taken = int(amounts[option] - amounts[choices[item]])
        if item not in full and taken <= left:
            choices[item], left = option, left - taken
            continue
        if not full:  # the one item that is a mixture
            price = float(costs[choices[item]] - costs[option]) / taken
        full.add(item)
    least = sum(float((table.costs + price * table.amounts).min()) for table in tables)
    return Relaxation(choices, price, least - price * budget)


def hull_steps(item: int, table: Table) -> list[tuple[float, int, int]]:
    """(minus the cost saved by a unit of the amount, item, option reached) along the lower convex hull, ascending."""
    steps = [(slope(table, first, second), item, second) for first, second in pairwise(hull_of(table))]
    return [step for step in steps if step[0] < 0]


def hull_of(table: Table) -> list[int]:
    """The options on the lower convex hull of costs against amounts, ascending."""
    hull: list[int] = []
    for option in range(len(table.costs)):
        while len(hull) > 1 and slope(table, hull[-2], hull[-1]) >= slope(table, hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def slope(table: Table, first: int, second: int) -> float:
    rise = table.costs[second] - table.costs[first]
    return float(rise) / int(table.amounts[second] - table.amounts[first])


def reduced_costs(tables: Sequence[Table], price: float) -> list[NDArray[np.float64]]:
    """What each option costs beyond the best one of its item where a unit of the amount has that ``price``.

    A choice with an option in it costs at least the relaxation's bound and the option's reduced cost.
    """
    priced = [table.costs + price * table.amounts for table in tables]
    return [costs - costs.min() for costs in priced]
