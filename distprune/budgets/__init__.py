"""How much to take from which layer and module."""

from distprune.budgets.accounting import (
    ParameterTarget,
    affordable_neurons,
    decoder_parameters,
    layer_parameters,
    outer_parameters,
)
from distprune.budgets.outliers import outlier_ratio, outlier_weighted
from distprune.budgets.uniform import aligned, fill_with_ffn

__all__ = [
    "ParameterTarget",
    "affordable_neurons",
    "aligned",
    "decoder_parameters",
    "fill_with_ffn",
    "layer_parameters",
    "outer_parameters",
    "outlier_ratio",
    "outlier_weighted",
]
