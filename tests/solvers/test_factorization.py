"""Cholesky and eigendecompositions that fall back to float64, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distprune.solvers.factorization import in_float64_on_failure, leading_eigenvectors


def refuses(dtype: torch.dtype, failure: Exception | float):
    """Doubles its operand, except that in ``dtype`` it raises or returns ``failure``; and the dtypes it was given."""
    seen = []

    def solve(operand: torch.Tensor) -> torch.Tensor:
        seen.append(operand.dtype)
        if operand.dtype != dtype:
            return 2 * operand
        if isinstance(failure, Exception):
            raise failure
        return torch.full_like(operand, failure)

    return solve, seen


def test_a_solve_that_succeeds_is_done_once_in_the_operands_dtype():
    solve, seen = refuses(torch.float64, 0.0)
    assert in_float64_on_failure(solve, torch.ones(2)).tolist() == [2, 2]
    assert seen == [torch.float32]


@pytest.mark.parametrize("failure", [torch.linalg.LinAlgError("singular"), float("nan"), float("inf")], ids=repr)
def test_a_solve_that_fails_in_float32_is_done_again_in_float64(failure):
    solve, seen = refuses(torch.float32, failure)
    solution = in_float64_on_failure(solve, torch.ones(2))
    assert solution.dtype == torch.float32
    assert solution.tolist() == [2, 2]
    assert seen == [torch.float32, torch.float64]


def test_a_solve_that_fails_in_float64_too_raises():
    def solve(operand: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(operand)

    with pytest.raises(torch.linalg.LinAlgError):
        in_float64_on_failure(solve, -torch.eye(3))


def test_errors_of_another_kind_are_not_taken_for_a_failed_solve():
    solve, _ = refuses(torch.float32, KeyError("a mistake in the caller"))
    with pytest.raises(KeyError):
        in_float64_on_failure(solve, torch.ones(2))


@pytest.fixture
def symmetric() -> torch.Tensor:
    """Two symmetric matrices (2, 12, 12) with positive and negative eigenvalues."""
    matrix = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.mT


def test_leading_eigenvectors_are_orthonormal_and_ordered_by_falling_eigenvalue(symmetric):
    vectors = leading_eigenvectors(symmetric).double()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(12).double().expand(2, -1, -1), atol=1e-5, rtol=0)
    energies = (vectors.mT @ symmetric.double() @ vectors).numpy()
    expected = np.linalg.eigvalsh(symmetric.double().numpy())[:, ::-1]
    for energy, eigenvalues in zip(energies, expected, strict=True):
        np.testing.assert_allclose(energy, np.diag(eigenvalues), atol=1e-4)


def test_leading_eigenvectors_of_a_count_are_the_first_of_all(symmetric):
    assert torch.equal(leading_eigenvectors(symmetric, 5), leading_eigenvectors(symmetric)[..., :5])


def test_signs_of_eigenvectors_do_not_depend_on_the_lapack(symmetric, monkeypatch):
    vectors = leading_eigenvectors(symmetric)
    eigh = torch.linalg.eigh
    flips = torch.tensor([1, -1] * 6)

    def another_lapack(matrix: torch.Tensor):
        eigenvalues, eigenvectors = eigh(matrix)
        return torch.return_types.linalg_eigh((eigenvalues, eigenvectors * flips))

    monkeypatch.setattr(torch.linalg, "eigh", another_lapack)
    assert torch.equal(leading_eigenvectors(symmetric), vectors)
    assert (vectors.amax(dim=-2) == vectors.abs().amax(dim=-2)).all()
