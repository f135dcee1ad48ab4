"""Ridge regression from second moments, and how well it explains each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.solvers.factorization import in_float64_on_failure

# A variance below this fraction of the second moment is what float32 sums give a channel that never varies.
ROUNDING = 1e-5


def ridge(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """argmin_B E‖y - xB‖² + λ‖B‖² with λ = damping · mean(diag E[xᵀx]), (in, out).

    Args:
        gram: E[xᵀx], (in, in), symmetric positive semidefinite, any rank.
        cross: E[xᵀy], (in, out).
        damping: > 0, relative to the mean of the Gram matrix's diagonal.
    """
    scale = gram.diagonal().mean()
    if scale <= 0:
        return torch.zeros_like(cross)

    def solve(gram: Tensor, cross: Tensor) -> Tensor:
        damped = gram.clone()
        damped.diagonal().add_(damping * scale)
        return torch.cholesky_solve(cross, torch.linalg.cholesky(damped, out=damped))

    return in_float64_on_failure(solve, gram, cross)


def ridge_towards(start: Tensor, gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """argmin_W E‖y - x Wᵀ‖² + λ‖W - W₀‖² with λ as in :func:`ridge`, (out, in).

    Args:
        start: W₀, (out, in).
        gram: E[xᵀx], (in, in), as there.
        cross: E[yᵀx], (out, in).
        damping: as there.
    """
    return start + ridge(gram, (cross - start @ gram).mT, damping).mT


def prediction_correlation(
    solution: Tensor,
    gram: Tensor,
    cross: Tensor,
    input_mean: Tensor,
    output_mean: Tensor,
    output_power: Tensor,
) -> Tensor:
    """Pearson's correlation between the prediction xB and y for every output channel, (out,), from moments alone.

    It is zero where the prediction or y does not vary.

    Args:
        solution: B, (in, out).
        gram: E[xᵀx], (in, in).
        cross: E[xᵀy], (in, out).
        input_mean: E[x], (in,).
        output_mean: E[y], (out,).
        output_power: E[y²], (out,).
    """
    prediction_mean = input_mean @ solution
    covariance = (solution * cross).sum(dim=0) - prediction_mean * output_mean
    prediction_variance = _variance((solution * (gram @ solution)).sum(dim=0), prediction_mean)
    spread = prediction_variance.sqrt() * _variance(output_power, output_mean).sqrt()
    return torch.where(spread > 0, covariance / spread, 0.0).clamp(-1, 1)


def _variance(power: Tensor, mean: Tensor) -> Tensor:
    """E[v²] - E[v]², and zero where float32 sums leave nothing but rounding of it."""
    variance = power - mean.square()
    return torch.where(variance > ROUNDING * power, variance, 0.0)
