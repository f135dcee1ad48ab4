"""Ridge regression and prediction correlation from moments, against numpy in float64 on the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distprune.solvers import prediction_correlation, ridge, ridge_towards


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def moments(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.T @ x / len(x), x.T @ y / len(x)


def normal_equations(gram: torch.Tensor, cross: torch.Tensor, damping: float) -> np.ndarray:
    gram = f64(gram)
    return np.linalg.solve(gram + damping * np.diag(gram).mean() * np.eye(len(gram)), f64(cross))


def conditioned(tokens: int, width: int, decades: float) -> torch.Tensor:
    """Inputs whose Gram matrix has eigenvalues over that many orders of magnitude."""
    basis = torch.linalg.qr(randn(width, width, seed=1)).Q
    return randn(tokens, width) * torch.logspace(0, -decades / 2, width) @ basis


@pytest.mark.parametrize("damping", [0.5, 1e-2])
@pytest.mark.parametrize("tokens", [200, 10], ids=["full-rank Gram", "rank-deficient Gram"])
def test_ridge_solves_the_damped_normal_equations(tokens, damping):
    gram, cross = moments(randn(tokens, 24), randn(tokens, 9, seed=1))
    expected = normal_equations(gram, cross, damping)
    np.testing.assert_allclose(f64(ridge(gram, cross, damping)), expected, rtol=1e-4, atol=1e-5)


def test_ridge_on_a_gram_matrix_of_condition_1e8_predicts_as_float64_does():
    x, y = conditioned(400, 24, decades=8), randn(400, 9, seed=2)
    gram, cross = moments(x, y)
    assert np.linalg.cond(f64(x.T) @ f64(x)) > 1e7
    predicted, expected = f64(x) @ f64(ridge(gram, cross, 1e-6)), f64(x) @ normal_equations(gram, cross, 1e-6)
    np.testing.assert_allclose(predicted, expected, atol=2e-3 * np.linalg.norm(expected, axis=0).max())


def test_ridge_turns_to_float64_where_float32_has_no_cholesky_factor():
    # Whole numbers and a power of two of samples: the Gram matrix is exact, and singular by its repeated columns.
    x = torch.randint(-3, 4, (64, 12), generator=torch.Generator().manual_seed(0)).float().repeat(1, 2)
    gram, cross = moments(x, randn(64, 9))
    cross[12:] = cross[:12]
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(24))
    solution = ridge(gram, cross, damping=1e-9)
    assert solution.dtype == torch.float32
    expected = normal_equations(gram, cross, 1e-9)
    np.testing.assert_allclose(f64(solution), expected, rtol=1e-4, atol=1e-5)


def test_ridge_on_inputs_that_are_always_zero_is_zero():
    solution = ridge(torch.zeros(5, 5), torch.zeros(5, 3), damping=0.5)
    assert torch.equal(solution, torch.zeros(5, 3))


def test_ridge_leaves_its_gram_matrix_as_it_was():
    gram, cross = moments(randn(50, 8), randn(50, 3, seed=1))
    before = gram.clone()
    ridge(gram, cross, damping=0.5)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("damping", [0.5, 1e-2])
@pytest.mark.parametrize("tokens", [200, 10], ids=["full-rank Gram", "rank-deficient Gram"])
def test_ridge_towards_weights_is_least_squares_with_rows_that_pull_there(tokens, damping):
    x, y, start = randn(tokens, 24), randn(tokens, 9, seed=1), randn(9, 24, seed=2)
    gram, cross = moments(x, y)
    pull = np.sqrt(tokens * damping * np.diag(f64(gram)).mean())
    rows, wanted = np.vstack([f64(x), pull * np.eye(24)]), np.vstack([f64(y), pull * f64(start).T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    found = ridge_towards(start, gram, cross.mT, damping)
    np.testing.assert_allclose(f64(found), expected, rtol=1e-4, atol=1e-4)


def test_ridge_towards_weights_that_fit_already_leaves_them():
    x, start = randn(200, 24), randn(9, 24, seed=2)
    gram, cross = moments(x, x @ start.mT)
    torch.testing.assert_close(ridge_towards(start, gram, cross.mT, 0.1), start, atol=1e-5, rtol=0)


def test_ridge_towards_weights_leaves_them_on_inputs_that_are_always_zero():
    start = randn(9, 24)
    assert torch.equal(ridge_towards(start, torch.zeros(24, 24), torch.zeros(9, 24), 0.1), start)


def correlation(solution: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return prediction_correlation(solution, *moments(x, y), x.mean(0), y.mean(0), y.square().mean(0))


def pearson(solution: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    prediction, y = f64(x) @ f64(solution), f64(y)
    return np.array([np.corrcoef(prediction[:, channel], y[:, channel])[0, 1] for channel in range(y.shape[1])])


@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["centred", "means of three deviations"])
def test_prediction_correlation_is_pearsons_on_the_samples(offset):
    x = randn(300, 12) + offset
    y = x @ randn(12, 20, seed=1) + 3 * randn(300, 20, seed=2) + offset
    # The ridge solution, and any other.
    for solution in (ridge(*moments(x, y), damping=0.1), randn(12, 20, seed=3)):
        np.testing.assert_allclose(f64(correlation(solution, x, y)), pearson(solution, x, y), atol=2e-4)


def test_prediction_correlation_is_one_for_a_linear_map_and_minus_one_for_its_opposite():
    # Many channels, so that rounding would put some of them above one.
    x, linear = randn(300, 12), randn(12, 200, seed=1)
    for sign in (1, -1):
        measured = correlation(sign * linear, x, x @ linear)
        torch.testing.assert_close(measured, torch.full((200,), float(sign)), atol=1e-5, rtol=0)
        assert (measured.abs() <= 1).all()


# Several values, because for some E[y²] - E[y]² happens to be zero in float32 without any care.
CONSTANTS = [0.0, 1.0, 3.7, -1234.5, 0.1, -0.7, 5.3, 1e-3]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_channel_that_never_varies_has_correlation_zero(constant):
    x, y = randn(300, 12), randn(300, 3, seed=1)
    y[:, 1] = constant
    solution = ridge(*moments(x, y), damping=0.1)
    measured, others = correlation(solution, x, y), [0, 2]
    assert measured[1] == 0
    np.testing.assert_allclose(f64(measured[others]), pearson(solution[:, others], x, y[:, others]), atol=2e-4)


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_prediction_that_never_varies_has_correlation_zero(constant):
    x, y = randn(300, 12), randn(300, 3, seed=1)
    x[:, 0] = constant
    solution = torch.zeros(12, 3)
    solution[0] = torch.tensor([1.0, -2.5, 0.3])
    assert correlation(solution, x, y).tolist() == [0, 0, 0]
