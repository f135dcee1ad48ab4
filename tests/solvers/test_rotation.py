"""Rotations of value neurons, against numpy in float64."""

from __future__ import annotations

import numpy as np
import torch

from distprune.solvers import orthogonal_output_rotation, uncorrelated_rotation

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
