"""One budget over the curves of all modules, against every possible choice."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from distprune.budgets import Curve, allocate
from distprune.budgets.allocation import GAP
from distprune.budgets.relaxation import relax
from distprune.errors import InputError

Raw = list[tuple[list[float], list[int]]]

FEW_VALUES = st.integers(0, 4).map(float)  # ties abound
ANY_VALUES = st.floats(-10, 1000)


def modules(values: st.SearchStrategy[float], most: int = 5) -> st.SearchStrategy[Raw]:
    """Up to four modules of up to ``most`` options, in any order."""
    option = st.tuples(values, st.integers(0, 30))
    module = st.lists(option, min_size=1, max_size=most).map(
        lambda options: tuple(map(list, zip(*options, strict=True)))
    )
    return st.lists(module, min_size=1, max_size=4)


def curves_of(raw: Raw) -> list[Curve]:
    return [Curve(*module) for module in raw]


def least_cost(raw: Raw, budget: float) -> float:
    """Over every choice within the budget."""
    choices = product(*(zip(*module, strict=True) for module in raw))
    within = (choice for choice in choices if sum(amount for _, amount in choice) <= budget)
    return min(sum(cost for cost, _ in choice) for choice in within)


def smallest(raw: Raw) -> int:
    return sum(min(amounts) for _, amounts in raw)


@settings(max_examples=150, deadline=None)
@given(raw=modules(FEW_VALUES) | modules(ANY_VALUES), slack=st.integers(0, 90))
@example(raw=[([0, 3], [15, 1]), ([0, 1, -1], [5, 2, 12]), ([3, 5, 1.5], [13, 4, 22])], slack=33)  # rounding
def test_no_choice_within_the_budget_costs_less(raw, slack):
    budget = smallest(raw) + slack
    found, optimum = allocate(curves_of(raw), budget), least_cost(raw, budget)
    assert found.amount == sum(amounts[choice] for (_, amounts), choice in zip(raw, found.choices, strict=True))
    assert found.amount <= budget
    tolerance = 2 * GAP * abs(optimum) + 1e-9
    assert found.cost == pytest.approx(optimum, abs=tolerance)
    assert found.bound <= optimum + tolerance
    assert 0 <= found.gap <= 2 * GAP or found.cost - found.bound <= 1e-9


@settings(max_examples=100, deadline=None)
@given(raw=modules(FEW_VALUES) | modules(ANY_VALUES), slack=st.integers(0, 90))
def test_what_is_left_of_the_budget_buys_no_larger_option(raw, slack):
    budget = smallest(raw) + slack
    found = allocate(curves_of(raw), budget)
    for (_, amounts), choice in zip(raw, found.choices, strict=True):
        assert not any(0 < amount - amounts[choice] <= budget - found.amount for amount in amounts)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=6),
    step=st.integers(1, 1000),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_widths_in_equal_steps_meet_the_budget_within_one_step(sizes, step, fraction, seed):
    generator = np.random.default_rng(seed)
    curves = [Curve(generator.exponential(size=size).cumsum()[::-1], step * np.arange(1, size + 1)) for size in sizes]
    least, whole = step * len(sizes), step * sum(sizes)
    budget = least + fraction * (whole - least)
    assert 0 <= budget - allocate(curves, budget).amount < step


@settings(max_examples=100, deadline=None)
@given(raw=modules(ANY_VALUES), slack=st.integers(0, 90))
def test_the_costs_of_decreasing_curves_are_those_of_the_options_that_were_given(raw, slack):
    raw = [(sorted(costs, reverse=True), sorted(amounts)) for costs, amounts in raw]
    assume(all(len(set(amounts)) == len(amounts) for _, amounts in raw))
    found = allocate(curves_of(raw), smallest(raw) + slack)
    assert found.cost == pytest.approx(sum(costs[i] for (costs, _), i in zip(raw, found.choices, strict=True)))


def test_an_option_that_keeps_more_is_never_worse_than_one_that_keeps_less():
    """The third option's cost is noise: it is taken to be the second's, and the budget is spent on it."""
    found = allocate([Curve([5.0, 1.0, 1.5], [1, 2, 3])], 3)
    assert (found.choices, found.cost, found.amount) == ([2], 1.0, 3)


def test_of_options_that_keep_as_much_the_better_one_counts():
    assert allocate([Curve([3.0, 2.0, 2.5], [4, 4, 4])], 4).choices == [1]


def test_a_whole_budget_keeps_everything():
    found = allocate([Curve([2.0, 0.0], [1, 2]), Curve([0.0, 7.0], [9, 3])], 11.9)
    assert (found.choices, found.cost, found.amount, found.gap) == ([1, 0], 0.0, 11, 0.0)


def test_a_budget_below_the_smallest_options_is_refused():
    curves = [Curve([1.0, 0.0], [10, 20]), Curve([1.0], [5])]
    assert allocate(curves, 15).choices == [0, 0]
    with pytest.raises(InputError, match=r"budget of 14 can't be reached.*need 15.*lower --sparsity"):
        allocate(curves, 14.9)


@pytest.mark.parametrize(
    ("costs", "amounts"), [([], []), ([1.0], [1, 2]), ([float("nan")], [1]), ([1.0], [1.5]), ([[1.0]], [[1]])]
)
def test_what_is_no_curve_is_refused(costs, amounts):
    with pytest.raises(ValueError, match="a curve needs"):
        Curve(costs, amounts)


# ------------------------------------------------------------------ of a large model's size


def large_curves(kind: str, layers: int = 126, options: int = 64) -> list[Curve]:
    """Four modules a layer, whose amounts go in steps of their own."""
    generator, curves = np.random.default_rng(0), []
    for step in (3 * 16384 * 832, 2 * 16384 * 128, 16384 * 272, 2 * 16384 * 2048) * layers:
        falls = generator.exponential(size=options - 1) * generator.lognormal(0, 1.5)
        if kind == "convex":
            falls = np.sort(falls)[::-1]
        if kind == "ties":
            falls = np.round(falls)
        costs = np.append(falls[::-1].cumsum()[::-1], 0)
        curves.append(Curve(costs, step * np.arange(1, options + 1)))
    return curves


@pytest.mark.parametrize("kind", ["convex", "any", "ties"])
def test_a_large_model_is_solved_to_the_proven_gap_in_seconds(kind, capfd):
    curves = large_curves(kind)
    budget = 0.7 * sum(int(curve.table.amounts[-1]) for curve in curves)
    began = time.process_time()
    found = allocate(curves, budget)
    assert time.process_time() - began < 30  # measured: below 4
    assert found.gap <= (1e-3 if kind == "ties" else 2 * GAP)
    rounded = relax([curve.table for curve in curves], int(budget)).choices
    assert found.cost <= sum(curve.table.costs[choice] for curve, choice in zip(curves, rounded, strict=True))
    assert allocate(curves, budget) == found
    assert capfd.readouterr().out == ""  # the solver's own prints would spoil a log on standard output


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no processes")
def test_the_choice_does_not_depend_on_the_number_of_cores():
    code = "\n".join(
        [
            "from __future__ import annotations",
            "import os, sys, numpy as np",
            "from distprune.budgets import Curve, allocate",
            inspect.getsource(large_curves),
            "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])",
            "curves = large_curves('convex', layers=40)",
            "print(allocate(curves, 0.7 * sum(int(curve.table.amounts[-1]) for curve in curves)).choices)",
        ]
    )
    one, all_cores = (
        subprocess.run([sys.executable, "-c", code, cores], capture_output=True, text=True, check=True).stdout
        for cores in ("1", "64")
    )
    assert one == all_cores
    assert len(one.split(",")) == 4 * 40
