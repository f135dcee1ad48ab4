"""Box-constrained quadratic programs, against OSQP and Clarabel in float64."""

from __future__ import annotations

from dataclasses import dataclass

import clarabel
import numpy as np
import osqp
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse

from distprune.errors import InputError
from distprune.solvers import solve_box_qp
from distprune.solvers.qp import quadratic

FAMILIES = ["random", "rank-deficient", "badly scaled"]
EXACT = {"tolerance": 1e-9, "max_iterations": 20_000}


@dataclass
class Program:
    """One Hessian, many right-hand sides and boxes, and a budget or none; numpy, float64."""

    hessian: np.ndarray
    linear: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    cost: np.ndarray | None = None
    limit: np.ndarray | None = None

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict:
        budget = None if self.cost is None else (tensor(self.cost, dtype), tensor(self.limit, dtype))
        operands = {name: tensor(getattr(self, name), dtype) for name in ("hessian", "linear", "lower", "upper")}
        return operands | {"budget": budget}

    def objective(self, x: np.ndarray) -> np.ndarray:
        return 0.5 * np.sum(x * (x @ self.hessian), axis=1) - np.sum(x * self.linear, axis=1)

    def assert_feasible(self, x: np.ndarray) -> None:
        assert (x >= self.lower).all() and (x <= self.upper).all()
        if self.cost is not None:
            assert (x @ self.cost <= self.limit + 1e-9 * (np.abs(x) @ np.abs(self.cost))).all()


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.as_tensor(array).to(dtype)


def program(family: str, n: int, rows: int, seed: int, budget: bool = False, open_share: float = 0.2) -> Program:
    """About half the bounds are tight at the solution; a share of them is infinite, but where H is singular."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((max(n // 2, 1) if family == "rank-deficient" else 3 * n, n))
    scale = 10 ** rng.uniform(-3, 3, n) if family == "badly scaled" else np.ones(n)
    hessian = (samples.T @ samples / len(samples)) * scale[:, None] * scale
    center = rng.standard_normal((rows, n))
    linear = (center / scale) @ hessian
    lower, upper = -rng.uniform(0, 1.5, (rows, n)), rng.uniform(0, 1.5, (rows, n))
    if family != "rank-deficient":
        lower[rng.uniform(size=lower.shape) < open_share] = -np.inf
        upper[rng.uniform(size=upper.shape) < open_share] = np.inf
    cost = limit = None
    if budget:
        # A third of the way from the cheapest corner of a unit box; costs of both signs, and some of zero.
        cost = scale * np.where(rng.uniform(size=n) < 0.2, 0.0, rng.uniform(-0.5, 1.5, n))
        corners = np.minimum(cost * np.maximum(lower, -1) / scale, cost * np.minimum(upper, 1) / scale)
        limit = corners.sum(axis=1) / 3
    return Program(hessian, linear, lower / scale, upper / scale, cost, limit)


def by_clarabel(problem: Program, row: int) -> np.ndarray | None:
    """The solution, or None: now and then it gets only nearly there."""
    n = len(problem.hessian)
    sides, bounds = [np.eye(n), -np.eye(n)], [problem.upper[row], -problem.lower[row]]
    if problem.cost is not None:
        sides, bounds = [*sides, problem.cost[None]], [*bounds, problem.limit[[row]]]
    sides, bounds = np.concatenate(sides), np.concatenate(bounds)
    finite = np.isfinite(bounds)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(problem.hessian)),
        -problem.linear[row],
        sparse.csc_matrix(sides[finite]),
        bounds[finite],
        [clarabel.NonnegativeConeT(int(finite.sum()))],
        settings,
    )
    result = solver.solve()
    return np.array(result.x) if result.status == clarabel.SolverStatus.Solved else None


def by_osqp(problem: Program, row: int) -> np.ndarray | None:
    """The same, in coordinates in which the Hessian has a unit diagonal: on bad scales OSQP stops short."""
    unit = np.sqrt(problem.hessian.diagonal())
    sides, lower, upper = np.eye(len(unit)), problem.lower[row] * unit, problem.upper[row] * unit
    if problem.cost is not None:
        sides = np.concatenate([sides, problem.cost[None] / unit])
        lower, upper = np.append(lower, -np.inf), np.append(upper, problem.limit[row])
    solver = osqp.OSQP()
    solver.setup(
        sparse.csc_matrix(np.triu(problem.hessian / unit[:, None] / unit)),
        -problem.linear[row] / unit,
        sparse.csc_matrix(sides),
        lower,
        upper,
        eps_abs=1e-9,
        eps_rel=1e-9,
        max_iter=200_000,
        verbose=False,
    )
    result = solver.solve(raise_error=False)
    return result.x / unit if result.info.status == "solved" else None


def assert_solves(problem: Program, x: np.ndarray, row: int, expected: np.ndarray, unique: bool, atol: float) -> None:
    """In coordinates in which the Hessian has a unit diagonal; the objective is measured against its terms."""
    if unique:
        unit = np.sqrt(problem.hessian.diagonal())
        np.testing.assert_allclose(x[row] * unit, expected * unit, atol=atol)
    terms = np.abs(expected * problem.linear[row]).sum() + np.abs(expected * (expected @ problem.hessian)).sum()
    # x is feasible, so it may lie below an oracle that is less exact.
    assert problem.objective(x)[row] <= problem.objective(np.tile(expected, (len(x), 1)))[row] + atol * terms


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    n=st.integers(1, 30),
    rows=st.integers(1, 3),
    budget=st.booleans(),
    seed=st.integers(0, 10**6),
)
@pytest.mark.parametrize("oracle", [by_clarabel, by_osqp])
def test_it_agrees_with_an_interior_point_method_and_with_osqp(oracle, family, n, rows, budget, seed):
    problem = program(family, n, rows, seed, budget)
    expected = [oracle(problem, row) for row in range(rows)]
    assume(all(answer is not None for answer in expected))
    solution = solve_box_qp(**problem.tensors(), **EXACT)
    assert solution.converged.all()
    x = solution.x.numpy()
    problem.assert_feasible(x)
    np.testing.assert_allclose(solution.objective, problem.objective(x), rtol=1e-6, atol=1e-9)
    for row in range(rows):
        assert_solves(problem, x, row, expected[row], family != "rank-deficient", atol=1e-4)


@pytest.mark.parametrize("budget", [False, True], ids=["box", "budget"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_solves_fifty_rows_of_two_hundred_unknowns(family, budget):
    problem = program(family, 200, 50, seed=1, budget=budget)
    solution = solve_box_qp(**problem.tensors())
    assert solution.converged.all() and (solution.kkt_residual <= 1e-6).all()
    x = solution.x.numpy()
    problem.assert_feasible(x)
    for row in (0, 49):
        assert_solves(problem, x, row, by_clarabel(problem, row), family != "rank-deficient", atol=1e-4)


@pytest.mark.parametrize("budget", [False, True], ids=["box", "budget"])
@pytest.mark.parametrize(("tolerance", "atol"), [(1e-6, 1e-4), (1e-3, 1e-2)], ids=["by way of float64", "in float32"])
def test_float32_operands_give_a_float32_solution(tolerance, atol, budget):
    problem = program("random", 60, 4, seed=2, budget=budget)
    solution = solve_box_qp(**problem.tensors(torch.float32), tolerance=tolerance)
    assert {solution.x.dtype, solution.objective.dtype, solution.kkt_residual.dtype} == {torch.float32}
    assert solution.converged.all()
    for row in range(4):
        assert_solves(problem, solution.x.double().numpy(), row, by_clarabel(problem, row), True, atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_certificate_is_the_fixed_point_residual_of_a_projected_gradient_step(family):
    problem = program(family, 40, 5, seed=3)
    solution = solve_box_qp(**problem.tensors(), max_iterations=7)
    unit, x = np.sqrt(problem.hessian.diagonal()), solution.x.numpy()
    gradient = (x @ problem.hessian - problem.linear) / unit
    stepped = np.clip(x * unit - gradient, problem.lower * unit, problem.upper * unit)
    terms = [np.linalg.norm(term / unit, axis=1) for term in (x @ problem.hessian, problem.linear)]
    size = np.minimum(np.maximum(*terms), np.linalg.norm((problem.upper - problem.lower) * unit, axis=1))
    residual = np.linalg.norm(x * unit - stepped, axis=1) / size
    np.testing.assert_allclose(solution.kkt_residual, residual, rtol=1e-6)


@pytest.mark.parametrize("budget", [False, True], ids=["box", "budget"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_warm_start_takes_fewer_iterations_and_the_solution_none(family, budget):
    problem = program(family, 60, 6, seed=4, budget=budget)
    cold = solve_box_qp(**problem.tensors())
    assert solve_box_qp(**problem.tensors(), start=cold.x, tolerance=1.1e-6).iterations == 0
    noise = torch.randn(cold.x.shape, generator=torch.Generator().manual_seed(0))
    warm = solve_box_qp(**problem.tensors(), start=cold.x + 1e-3 * cold.x.abs().mean(dim=0) * noise)
    assert warm.converged.all() and warm.iterations <= 2 / 3 * cold.iterations


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    budget=st.booleans(),
    iterations=st.integers(0, 12),
    seed=st.integers(0, 10**6),
)
def test_no_row_ends_worse_than_it_started(family, budget, iterations, seed):
    problem = program(family, 12, 5, seed, budget)
    # Feasible, and often near the best: the solution of a program like it.
    start = solve_box_qp(**problem.tensors() | {"linear": tensor(problem.linear) * 1.2}).x
    solution = solve_box_qp(**problem.tensors(), start=start, max_iterations=iterations, tolerance=1e-12)
    problem.assert_feasible(solution.x.numpy())
    before, after = problem.objective(start.numpy()), problem.objective(solution.x.numpy())
    assert (after <= before + 1e-9 * np.abs(before)).all()


@pytest.mark.parametrize("budget", [False, True], ids=["box", "budget"])
def test_it_says_that_three_iterations_were_not_enough(budget):
    problem = program("rank-deficient", 80, 6, seed=5, budget=budget)
    solution = solve_box_qp(**problem.tensors(), max_iterations=3)
    assert solution.iterations == 3
    assert not solution.converged.any() and (solution.kkt_residual > 1e-6).all()
    assert solve_box_qp(**problem.tensors()).converged.all()


def test_a_program_unbounded_below_does_not_converge():
    solution = solve_box_qp(torch.zeros(3, 3), torch.ones(1, 3), -torch.inf, torch.inf, max_iterations=50)
    assert solution.iterations == 50 and not solution.converged.any() and solution.x.isfinite().all()


def test_without_curvature_it_fills_the_cheapest_first():
    value, cost = torch.tensor([[3.0, 2.0, 1.0, -1.0]]), torch.tensor([1.0, 1.0, 2.0, 1.0])
    solution = solve_box_qp(torch.zeros(4, 4), value, 0.0, 1.0, budget=(cost, 3.0))
    torch.testing.assert_close(solution.x, torch.tensor([[1.0, 1.0, 0.5, 0.0]]), atol=1e-5, rtol=0)


def test_a_row_is_solved_as_it_would_be_alone_and_in_parts(monkeypatch):
    problem = program("random", 30, 7, seed=6, budget=True)
    together = solve_box_qp(**problem.tensors(), **EXACT)
    operands = problem.tensors()
    cost, limit = operands.pop("budget")
    for row in range(7):
        single = {name: value if name == "hessian" else value[[row]] for name, value in operands.items()}
        alone = solve_box_qp(**single, budget=(cost, limit[row]), **EXACT)
        torch.testing.assert_close(alone.x[0], together.x[row], atol=1e-7, rtol=0)
    monkeypatch.setattr(quadratic, "ROWS_AT_ONCE", 3)
    in_parts = solve_box_qp(**problem.tensors(), **EXACT)
    torch.testing.assert_close(in_parts.x, together.x, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear": torch.tensor([[1.0, torch.nan]])}, "NaN"),
        ({"hessian": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "positive semidefinite"),
        ({"lower": 2.0}, "lower bound above"),
        ({"budget": (torch.ones(2), -3.0)}, "budget"),
    ],
    ids=["NaN", "indefinite", "crossed bounds", "no budget left"],
)
def test_what_has_no_solution_is_refused(change, message):
    operands = {"hessian": torch.eye(2), "linear": torch.ones(1, 2) * 3, "lower": -1.0, "upper": 1.0}
    with pytest.raises(InputError, match=message):
        solve_box_qp(**operands | change)
