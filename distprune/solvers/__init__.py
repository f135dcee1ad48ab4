"""Linear algebra on tensors. No Ray, no files, no transformers."""

from distprune.solvers.elimination import eliminate, elimination_path
from distprune.solvers.expected import for_each
from distprune.solvers.linear_branch import linear_branch
from distprune.solvers.low_rank import (
    factor_input_scaled,
    factor_output_scaled,
    leading_outputs,
    output_projections,
    truncation_errors,
)
from distprune.solvers.qp.box_ridge import box_ridge
from distprune.solvers.qp.quadratic import QuadraticSolution, solve_box_qp
from distprune.solvers.qp.relaxed_selection import relaxed_selection
from distprune.solvers.ridge import prediction_correlation, ridge, ridge_towards
from distprune.solvers.rotation import orthogonal_output_rotation, output_aware_rotation, uncorrelated_rotation
from distprune.solvers.selection import channels_of, most_and_least_important, most_important, others

__all__ = [
    "QuadraticSolution",
    "box_ridge",
    "channels_of",
    "eliminate",
    "elimination_path",
    "factor_input_scaled",
    "factor_output_scaled",
    "for_each",
    "leading_outputs",
    "linear_branch",
    "most_and_least_important",
    "most_important",
    "orthogonal_output_rotation",
    "others",
    "output_aware_rotation",
    "output_projections",
    "prediction_correlation",
    "relaxed_selection",
    "ridge",
    "ridge_towards",
    "solve_box_qp",
    "truncation_errors",
    "uncorrelated_rotation",
]
