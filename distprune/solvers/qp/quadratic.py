"""Convex quadratic programs in a box, with at most one budget: many right-hand sides, one Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.errors import InputError
from distprune.solvers.expected import rows_where, until_converged
from distprune.solvers.qp.anderson import AndersonAcceleration
from distprune.solvers.qp.budgeted_box import BudgetedBox

# Measured on the Gram matrices of language models and on random ones of condition 10 to 1e6; a Hessian of unit
# diagonal makes the penalty a pure number, and the acceleration makes it matter little.
PENALTY = 0.2
RELAXATION = 1.6
MEMORY = 5
#: What a program takes that chooses units of a language model, of at most ``max_iterations``.
EXPECTED_ITERATIONS = 100
CHECK_EVERY = 10
ROWS_AT_ONCE = 1024  # bounds the acceleration's memory: 2 · MEMORY · ROWS_AT_ONCE · n numbers


@dataclass(frozen=True)
class QuadraticSolution:
    """Solutions of many quadratic programs, and what is known of them.

    Attributes:
        x: (rows, n), within the bounds; within the budget to rounding.
        objective: (rows,), ½xᵀHx - bᵀx, or what the function that gave the solution says.
        kkt_residual: (rows,), ‖x - Π(x - ∇f(x))‖ in coordinates in which H has a unit diagonal, Π the projection onto
            the feasible set (so a budget's multiplier is in it); relative to the larger of ‖Hx‖ and ‖b‖, or to the
            box's diameter where that is less. Zero at a solution, and nowhere else.
        iterations: of the row that took the most. Each is one solve with the factored Hessian.
        converged: (rows,) bool, kkt_residual ≤ tolerance.
    """

    x: Tensor
    objective: Tensor
    kkt_residual: Tensor
    iterations: int
    converged: Tensor


def solve_box_qp(
    hessian: Tensor,
    linear: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    *,
    budget: tuple[Tensor, Tensor | float] | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 2000,
) -> QuadraticSolution:
    """min ½xᵀHx - bᵀx subject to lower ≤ x ≤ upper and, with a budget, costᵀx ≤ limit; for every row b at once.

    Douglas-Rachford splitting (ADMM, the iteration of OSQP) in Jacobi-scaled coordinates: one Cholesky factorization
    of H + ρI serves all rows and iterations, each row is accelerated by itself (Anderson), and a row that has
    converged leaves the batch. No row ends with a greater objective than its projected start has.

    Works in the operands' precision where that can reach the tolerance (float32: 1.2e-4 and above), in float64
    elsewhere; results are of the operands' dtype, on their device.

    Args:
        hessian: H, (n, n), symmetric positive semidefinite.
        linear: b, (rows, n).
        lower, upper: broadcastable to (rows, n), may be infinite.
        budget: cost (n,), of any sign, and limit, a number or (rows,).
        start: (rows, n), any point; zero unless given. A start near the solution saves iterations.
        tolerance: on the relative ``kkt_residual``.
        max_iterations: after which the best point so far is returned, ``converged`` false.

    Raises:
        InputError: a non-finite number, crossed bounds, a budget below what the bounds allow, or an H that is not
            positive semidefinite.
    """
    reachable = 1e3 * torch.finfo(linear.dtype).eps <= tolerance
    dtype = linear.dtype if reachable else torch.float64
    lower, upper = (
        torch.as_tensor(bound, dtype=linear.dtype, device=linear.device).expand_as(linear) for bound in (lower, upper)
    )
    scale, program = _in_unit_diagonal_coordinates(hessian, linear, lower, upper, budget, dtype)

    if starts_anywhere := start is None:
        start = torch.zeros_like(linear)
    begin = program.feasible.project(start.to(dtype) / scale)
    x, iterations = begin.clone(), 0
    # A start is mostly given that is the solution, unless a bound is in its way.
    unsolved = rows_where(program.kkt_residual(begin) > tolerance, expected=len(linear) if starts_anywhere else 0)
    if len(unsolved):
        factor = _factor(program.hessian)
        for rows in unsolved.split(ROWS_AT_ONCE):
            x[rows], taken = _split(program.rows(rows), factor, begin[rows], tolerance, max_iterations)
            iterations = max(iterations, taken)
    # f(x) - f(begin), without the cancellation.
    change = ((x - begin) * (program.gradient(x) + program.gradient(begin))).sum(dim=1) / 2
    x = torch.where((change > 0)[:, None], begin, x)

    residual = program.kkt_residual(x)
    return QuadraticSolution(
        x=(x * scale).to(linear.dtype).clamp(lower, upper),
        objective=program.objective(x).to(linear.dtype),
        kkt_residual=residual.to(linear.dtype),
        iterations=iterations,
        converged=residual <= tolerance,
    )


@dataclass(frozen=True)
class _Program:
    """min ½xᵀHx - bᵀx over a feasible set, row by row; H (n, n), b (rows, n)."""

    hessian: Tensor
    linear: Tensor
    feasible: BudgetedBox

    def rows(self, index: Tensor) -> _Program:
        return _Program(self.hessian, self.linear[index], self.feasible.rows(index))

    def gradient(self, x: Tensor) -> Tensor:
        return x @ self.hessian - self.linear

    def objective(self, x: Tensor) -> Tensor:
        return (x * (self.gradient(x) - self.linear)).sum(dim=1) / 2

    def kkt_residual(self, x: Tensor) -> Tensor:
        """As in QuadraticSolution, (rows,)."""
        gradient = self.gradient(x)
        step = self.feasible.seen_from(x).project(-gradient).norm(dim=1)
        terms = torch.maximum((gradient + self.linear).norm(dim=1), self.linear.norm(dim=1))
        size = torch.minimum(terms, (self.feasible.upper - self.feasible.lower).norm(dim=1))
        return torch.where(step > 0, step / size, 0.0)


def _in_unit_diagonal_coordinates(
    hessian: Tensor,
    linear: Tensor,
    lower: Tensor,
    upper: Tensor,
    budget: tuple[Tensor, Tensor | float] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, _Program]:
    """The scale (n,) and the program for x / scale; a coordinate without curvature stays as it is."""
    hessian, linear, lower, upper = (operand.to(dtype) for operand in (hessian, linear, lower, upper))
    if not (hessian.isfinite().all() and linear.isfinite().all()):
        raise InputError("A quadratic program has a NaN or an infinity in its Hessian or its linear term.")
    if not (lower <= upper).all():
        raise InputError("A quadratic program has a lower bound above its upper bound, or one that is NaN.")
    cost, limit = (torch.zeros_like(linear[0]), torch.inf) if budget is None else budget
    cost = cost.to(dtype)
    limit = torch.as_tensor(limit, dtype=dtype, device=linear.device).expand(len(linear))
    cheapest = torch.where(cost > 0, lower, torch.where(cost < 0, upper, 0.0)) @ cost
    if not (cheapest <= limit).all():
        raise InputError("A quadratic program's budget is below the cheapest point that its bounds allow: raise it.")

    curvature = hessian.diagonal()
    scale = torch.where(curvature > 0, curvature.rsqrt(), 1.0)
    feasible = BudgetedBox(lower / scale, upper / scale, cost * scale, limit, budget is not None)
    return scale, _Program(scale[:, None] * hessian * scale, linear * scale, feasible)


def _factor(hessian: Tensor) -> Tensor:
    """The Cholesky factor of H + PENALTY · I."""
    damped = hessian.clone()
    damped.diagonal().add_(PENALTY)
    try:
        return torch.linalg.cholesky(damped)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        message = "A quadratic program's Hessian is not positive semidefinite: add to its diagonal."
        raise InputError(message) from error


def _split(
    program: _Program, factor: Tensor, start: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """The point of least KKT residual that the splitting comes by, (rows, n), and the iterations it took.

    With Π the projection and y = point - Π(point) the multiplier over ρ, one step of the splitting is
    z = Π(point), x = (H + ρI)⁻¹(b + ρ(z - y)), point ← point + RELAXATION · (x - z).
    """
    best, residual = start.clone(), program.kkt_residual(start)
    rows = torch.arange(len(start), device=start.device)
    # The multiplier that would make the start a solution: a warm start needs no other.
    iterates = AndersonAcceleration(start - program.gradient(start) / PENALTY, MEMORY)
    for iteration in until_converged(max_iterations, EXPECTED_ITERATIONS, CHECK_EVERY, start):
        z = program.feasible.project(iterates.point)
        target = program.linear + PENALTY * (2 * z - iterates.point)
        x = torch.cholesky_solve(target.mT, factor).mT
        iterates.step(iterates.point + RELAXATION * (x - z))
        if iteration % CHECK_EVERY == 0 or iteration == max_iterations:
            found = program.kkt_residual(z)
            better = found < residual[rows]
            best[rows[better]], residual[rows[better]] = z[better], found[better]
            unsolved = residual[rows] > tolerance
            if not unsolved.any():
                return best, iteration
            if not unsolved.all():
                rows, program = rows[unsolved], program.rows(unsolved)
                iterates.keep(unsolved)
    return best, max_iterations
