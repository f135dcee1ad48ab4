"""Counting the parameters that decoder layers hold."""

from __future__ import annotations

from collections.abc import Sequence

from distprune.budgets.resources import layer_amount, outer_amount
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import LayerShape


def layer_parameters(model: Architecture, index: int, shape: LayerShape) -> int:
    """Parameters of layer ``index`` if it had ``shape``, norms and biases included."""
    return layer_amount("parameters", model, index, shape)


def decoder_parameters(model: Architecture, shapes: Sequence[LayerShape]) -> int:
    """Parameters of all decoder layers if they had ``shapes``."""
    return sum(layer_parameters(model, index, shape) for index, shape in enumerate(shapes))


def outer_parameters(model: Architecture) -> int:
    """Parameters outside the decoder layers: embeddings, final norm and an untied head."""
    return outer_amount("parameters", model)
