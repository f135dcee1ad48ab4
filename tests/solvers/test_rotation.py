"""Rotations of value neurons, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distprune.solvers import orthogonal_output_rotation, output_aware_rotation, uncorrelated_rotation
from distprune.solvers.rotation import LEAST_EIGENVALUE

GROUPS, HEADS, HIDDEN, WIDTH = 3, 2, 20, 6


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def assert_orthogonal(rotations: torch.Tensor) -> None:
    for rotation in f64(rotations):
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(WIDTH), atol=1e-6)


def assert_diagonal_with(matrix: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(matrix, np.diag(expected), atol=1e-5 * expected.max())


def test_values_are_uncorrelated_after_their_rotation_and_ordered_by_energy():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(GROUPS, WIDTH, WIDTH, generator=generator)
    values = torch.randn(GROUPS, 100, WIDTH, generator=generator) @ mixed
    rotation = uncorrelated_rotation(values.mT @ values / 100)
    assert_orthogonal(rotation)
    for group, rotated in enumerate(f64(values) @ f64(rotation)):
        singular = np.linalg.svd(f64(values)[group], compute_uv=False)
        assert_diagonal_with(rotated.T @ rotated, singular**2)


def test_output_columns_are_orthogonal_after_their_rotation_and_ordered_by_energy():
    """The columns of all query heads of a group as one, their rows scaled by the output's rms."""
    generator = torch.Generator().manual_seed(0)
    slices = torch.randn(GROUPS, HEADS, HIDDEN, WIDTH, generator=generator)
    rms = torch.logspace(-1, 1, HIDDEN)
    rotation = orthogonal_output_rotation(slices, rms)
    assert_orthogonal(rotation)
    for group in range(GROUPS):
        stacked = np.concatenate([f64(rms)[:, None] * f64(head) for head in slices[group]])
        rotated = stacked @ f64(rotation)[group]
        assert_diagonal_with(rotated.T @ rotated, np.linalg.svd(stacked, compute_uv=False) ** 2)


# ------------------------------------------------------------------ aware of values and output


def slices_and_gram(tokens: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Output slices, already in a metric of unlike scales, and the second moment of correlated values."""
    generator = torch.Generator().manual_seed(0)
    metric = torch.randn(HIDDEN, HIDDEN, generator=generator) * torch.logspace(-1, 1, HIDDEN)
    slices = metric @ torch.randn(GROUPS, HEADS, HIDDEN, WIDTH, generator=generator)
    mixed = torch.randn(GROUPS, WIDTH, WIDTH, generator=generator) * torch.logspace(-1, 0.5, WIDTH)
    values = torch.randn(GROUPS, tokens, WIDTH, generator=generator) @ mixed
    return slices, values.mT @ values / tokens


def least_error(stacked: np.ndarray, gram: np.ndarray, basis: np.ndarray) -> float:
    """min over B of tr(ΔHΔᵀ), Δ = W - B Qᵀ with Q the ``basis``: by the normal equations."""
    if not basis.shape[1]:
        return np.trace(stacked @ gram @ stacked.T)
    within = np.linalg.solve(basis.T @ gram @ basis, basis.T @ gram @ stacked.T).T
    change = stacked - within @ basis.T
    return np.trace(change @ gram @ change.T)


def test_the_errors_of_an_output_aware_rotation_are_those_of_eckart_and_young():
    slices, gram = slices_and_gram()
    rotation, errors = output_aware_rotation(slices, gram)
    assert_orthogonal(rotation)
    assert rotation.dtype == slices.dtype and errors.dtype == torch.float64
    for group in range(GROUPS):
        stacked = f64(slices[group].flatten(0, 1))
        power = np.linalg.svd(stacked @ np.linalg.cholesky(f64(gram[group])), compute_uv=False) ** 2
        expected = [power[kept:].sum() for kept in range(WIDTH + 1)]
        np.testing.assert_allclose(errors[group], expected, rtol=1e-4, atol=1e-5 * expected[0])
        assert (errors[group].diff() <= 0).all() and errors[group, -1] == 0


def test_the_first_directions_attain_these_errors_and_no_others_do_better():
    slices, gram = slices_and_gram()
    rotation, errors = output_aware_rotation(slices, gram)
    random = np.random.default_rng(0)
    for group in range(GROUPS):
        stacked, seen = f64(slices[group].flatten(0, 1)), f64(gram[group])
        powers, axes = np.linalg.eigh(seen)
        seen = (axes * powers.clip(min=LEAST_EIGENVALUE * np.diag(seen).mean())) @ axes.T
        for kept in range(WIDTH):
            attained = least_error(stacked, seen, f64(rotation[group])[:, :kept])
            assert attained == pytest.approx(errors[group, kept].item(), rel=1e-4)
            for _ in range(20 if kept else 0):
                # Near the best directions and far from them.
                noise = random.standard_normal((WIDTH, kept)) * 10 ** random.uniform(-2, 1)
                other = np.linalg.qr(f64(rotation[group])[:, :kept] + noise).Q
                assert least_error(stacked, seen, other) >= attained * (1 - 1e-7)


def test_second_moments_that_float32_sums_left_indefinite_are_taken():
    """As those of tokens that are all the same, whose least eigenvalues are rounding."""
    slices, _ = slices_and_gram()
    one = torch.randn(GROUPS, WIDTH, generator=torch.Generator().manual_seed(1))
    gram = one[:, :, None] * one[:, None] - 1e-5 * torch.eye(WIDTH)
    assert (torch.linalg.eigvalsh(gram.double())[:, 0] < -1e-6 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)).all()
    rotation, errors = output_aware_rotation(slices, gram)
    assert_orthogonal(rotation)
    expected = torch.stack([(part.flatten(0, 1) @ seen).square().sum() for part, seen in zip(slices, one, strict=True)])
    torch.testing.assert_close(errors[:, 0].float(), expected, rtol=1e-3, atol=0)
    assert (errors[:, 1:] < 1e-4 * errors[:, :1]).all()


def test_values_that_span_less_than_their_width_cost_nothing_beyond_their_span():
    slices, gram = slices_and_gram(tokens=4)
    rotation, errors = output_aware_rotation(slices, gram)
    assert_orthogonal(rotation)
    assert (errors[:, 4] < 1e-4 * errors[:, 0]).all()


def test_values_that_are_always_zero_have_a_rotation_too():
    slices, gram = slices_and_gram()
    gram[1] = 0
    rotation, errors = output_aware_rotation(slices, gram)
    assert_orthogonal(rotation)
    assert errors.isfinite().all()
