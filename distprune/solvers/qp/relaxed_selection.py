"""Which units to keep, by a relaxation that sees how they act together."""

from __future__ import annotations

from torch import Tensor

from distprune.solvers.qp.quadratic import QuadraticSolution, solve_box_qp


def relaxed_selection(interaction: Tensor, cost: Tensor, budget: float) -> QuadraticSolution:
    """argmin_m ½(1-m)ᵀQ(1-m) subject to 0 ≤ m ≤ 1 and costᵀm ≤ budget: how much of every unit to keep.

    The units to keep are those of the largest m. Units that cancel each other can go together at no cost, and units
    that add up are missed more together than apart; scores taken one at a time see neither.

    Args:
        interaction: Q, (units, units), positive semidefinite; Q_uv = E⟨c_u, c_v⟩, c_u what unit u adds to the output.
        cost: (units,), what it costs to keep each, in the budget's unit; ≥ 0.
        budget: ≥ 0.

    Returns:
        x is m, (1, units).

    Raises:
        InputError: the budget is negative, or Q is not positive semidefinite.
    """
    everything = interaction.sum(dim=1)[None]
    return solve_box_qp(interaction, everything, 0.0, 1.0, budget=(cost, budget))
