"""How much to take from which layer and module."""

from distprune.budgets.accounting import affordable_neurons, decoder_parameters, layer_parameters, outer_parameters
from distprune.budgets.allocation import Allocation, Curve, allocate
from distprune.budgets.outliers import outlier_ratio, outlier_weighted
from distprune.budgets.resources import RESOURCES, Resource, StoredSizes, amount, attention_amount, ffn_amount
from distprune.budgets.stock import has_plain_heads, is_stock
from distprune.budgets.target import Target, target_of
from distprune.budgets.uniform import aligned, fill_with_ffn

__all__ = [
    "RESOURCES",
    "Allocation",
    "Curve",
    "Resource",
    "StoredSizes",
    "Target",
    "affordable_neurons",
    "aligned",
    "allocate",
    "amount",
    "attention_amount",
    "decoder_parameters",
    "ffn_amount",
    "fill_with_ffn",
    "has_plain_heads",
    "is_stock",
    "layer_parameters",
    "outer_parameters",
    "outlier_ratio",
    "outlier_weighted",
    "target_of",
]
