"""The projection onto a box cut by a half-space, by its optimality conditions and against bisection."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.solvers.qp.budgeted_box import BudgetedBox


def bisection(point: np.ndarray, lower: np.ndarray, upper: np.ndarray, cost: np.ndarray, limit: float) -> np.ndarray:
    def clipped(multiplier: float) -> np.ndarray:
        return np.clip(point - multiplier * cost, lower, upper)

    low, high = 0.0, 1.0
    while clipped(high) @ cost > limit and high < 1e9:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if clipped(middle) @ cost > limit else (low, middle)
    return clipped(high if clipped(0.0) @ cost > limit else 0.0)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 12), rows=st.integers(1, 4), tightness=st.floats(0, 2), seed=st.integers(0, 10**6))
def test_it_is_the_nearest_point_of_the_box_within_the_budget(n, rows, tightness, seed):
    rng = np.random.default_rng(seed)
    lower, upper = -rng.uniform(0, 1, (rows, n)), rng.uniform(0, 1, (rows, n))
    cost = np.where(rng.uniform(size=n) < 0.2, 0.0, rng.uniform(-1, 2, n))
    cheapest = np.minimum(cost * lower, cost * upper).sum(axis=1)
    limit = (1 - tightness) * cheapest if tightness < 1 else cheapest * (2 - tightness)
    lower[rng.uniform(size=lower.shape) < 0.2] = -np.inf
    upper[rng.uniform(size=upper.shape) < 0.2] = np.inf
    points = 3 * rng.standard_normal((rows, n))
    feasible = BudgetedBox(*(torch.as_tensor(operand) for operand in (lower, upper, cost, limit)))
    projected = feasible.project(torch.as_tensor(points)).numpy()
    assert (projected >= lower).all() and (projected <= upper).all()
    assert (projected @ cost <= limit + 1e-9).all()
    for row in range(rows):
        expected = bisection(points[row], lower[row], upper[row], cost, limit[row])
        np.testing.assert_allclose(projected[row], expected, atol=1e-6)


def test_a_point_within_the_set_stays_where_it_is_to_the_bit():
    points = torch.rand(5, 8)
    feasible = BudgetedBox(torch.zeros(5, 8), torch.ones(5, 8), torch.ones(8), torch.full((5,), 8.0))
    assert torch.equal(feasible.project(points), points)


def test_a_budget_of_nothing_leaves_nothing():
    feasible = BudgetedBox(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([1.0, 2.0, 0.5]), torch.zeros(2))
    assert torch.equal(feasible.project(torch.full((2, 3), 5.0)), torch.zeros(2, 3))


def test_equal_costs_share_what_is_over_alike():
    feasible = BudgetedBox(torch.full((1, 4), -torch.inf), torch.full((1, 4), torch.inf), torch.ones(4), torch.zeros(1))
    projected = feasible.project(torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
    torch.testing.assert_close(projected, torch.tensor([[-2.0, -1.0, 0.0, 3.0]]))
