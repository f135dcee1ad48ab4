"""Outlier-weighted layer sparsities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distprune.budgets import outlier_ratio, outlier_weighted
from distprune.budgets.filling import share_out


def test_the_ratio_counts_the_entries_far_above_the_mean_of_the_layer():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(9, 7, generator=generator).abs() ** 3, torch.randn(4, 5, generator=generator).abs()]
    entries = np.concatenate([matrix.double().numpy().ravel() for matrix in matrices])
    expected = (entries > 2 * entries.mean()).mean()
    assert 0 < expected < 1
    assert outlier_ratio(matrices, multiple=2.0).item() == pytest.approx(expected)


def test_a_layer_with_more_outliers_loses_less_and_the_mean_stays():
    sparsities = outlier_weighted(0.3, torch.tensor([0.01, 0.05, 0.02, 0.04]), span=0.1)
    assert sparsities.mean().item() == pytest.approx(0.3)
    assert sparsities.argsort().tolist() == [1, 3, 2, 0]
    assert (sparsities - 0.3).abs().max().item() == pytest.approx(0.1)


@pytest.mark.parametrize("sparsity", [0.02, 0.97])
def test_no_layer_is_asked_for_less_than_nothing_or_more_than_all(sparsity):
    sparsities = outlier_weighted(sparsity, torch.tensor([0.0, 0.3, 0.1]), span=0.2)
    assert sparsities.min() >= 0 and sparsities.max() <= 1
    assert sparsities.mean().item() == pytest.approx(sparsity)


def test_equal_layers_lose_the_same():
    assert outlier_weighted(0.3, torch.full((4,), 0.02), span=0.1).tolist() == [0.3] * 4


@pytest.mark.parametrize(
    ("total", "wanted", "most", "expected"),
    [
        (12, [1.0, 1.0, 1.0], 10, [4, 4, 4]),
        (12, [1.0, 2.0, 3.0], 10, [2, 4, 6]),
        (20, [1.0, 1.0, 8.0], 10, [5, 5, 10]),  # the third is capped and the others share what it can't take
        (4, [1.0, 1.0, 98.0], 10, [1, 1, 2]),  # none goes below one
        (99, [1.0, 2.0], 10, [10, 10]),
    ],
)
def test_shares_are_in_proportion_within_their_bounds(total, wanted, most, expected):
    count = len(wanted)
    assert share_out(total, wanted, [most] * count, [1.0] * count) == expected
