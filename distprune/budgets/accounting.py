"""Counting the parameters that decoder layers hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distprune.budgets.resources import amount, outer_amount
from distprune.modeling import LayerShape, PrunedConfig


def layer_parameters(config: PrunedConfig, index: int, shape: LayerShape) -> int:
    """Parameters of layer ``index`` if it had ``shape``, norms and biases included."""
    return amount("parameters", config, index, shape)


def decoder_parameters(config: PrunedConfig, shapes: Sequence[LayerShape]) -> int:
    """Parameters of all decoder layers if they had ``shapes``."""
    return sum(layer_parameters(config, index, shape) for index, shape in enumerate(shapes))


def affordable_neurons(config: PrunedConfig, index: int, shape: LayerShape, budget: float) -> float:
    """How wide layer ``index`` of ``shape`` may make its FFN if it may hold ``budget`` parameters."""
    one, two = (layer_parameters(config, index, replace(shape, ffn_width=width)) for width in (1, 2))
    return 1 + (budget - one) / (two - one)


def outer_parameters(config: PrunedConfig) -> int:
    """Parameters outside the decoder layers: embeddings, final norm and an untied head."""
    return outer_amount("parameters", config)
