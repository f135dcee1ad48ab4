"""Counting the parameters that decoder layers hold."""

from __future__ import annotations

from collections.abc import Sequence

from distprune.budgets.resources import (
    attention_amount,
    ffn_amount,
    layer_amount,
    outer_amount,
    rest_amount,
    tensors_amount,
)
from distprune.layers.architecture import Architecture
from distprune.layers.expert_names import EXPERTS, SHARED
from distprune.layers.shapes import ExpertsShape, LayerShape


def layer_parameters(model: Architecture, index: int, shape: LayerShape) -> int:
    """Parameters of layer ``index`` if it had ``shape``, norms and biases included."""
    return layer_amount("parameters", model, index, shape)


def decoder_parameters(model: Architecture, shapes: Sequence[LayerShape]) -> int:
    """Parameters of all decoder layers if they had ``shapes``."""
    return sum(layer_parameters(model, index, shape) for index, shape in enumerate(shapes))


def parameters_by_part(model: Architecture, index: int, shape: LayerShape) -> dict[str, int]:
    """Parameters of layer ``index`` if it had ``shape``, by part: "attention", "ffn" or, of a mixture, "experts",
    "shared expert" and "router", and the "rest" of it. Parts that the dense layer lacks are left out."""
    dense, parts = model.dense_shape(index), {}
    if dense.attention:
        parts["attention"] = attention_amount("parameters", model, index, shape.attention)
    if isinstance(dense.ffn, ExpertsShape):
        parts |= mixture_parameters(model, index, shape)
    elif dense.ffn:
        parts["ffn"] = ffn_amount("parameters", model, index, shape.ffn)
    return parts | {"rest": rest_amount("parameters", model, index)}


def mixture_parameters(model: Architecture, index: int, shape: LayerShape) -> dict[str, int]:
    """Parameters of a mixture of experts: of its experts, of what every token passes through, and of its router."""
    tensors, parts = model.ffn_tensors(index, shape.ffn), {}
    for part, modules in {"experts": (EXPERTS,), "shared expert": SHARED}.items():
        inside = {name: tensors[name] for name in tensors if set(name.split(".")) & {*modules}}
        tensors = {name: tensors[name] for name in tensors.keys() - inside.keys()}
        if inside:
            parts[part] = tensors_amount("parameters", model, inside)
    return parts | {"router": tensors_amount("parameters", model, tensors)}


def outer_parameters(model: Architecture) -> int:
    """Parameters outside the decoder layers: embeddings, final norm and an untied head."""
    return outer_amount("parameters", model)
