"""Truncated, scaled singular value decompositions."""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.solvers.factorization import leading_eigenvectors
from distprune.solvers.subspace import leading_left_vectors


def factor_input_scaled(weight: Tensor, input_scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-``rank`` factors L R that minimize ‖(W - L R) diag(input_scale)‖.

    With M = W diag(s) = U Σ Vᵀ the minimizer is U_r U_rᵀ W: U_r holds the leading left singular vectors, and since the
    projection acts on the left, the scaling need not be undone (so channels of zero scale do no harm). Where the rank
    is a small part of a large matrix's, the error may exceed the least by 0.1%.

    Args:
        weight: W, (out, in).
        input_scale: (in,), root mean square of the inputs.

    Returns:
        left (out, rank), with orthonormal columns, and right (rank, in).
    """
    left = leading_left_vectors(weight * input_scale, rank).to(weight.dtype)
    return left, left.mT @ weight


def factor_output_scaled(weight: Tensor, output_scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-``rank`` factors L R that minimize ‖diag(output_scale) (W - L R)‖; the mirror of the above.

    Args:
        weight: W, (out, in).
        output_scale: (out,), the weight of each output channel.

    Returns:
        left (out, rank) and right (rank, in), with orthonormal rows.
    """
    right, left = factor_input_scaled(weight.mT, output_scale, rank)
    return left.mT, right.mT


def leading_outputs(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The L, (out, rank) with orthonormal columns by falling worth, for which L Lᵀ W truncates W best.

    With H = E[xᵀx] = X Xᵀ, L holds the leading left singular vectors of W X, so that no W' of the rank has a smaller
    error tr(ΔW H ΔWᵀ), and fewer columns are best for fewer.

    Args:
        weight: W, (out, in).
        gram: H, (in, in), positive semidefinite.
    """
    weight = weight.double()
    return leading_eigenvectors(weight @ gram.double() @ weight.mT, rank).float()


def output_projections(weight: Tensor, gram: Tensor, metric_root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projections of the outputs on subspaces that truncate W best where both inputs and outputs have a metric.

    With H = E[xᵀx] = X Xᵀ, C = R Rᵀ and Rᵀ W X = U Σ Vᵀ, the W' of rank r that minimizes tr(C ΔW H ΔWᵀ) is L_r M_r W
    for L_r = R⁻ᵀ U_r and M_r = U_rᵀ Rᵀ: the output is projected, obliquely. The subspaces are nested, so that one pair
    of factors holds the best for every rank.

    Args:
        weight: W, (out, in).
        gram: H, (in, in), positive semidefinite.
        metric_root: R, (out, out) in float64, lower triangular with a positive diagonal.

    Returns:
        left L (out, out) and right M (out, out), in float32, of which a rank r takes the first r columns and rows; and
        the error tr(C ΔW H ΔWᵀ) at every rank, (out + 1,) in float64, falling.
    """
    seen = seen_in_metrics(weight, gram, metric_root)
    vectors = leading_eigenvectors(seen)
    energies = (vectors * (seen @ vectors)).sum(dim=0)
    left = torch.linalg.solve_triangular(metric_root.mT, vectors, upper=True)
    return left.float(), (vectors.mT @ metric_root.mT).float(), errors_by_rank(energies)


def truncation_errors(weight: Tensor, gram: Tensor, metric_root: Tensor) -> Tensor:
    """The error at every rank that :func:`output_projections` gives, from eigenvalues alone, which come much sooner."""
    return errors_by_rank(torch.linalg.eigvalsh(seen_in_metrics(weight, gram, metric_root)).flip(0))


def seen_in_metrics(weight: Tensor, gram: Tensor, metric_root: Tensor) -> Tensor:
    """Rᵀ W H Wᵀ R, (out, out) in float64, whose eigenvalues are the squares of the singular values of Rᵀ W X."""
    seen = metric_root.mT @ weight.double()
    return seen @ gram.double() @ seen.mT


def errors_by_rank(energies: Tensor) -> Tensor:
    """What is lost by keeping the first 0, 1... of falling energies, (n + 1,)."""
    energies = energies.clamp(min=0)
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
