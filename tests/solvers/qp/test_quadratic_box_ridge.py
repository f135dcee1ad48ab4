"""Ridge regression in a box, against numpy and bounded-variable least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from distprune.errors import InputError
from distprune.solvers import box_ridge


def refit(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second moments of 24 inputs of unlike scale, their cross moments with 6 outputs, and weights; float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 24, generator=generator) * torch.logspace(-1, 1, 24)
    y = torch.randn(tokens, 6, generator=generator) + x @ torch.randn(24, 6, generator=generator)
    return x.T @ x / tokens, y.T @ x / tokens, torch.randn(6, 24, generator=generator)


def refit_objective(x: np.ndarray, gram: np.ndarray, target: np.ndarray, weights: np.ndarray, damping: float):
    penalty = damping * gram.diagonal().mean() * np.square(x - weights).sum(axis=1)
    return np.diag(x @ gram @ x.T) - 2 * np.diag(x @ target.T) + penalty


@pytest.mark.parametrize("tokens", [200, 10], ids=["full rank", "rank-deficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_box_ridge_of_infinite_radius_is_ridge_regression(tokens, dtype):
    operands = [operand.to(dtype) for operand in refit(tokens)]
    gram, target, weights = (operand.double().numpy() for operand in operands)
    solution = box_ridge(*operands, radius=torch.inf, damping=0.01)
    ridge = 0.01 * gram.diagonal().mean()
    expected = np.linalg.solve(gram + ridge * np.eye(24), (target + ridge * weights).T).T
    assert solution.x.dtype == dtype and solution.iterations == 0 and solution.converged.all()
    np.testing.assert_allclose(solution.x, expected, atol=1e-4)


@pytest.mark.parametrize("tokens", [200, 10], ids=["full rank", "rank-deficient"])
def test_box_ridge_agrees_with_bounded_least_squares(tokens):
    operands = [operand.double() for operand in refit(tokens)]
    gram, target, weights = (operand.numpy() for operand in operands)
    radius = np.linspace(0.1, 1.0, 24)
    solution = box_ridge(*operands, radius=torch.as_tensor(radius), damping=0.01)
    assert solution.converged.all()
    x, ridge = solution.x.numpy(), 0.01 * gram.diagonal().mean()
    # As least squares in the change: its normal equations are (G + λI) Δ = C - W₀G.
    root = np.linalg.cholesky(gram + ridge * np.eye(24)).T
    for row, pull in enumerate(target - weights @ gram):
        change = lsq_linear(root, np.linalg.solve(root.T, pull), (-radius, radius), method="bvls", tol=1e-14).x
        np.testing.assert_allclose(x[row] - weights[row], change, atol=1e-4)
    np.testing.assert_allclose(solution.objective, refit_objective(x, gram, target, weights, 0.01), rtol=1e-9)


def test_box_ridge_stays_within_each_input_channels_radius_and_uses_it():
    gram, target, weights = refit(100)
    radius = torch.linspace(0.0, 1.0, 24)
    change = (box_ridge(gram, target, weights, radius, damping=0.01).x - weights).abs()
    assert (change <= radius + 1e-6).all()
    assert (change[:, 1:] > radius[1:] - 1e-6).any(dim=0).any() and (change[:, 0] == 0).all()


def test_box_ridge_leaves_weights_that_are_right_already():
    gram, _, weights = refit(100)
    solution = box_ridge(gram, weights @ gram, weights, radius=0.5, damping=0.01)
    torch.testing.assert_close(solution.x, weights, atol=1e-5, rtol=0)


def test_box_ridge_refuses_a_negative_radius():
    with pytest.raises(InputError, match="lower bound above"):
        box_ridge(*refit(100), radius=-1.0, damping=0.01)
