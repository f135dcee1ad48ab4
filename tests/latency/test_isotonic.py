"""Regressions that rise along axes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, minimize

from distprune.latency import monotone


def test_the_nearest_rising_sequence_is_found():
    values = np.random.default_rng(0).random(6)
    rises = LinearConstraint(np.eye(6)[1:] - np.eye(6)[:-1], lb=0)
    nearest = minimize(lambda x: ((x - values) ** 2).sum(), np.sort(values), constraints=[rises], method="SLSQP")
    assert monotone(values, [0]) == pytest.approx(nearest.x, abs=1e-4)


def test_what_rises_stays():
    values = np.add.outer(np.arange(3.0), np.arange(4.0))
    assert np.array_equal(monotone(values, [0, 1]), values)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_a_regression_along_one_axis_leaves_the_others_rising(axes):
    found = monotone(np.random.default_rng(1).random((5, 4, 6)), axes)
    for axis in axes:
        assert (np.diff(found, axis=axis) >= -1e-12).all()


def test_an_axis_that_is_not_named_may_fall():
    falling = np.array([[3.0, 4.0], [1.0, 0.0]])
    assert monotone(falling, [1]).tolist() == [[3, 4], [0.5, 0.5]]
