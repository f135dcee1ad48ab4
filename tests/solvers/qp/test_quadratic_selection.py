"""Selection by relaxation, against Clarabel in float64."""

from __future__ import annotations

import clarabel
import numpy as np
import pytest
import torch
from scipy import sparse

from distprune.solvers import relaxed_selection


def by_clarabel(interaction: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    units = len(cost)
    options = clarabel.DefaultSettings()
    options.verbose = False
    options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-12
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(interaction)),
        -interaction.sum(axis=1),
        sparse.csc_matrix(np.concatenate([np.eye(units), -np.eye(units), cost[None]])),
        np.concatenate([np.ones(units), np.zeros(units), [budget]]),
        [clarabel.NonnegativeConeT(2 * units + 1)],
        options,
    )
    result = solver.solve()
    assert result.status == clarabel.SolverStatus.Solved
    return np.array(result.x)


@pytest.mark.parametrize("tokens", [300, 20], ids=["full rank", "rank-deficient"])
def test_relaxed_selection_agrees_with_an_interior_point_method(tokens):
    rng = np.random.default_rng(7)
    units, budget = 40, 30.0
    contributions = rng.standard_normal((tokens, units)) * rng.uniform(0.1, 3, units) + 0.5
    interaction, cost = contributions.T @ contributions / tokens, rng.uniform(0.5, 1.5, units)
    keep = relaxed_selection(torch.as_tensor(interaction), torch.as_tensor(cost), budget).x[0].numpy()
    assert (keep >= 0).all() and (keep <= 1).all() and keep @ cost <= budget * (1 + 1e-9)
    expected = by_clarabel(interaction, cost, budget)
    if tokens > units:
        np.testing.assert_allclose(keep, expected, atol=1e-4)
    lost, least = ((1 - m) @ interaction @ (1 - m) for m in (keep, expected))
    assert lost <= least * (1 + 1e-4)


def test_relaxed_selection_lets_units_that_cancel_each_other_go_together():
    # The first two are each four times the third, and nothing together.
    interaction = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    keep = relaxed_selection(interaction, torch.ones(3), 1.0).x[0]
    torch.testing.assert_close(keep, torch.tensor([0.0, 0.0, 1.0]), atol=1e-4, rtol=0)


def test_relaxed_selection_keeps_everything_that_the_budget_allows():
    interaction = torch.eye(5) + 0.1
    torch.testing.assert_close(relaxed_selection(interaction, torch.ones(5), 5.0).x[0], torch.ones(5))
    assert torch.equal(relaxed_selection(interaction, torch.ones(5), 0.0).x[0], torch.zeros(5))
