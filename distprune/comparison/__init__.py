"""Several methods at several sparsities on one model and one calibration set, each pruned, evaluated and tabulated."""

from distprune.comparison.comparing import ComparisonRow, compare
from distprune.comparison.scoring import Evaluation

__all__ = ["ComparisonRow", "Evaluation", "compare"]
