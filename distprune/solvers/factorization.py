"""Cholesky and symmetric eigendecompositions that fall back to float64 where float32 gives up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_float64_on_failure(solve: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """``solve(*operands)`` in the operands' dtype, or in float64 when that fails or gives a non-finite result.

    Raises:
        torch.linalg.LinAlgError: float64 failed too.
    """
    try:
        solution = solve(*operands)
        if torch.isfinite(solution).all():
            return solution
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    return solve(*(operand.double() for operand in operands)).to(operands[0].dtype)


def leading_eigenvectors(matrix: Tensor, count: int | None = None) -> Tensor:
    """Eigenvectors of symmetric ``matrix`` (..., n, n) by falling eigenvalue, as columns: (..., n, count).

    Each column's sign is fixed (its largest entry is positive), so that the result does not depend on the LAPACK.
    """

    def solve(matrix: Tensor) -> Tensor:
        return torch.linalg.eigh(matrix).eigenvectors

    vectors = in_float64_on_failure(solve, matrix)
    vectors = vectors[..., slice(None) if count is None else slice(vectors.shape[-1] - count, None)].flip(-1)
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    return vectors * vectors.gather(-2, largest).sign()
