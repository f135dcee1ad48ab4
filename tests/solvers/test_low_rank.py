"""Scaled low-rank factors against numpy's float64 singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distprune.solvers import (
    factor_input_scaled,
    factor_output_scaled,
    leading_outputs,
    output_projections,
    subspace,
    truncation_errors,
)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


SHAPES = {"tall": (48, 32), "wide": (32, 48), "square": (32, 32)}


def decaying(out_features: int, in_features: int) -> torch.Tensor:
    """Singular values over six orders of magnitude."""
    inner = min(out_features, in_features)
    return randn(out_features, inner) * torch.logspace(0, -6, inner) @ randn(inner, in_features, seed=1)


WEIGHTS = {
    "random": randn,
    "rank 7": lambda out, inp: randn(out, 7) @ randn(7, inp, seed=1),
    "decaying": decaying,
    "zero": torch.zeros,
}

SCALES = {
    "equal": torch.ones,
    "spanning 1e4": lambda width: torch.logspace(-2, 2, width)[torch.randperm(width, generator=torch.manual_seed(0))],
    "some zero": lambda width: (torch.rand(width, generator=torch.manual_seed(0)) - 0.3).clamp(min=0),
    "one outlier": lambda width: torch.ones(width).index_fill(0, torch.tensor(5), 1e4),
}


def assert_near_optimal(scaled_weight: np.ndarray, scaled_error: np.ndarray, rank: int) -> None:
    """The error's norm is that of Eckart and Young's optimum, to 1e-5 of the whole."""
    optimum = np.linalg.norm(np.linalg.svd(scaled_weight, compute_uv=False)[rank:])
    assert np.linalg.norm(scaled_error) - optimum <= 1e-5 * np.linalg.norm(scaled_weight)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 20, 31])
def test_input_scaled_factors_are_as_near_as_any_of_their_rank(shape, weights, scales, rank):
    out_features, in_features = SHAPES[shape]
    weight, scale = WEIGHTS[weights](out_features, in_features), SCALES[scales](in_features)
    left, right = factor_input_scaled(weight, scale, rank)
    assert (left.shape, right.shape) == ((out_features, rank), (rank, in_features))
    assert left.dtype == right.dtype == torch.float32
    error = f64(weight) - f64(left) @ f64(right)
    assert_near_optimal(f64(weight) * f64(scale), error * f64(scale), rank)
    np.testing.assert_allclose(f64(left).T @ f64(left), np.eye(rank), atol=1e-5)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 20, 31])
def test_output_scaled_factors_are_as_near_as_any_of_their_rank(shape, weights, scales, rank):
    out_features, in_features = SHAPES[shape]
    weight, scale = WEIGHTS[weights](out_features, in_features), SCALES[scales](out_features)
    left, right = factor_output_scaled(weight, scale, rank)
    assert (left.shape, right.shape) == ((out_features, rank), (rank, in_features))
    error = f64(weight) - f64(left) @ f64(right)
    assert_near_optimal(f64(scale)[:, None] * f64(weight), f64(scale)[:, None] * error, rank)
    np.testing.assert_allclose(f64(right) @ f64(right).T, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize("factor", [factor_input_scaled, factor_output_scaled])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_weight(factor, shape):
    out_features, in_features = SHAPES[shape]
    weight = randn(out_features, in_features)
    scale = 0.5 + torch.rand(in_features if factor is factor_input_scaled else out_features)
    left, right = factor(weight, scale, min(out_features, in_features))
    torch.testing.assert_close(left @ right, weight, atol=1e-5, rtol=1e-5)


def test_the_scale_decides_which_channels_are_kept_near():
    """A test of the tests above: without its scale the factorization is another one."""
    weight, scale = randn(32, 48), SCALES["spanning 1e4"](48)
    plain, scaled = (
        np.linalg.norm((f64(weight) - f64(left @ right)) * f64(scale))
        for left, right in (factor_input_scaled(weight, torch.ones(48), 7), factor_input_scaled(weight, scale, 7))
    )
    assert scaled < 0.5 * plain


LARGE = {"normal": torch.ones, "outliers": lambda width: torch.ones(width).index_fill(0, torch.arange(4), 1e3)}


@pytest.mark.parametrize("rank", [1, 30, 204])
@pytest.mark.parametrize("scales", LARGE)
def test_a_few_of_many_singular_vectors_come_within_a_thousandth_of_the_least_error(scales, rank, monkeypatch):
    """On the slowest of spectra, that of normal entries; and all others need not be found."""
    monkeypatch.setattr(subspace, "decomposed", None)
    weight, scale = randn(1024, 1100), LARGE[scales](1100)
    left, right = factor_input_scaled(weight, scale, rank)
    np.testing.assert_allclose(f64(left).T @ f64(left), np.eye(rank), atol=1e-5)
    scaled = (weight * scale).double()
    optimum = torch.linalg.eigvalsh(scaled @ scaled.T)[: 1024 - rank].clamp(min=0).sum().sqrt()
    error = (weight.double() - left.double() @ right.double()) * scale.double()
    assert error.norm() <= 1.001 * optimum
    assert torch.equal(factor_input_scaled(weight, scale, rank)[0], left)


@pytest.mark.parametrize("weight", [torch.zeros(1024, 1024), randn(1024, 3) @ randn(3, 1024)], ids=["zero", "rank 3"])
def test_a_large_matrix_of_low_rank_is_reproduced(weight):
    left, right = factor_input_scaled(weight, torch.ones(1024), 8)
    np.testing.assert_allclose(f64(left).T @ f64(left), np.eye(8), atol=1e-5)
    torch.testing.assert_close(left @ right, weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_projections_truncate_best_in_the_metrics_of_inputs_and_outputs(shape):
    out, inputs = SHAPES[shape]
    weight, x, g = randn(out, inputs), randn(200, inputs, seed=1), randn(200, out, seed=2)
    x, g = x * torch.logspace(-1, 1, inputs), g * torch.logspace(-1, 1, out).flip(0)
    gram, metric = x.mT @ x / 200, g.mT @ g / 200
    root = torch.linalg.cholesky(metric.double())
    left, right, errors = output_projections(weight, gram, root)
    assert left.dtype == right.dtype == torch.float32 and errors.dtype == torch.float64
    singular = np.linalg.svd(f64(root).T @ f64(weight) @ np.linalg.cholesky(f64(gram)), compute_uv=False)
    expected = [(singular[rank:] ** 2).sum() for rank in range(out + 1)]
    for found in (errors, truncation_errors(weight, gram, root)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * expected[0])
    for rank in (0, 1, 7, 20, min(out, inputs)):
        change = f64(weight) - f64(left)[:, :rank] @ f64(right)[:rank] @ f64(weight)
        error = np.trace(f64(metric) @ change @ f64(gram) @ change.T)
        assert error == pytest.approx(expected[rank], rel=1e-4, abs=1e-6 * expected[0])


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_leading_outputs_truncate_best_on_the_inputs(shape):
    weight, inputs = randn(*shape), randn(200, shape[1], seed=1) * torch.logspace(-1, 1, shape[1])
    left = f64(leading_outputs(weight, inputs.mT @ inputs / 200, 7))
    np.testing.assert_allclose(left.T @ left, np.eye(7), atol=1e-5)
    outputs = f64(weight) @ f64(inputs).T
    vectors, values, _ = np.linalg.svd(outputs, full_matrices=False)
    for rank in (3, 7):
        kept = left[:, :rank]
        error = np.linalg.norm(outputs - kept @ (kept.T @ outputs)) ** 2
        assert error == pytest.approx((values[rank:] ** 2).sum(), rel=1e-4)
    assert abs(vectors[:, 0] @ left[:, 0]) == pytest.approx(1, abs=1e-4)
