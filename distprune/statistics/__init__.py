"""Streaming moments of activations and gradients at a layer's sites."""

from distprune.statistics.layer_statistics import LayerStatistics
from distprune.statistics.moments import (
    Cross,
    Gram,
    HeadGram,
    Mean,
    MeanNorm,
    Moment,
    Peak,
    Power,
    ScalingPower,
    sites_of,
)
from distprune.statistics.sizes import moment_size, site_widths

__all__ = [
    "Cross",
    "Gram",
    "HeadGram",
    "LayerStatistics",
    "Mean",
    "MeanNorm",
    "Moment",
    "Peak",
    "Power",
    "ScalingPower",
    "moment_size",
    "site_widths",
    "sites_of",
]
