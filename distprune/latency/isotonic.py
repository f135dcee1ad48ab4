"""Measured times of which none is less than that of something narrower."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression


def monotone(values: NDArray[np.float64], axes: Iterable[int]) -> NDArray[np.float64]:
    """The values after least-squares regressions that make them rise along every one of the axes.

    The regressions follow one another: isotonic regression keeps the order of two sequences of which one is nowhere
    above the other, so what rises along one axis still does once it has been made to rise along the next.
    """
    for axis in axes:
        values = np.apply_along_axis(lambda line: isotonic_regression(line).x, axis, values)
    return values
