"""The Euclidean projection onto a box cut by a half-space, exact, for many points at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.solvers.expected import rows_where


@dataclass(frozen=True)
class BudgetedBox:
    """Row r's set is {x: lower_r ≤ x ≤ upper_r, costᵀx ≤ limit_r}, not empty; a limit of ∞ is no budget.

    Attributes:
        lower, upper: (rows, n), may be infinite.
        cost: (n,), of any sign.
        limit: (rows,).
        is_cut: False where no row has a budget.
    """

    lower: Tensor
    upper: Tensor
    cost: Tensor
    limit: Tensor
    is_cut: bool = True

    def rows(self, index: Tensor) -> BudgetedBox:
        return BudgetedBox(self.lower[index], self.upper[index], self.cost, self.limit[index], self.is_cut)

    def seen_from(self, points: Tensor) -> BudgetedBox:
        """The sets of the steps that lead from these points to the rows' sets."""
        return BudgetedBox(
            self.lower - points, self.upper - points, self.cost, self.limit - points @ self.cost, self.is_cut
        )

    def project(self, points: Tensor) -> Tensor:
        """The nearest point of each row's set, (rows, n)."""
        nearest = points.clamp(self.lower, self.upper)
        if not self.is_cut:
            return nearest
        over = rows_where(nearest @ self.cost > self.limit, expected=len(points))
        if len(over):
            nearest[over] = self.rows(over)._project_to_the_limit(points[over])
        return nearest

    def _project_to_the_limit(self, points: Tensor) -> Tensor:
        """clip(v - μ cost) with the multiplier μ ≥ 0 at which the cost comes down to the limit.

        The cost falls with μ, piecewise linearly: coordinate i moves between the two values of μ at which it leaves
        one bound and meets the other. A binary search over these knots finds the piece, which is then solved.
        """
        bounds_met = torch.stack([(points - self.upper) / self.cost, (points - self.lower) / self.cost])
        bounds_met = torch.where(self.cost != 0, bounds_met, 0.0)
        leaves, meets = bounds_met.amin(0), bounds_met.amax(0)
        knots = torch.cat([leaves, meets, torch.zeros_like(points[:, :1])], dim=1)
        knots = torch.where(knots.isfinite(), knots, 0.0).clamp(min=0).sort(dim=1).values

        def clipped(multiplier: Tensor) -> Tensor:
            return (points - multiplier * self.cost).clamp(self.lower, self.upper)

        def excess(multiplier: Tensor) -> Tensor:
            return (clipped(multiplier) @ self.cost - self.limit)[:, None]

        # Knot `low` is over the limit, or is the first of all, which is 0; knot `high` is not, or is none.
        low = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
        high = torch.full_like(low, knots.shape[1])
        for _ in range(math.ceil(math.log2(knots.shape[1]))):
            middle = (low + high) // 2
            over = excess(knots.gather(1, middle)) > 0
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)

        knot = knots.gather(1, low)
        moving = (leaves <= knot) & (knot < meets)
        slope = (moving * self.cost.square()).sum(dim=1, keepdim=True)
        return clipped(knot + torch.where(slope > 0, excess(knot) / slope, 0.0))
