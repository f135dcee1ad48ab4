"""Linear algebra on tensors. No Ray, no files, no transformers."""

from distprune.solvers.low_rank import factor_input_scaled, factor_output_scaled
from distprune.solvers.ridge import prediction_correlation, ridge
from distprune.solvers.rotation import orthogonal_output_rotation, uncorrelated_rotation
from distprune.solvers.selection import most_and_least_important, most_important

__all__ = [
    "factor_input_scaled",
    "factor_output_scaled",
    "most_and_least_important",
    "most_important",
    "orthogonal_output_rotation",
    "prediction_correlation",
    "ridge",
    "uncorrelated_rotation",
]
