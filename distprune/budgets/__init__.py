"""How much to take from which layer and part."""

from distprune.budgets.accounting import decoder_parameters, layer_parameters, outer_parameters, parameters_by_part
from distprune.budgets.allocation import Allocation, Curve, allocate
from distprune.budgets.filling import affordable_neurons, aligned, fill_with_ffn, neurons_amount
from distprune.budgets.layouts import (
    Layout,
    are_alike,
    has_plain_heads,
    is_heterogeneous,
    is_stock,
    layout_of,
)
from distprune.budgets.menu import Menu, PartShape
from distprune.budgets.outliers import outlier_ratio, outlier_weighted
from distprune.budgets.relaxation import hull_of
from distprune.budgets.resources import (
    RESOURCES,
    Resource,
    StoredSizes,
    attention_amount,
    ffn_amount,
    layer_amount,
    rest_amount,
)
from distprune.budgets.target import Target, target_of

__all__ = [
    "RESOURCES",
    "Allocation",
    "Curve",
    "Layout",
    "Menu",
    "PartShape",
    "Resource",
    "StoredSizes",
    "Target",
    "affordable_neurons",
    "aligned",
    "allocate",
    "are_alike",
    "attention_amount",
    "decoder_parameters",
    "ffn_amount",
    "fill_with_ffn",
    "has_plain_heads",
    "hull_of",
    "is_heterogeneous",
    "is_stock",
    "layer_amount",
    "layer_parameters",
    "layout_of",
    "neurons_amount",
    "outer_parameters",
    "outlier_ratio",
    "outlier_weighted",
    "parameters_by_part",
    "rest_amount",
    "target_of",
]
