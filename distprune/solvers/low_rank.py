"""Truncated, scaled singular value decompositions."""

from __future__ import annotations

from torch import Tensor

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
