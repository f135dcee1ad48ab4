"""One budget for all modules of all layers: of each the option with which the whole costs least.

The multiple-choice knapsack problem, solved as an integer program (HiGHS, through scipy) on what its relaxation leaves
open. A limit is set in nodes, not in seconds, since the answer must not depend on how fast the machine is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from distprune.budgets.native_output import native_output_on_stderr
from distprune.budgets.relaxation import Table, reduced_costs, relax
from distprune.errors import InputError

#: How much of the whole cost may stay unproven, and how many nodes of the search tree may be visited to prove it.
GAP = 1e-6
NODES = 1000


class Curve:
    """The options of one module.

    An option that keeps more can do what one that keeps less does, so where it is said to cost more that is noise, and
    the lower cost counts.

    Args:
        costs: the predicted increase of the loss, (n,), finite.
        amounts: what stays of the budgeted resource, (n,), whole numbers; in any order.

    Raises:
        ValueError: the two don't fit together.
    """

    def __init__(self, costs: ArrayLike, amounts: ArrayLike):
        costs, given = np.asarray(costs, dtype=np.float64), np.asarray(amounts)
        amounts = given.astype(np.int64)
        if costs.shape != given.shape or costs.ndim != 1 or not len(costs):
            raise ValueError(f"a curve needs a cost for each amount, got {costs.shape} and {given.shape}.")
        if not np.isfinite(costs).all() or not np.array_equal(amounts, given):
            raise ValueError("a curve needs finite costs and whole amounts.")
        order = np.lexsort((costs, amounts))
        #: Which of the options as they were given, (m,): of equal amounts the one of least cost.
        self.options = order[np.unique(amounts[order], return_index=True)[1]]
        self.table = Table(np.minimum.accumulate(costs[self.options]), amounts[self.options])


@dataclass(frozen=True)
class Allocation:
    """An option for each module.

    Attributes:
        choices: indices into each curve's options, as they were given.
        costs: of each curve's option.
        amount: the sum of the options' amounts.
        bound: no choice within the budget costs less.
    """

    choices: list[int]
    costs: list[float]
    amount: int
    bound: float

    @property
    def cost(self) -> float:
        """The sum of the options' costs."""
        return float(sum(self.costs))

    @property
    def gap(self) -> float:
        """How much of the cost may be more than is needed, as a fraction."""
        excess = max(0.0, self.cost - self.bound)
        return excess / abs(self.cost) if excess else 0.0


def allocate(curves: Sequence[Curve], budget: float) -> Allocation:
    """Choose one option of every curve so that the costs sum to the least that amounts within ``budget`` allow.

    No other option that keeps more of a single module would still fit: what is left of the budget is less than the
    smallest step that is left. The same input gives the same choice.

    Raises:
        InputError: the smallest options exceed the budget.
    """
    tables = [curve.table for curve in curves]
    budget = int(np.floor(budget))
    least = sum(int(table.amounts[0]) for table in tables)
    if least > budget:
        raise InputError(
            f"the budget of {budget:,} can't be reached: the smallest options of all modules need {least:,}. "
            "Ask for a lower --sparsity."
        )
    relaxation = relax(tables, budget)
    choices, bound = fill(tables, relaxation.choices, budget), relaxation.bound
    excess = total_cost(tables, choices) - bound
    open_options = [costs <= excess for costs in reduced_costs(tables, relaxation.price)]
    for mask, choice in zip(open_options, choices, strict=True):
        mask[choice] = True  # which rounding may have closed
    if excess > GAP * abs(bound) and any(mask.sum() > 1 for mask in open_options):
        better, proven = solve_program(tables, open_options, choices, budget, excess)
        choices, bound = fill(tables, better, budget), max(bound, proven)
    return Allocation(
        choices=[int(curve.options[choice]) for curve, choice in zip(curves, choices, strict=True)],
        costs=costs_of(tables, choices),
        amount=total_amount(tables, choices),
        bound=bound,
    )


def solve_program(
    tables: Sequence[Table], open_options: Sequence[NDArray[np.bool_]], known: list[int], budget: int, scale: float
) -> tuple[list[int], float]:
    """The integer program over the ``open_options`` of each item.

    Args:
        known: a choice within the budget.
        scale: what costs are measured in, as the solver's tolerances are absolute.

    Returns:
        The best choice found, ``known`` if none is better, and a bound on what any choice of open options costs.
    """
    items = np.repeat(np.arange(len(tables)), [mask.sum() for mask in open_options])
    options = np.concatenate([np.flatnonzero(mask) for mask in open_options])
    savings = [table.costs - table.costs[choice] for table, choice in zip(tables, known, strict=True)]
    costs = np.concatenate([saving[mask] for saving, mask in zip(savings, open_options, strict=True)]) / scale
    # Whole numbers as small as can be: the solver's tolerances then can't hide a step.
    floors = [table.amounts[mask].min() for table, mask in zip(tables, open_options, strict=True)]
    above = [table.amounts[mask] - floor for table, mask, floor in zip(tables, open_options, floors, strict=True)]
    amounts = np.concatenate(above)
    unit = max(1, gcd(*map(int, amounts)))
    room = (budget - int(sum(floors))) // unit
    start = total_cost(tables, known)
    # A variable for each option and one that stands for the known choice's cost, since the gap is relative to the sum.
    one_each = sparse.csr_array((np.ones(len(items)), (items, np.arange(len(items)))))
    with native_output_on_stderr():
        result = milp(
            np.append(costs, start / scale),
            integrality=np.append(np.ones(len(items)), 0),
            bounds=Bounds(np.append(np.zeros(len(items)), 1), 1),
            constraints=[
                LinearConstraint(sparse.block_array([[one_each, sparse.csr_array((len(tables), 1))]]), 1, 1),
                # Half a unit more is for the solver's rounding.
                LinearConstraint(np.append(amounts / unit, 0)[None], ub=room + 0.5),
            ],
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
    bound = -np.inf if result.mip_dual_bound is None else scale * result.mip_dual_bound
    if result.x is None:
        return known, bound
    found = [int(options[items == item][result.x[:-1][items == item].argmax()]) for item in range(len(tables))]
    sound = total_amount(tables, found) <= budget and total_cost(tables, found) < start
    return found if sound else known, bound


def fill(tables: Sequence[Table], choices: Sequence[int], budget: int) -> list[int]:
    """Spend what is left of the budget, one item after another, each time where it saves most.

    Afterwards no larger option of any item fits.
    """
    choices = list(choices)
    left = budget - total_amount(tables, choices)
    while True:
        upgrades = []
        for item, (costs, amounts) in enumerate(tables):
            option = int(np.searchsorted(amounts, amounts[choices[item]] + left, side="right")) - 1
            if option > choices[item]:  # the largest that fits, which costs least
                taken = int(amounts[option] - amounts[choices[item]])
                upgrades.append((costs[option] - costs[choices[item]], -taken, item, option))
        if not upgrades:
            return choices
        _, taken, item, choices[item] = min(upgrades)
        left += taken


def costs_of(tables: Sequence[Table], choices: Sequence[int]) -> list[float]:
    return [float(table.costs[choice]) for table, choice in zip(tables, choices, strict=True)]


def total_cost(tables: Sequence[Table], choices: Sequence[int]) -> float:
    return float(sum(costs_of(tables, choices)))


def total_amount(tables: Sequence[Table], choices: Sequence[int]) -> int:
    return int(sum(table.amounts[choice] for table, choice in zip(tables, choices, strict=True)))
