"""Streaming moments of a layer's activations."""

from distprune.statistics.layer_statistics import LayerStatistics
from distprune.statistics.moments import Cross, Gram, HeadGram, Mean, Moment, Peak, Power, ScalingPower, taps_of

__all__ = ["Cross", "Gram", "HeadGram", "LayerStatistics", "Mean", "Moment", "Peak", "Power", "ScalingPower", "taps_of"]
