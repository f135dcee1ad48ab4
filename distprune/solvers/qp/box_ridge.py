"""Ridge regression that may not take any weight further than a given distance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distprune.solvers.qp.quadratic import QuadraticSolution, solve_box_qp
from distprune.solvers.ridge import ridge


def box_ridge(
    gram: Tensor, target: Tensor, weights: Tensor, radius: Tensor | float, damping: float
) -> QuadraticSolution:
    """argmin_W tr(W G Wᵀ) - 2 tr(W Cᵀ) + λ‖W - W₀‖² subject to |W - W₀| ≤ radius, λ = damping · mean(diag G).

    Refits the weights that pruning has left to what the whole layer gave; the box keeps a small calibration set from
    rewriting them. With an infinite radius it is ridge regression in closed form. All output channels are solved at
    once, in float64; none ends with a greater objective than its W₀ has.

    Args:
        gram: G, (kept, kept), the second moment of the kept inputs, any rank.
        target: C, (out, kept): E[y xᵀ], the whole layer's outputs with the kept inputs.
        weights: W₀, (out, kept).
        radius: ≥ 0, broadcastable to (out, kept): (kept,) is one for each input channel.
        damping: > 0, relative to the mean of the Gram matrix's diagonal.

    Returns:
        x is W, (out, kept), of the weights' dtype; the objective is the one above for each output channel.

    Raises:
        InputError: a negative radius.
        torch.linalg.LinAlgError: G is not positive semidefinite, or not finite.
    """
    dtype = weights.dtype
    gram, target, weights = gram.double(), target.double(), weights.double()
    radius = torch.as_tensor(radius, dtype=weights.dtype, device=weights.device)

    # In the change Δ = W - W₀ the objective is Δ(G + λI)Δᵀ - 2Δ(C - W₀G)ᵀ and a constant.
    residual = target - weights @ gram
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    unbounded = ridge(gram, residual.mT, damping).mT
    clipped = unbounded.clamp(-radius, radius)
    improves = (clipped * (clipped @ damped - 2 * residual)).sum(dim=1, keepdim=True) < 0
    change = solve_box_qp(damped, residual, -radius, radius, start=torch.where(improves, clipped, 0.0))

    constant = (weights * (weights @ gram - 2 * target)).sum(dim=1)
    return replace(
        change,
        x=(weights + change.x).to(dtype),
        objective=(constant + 2 * change.objective).to(dtype),
        kkt_residual=change.kkt_residual.to(dtype),
    )
