"""Layouts of the output, and which shapes each can describe.

- ``free``: every layer has its own widths, ranks and branches, and may lack attention or feed-forward network.
- ``heterogeneous``: every layer has its own heads, feed-forward width, experts and width of experts, and all the parts
  of the dense layer.
- ``stock``: the same, and all layers are alike, so that a plain configuration of the family describes them; those with
  one feed-forward network and those with a mixture of experts each among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from distprune.layers.architecture import Architecture
from distprune.layers.shapes import ExpertsShape, LayerShape

Layout = Literal["free", "heterogeneous", "stock"]


def layout_of(model: Architecture, shapes: Sequence[LayerShape]) -> Layout:
    """The plainest layout that describes pruned layers of these shapes."""
    if is_stock(model, shapes):
        return "stock"
    return "heterogeneous" if is_heterogeneous(model, shapes) else "free"


def is_heterogeneous(model: Architecture, shapes: Sequence[LayerShape]) -> bool:
    """Whether the layers have lost whole heads, neurons and experts alone, each as many as it likes."""
    return all(has_lost_units_alone(model.dense_shape(index), shape) for index, shape in enumerate(shapes))


def is_stock(model: Architecture, shapes: Sequence[LayerShape]) -> bool:
    """Whether the layers have lost such units alone, and all as many, as a plain configuration can say."""
    return is_heterogeneous(model, shapes) and are_alike(shapes) and all(has_plain_heads(model, s) for s in shapes)


def has_lost_units_alone(dense: LayerShape, shape: LayerShape) -> bool:
    """Whether a pruned layer differs from the dense one by heads, neurons and experts at most."""
    plain = dense
    if dense.attention and shape.attention:
        heads = shape.attention.query_heads, shape.attention.kv_heads
        plain = plain.with_attention(query_heads=heads[0], kv_heads=heads[1])
    if isinstance(dense.ffn, ExpertsShape) and isinstance(shape.ffn, ExpertsShape):
        shared = shape.ffn.shared_width if dense.ffn.shared_width else None
        plain = plain.with_ffn(count=shape.ffn.count, width=shape.ffn.width, shared_width=shared)
    elif dense.ffn and shape.ffn:
        plain = plain.with_ffn(width=shape.ffn.width)
    return shape == plain


def are_alike(shapes: Sequence[LayerShape]) -> bool:
    """Whether all layers that have a part have it in one shape; one network and a mixture are two kinds of part."""
    parts = [part for shape in shapes for part in (shape.attention, shape.ffn) if part]
    return len(set(parts)) == len({type(part) for part in parts})


def has_plain_heads(model: Architecture, shape: LayerShape) -> bool:
    """Whether a plain configuration of the family can have as many heads as the layer, if it has any."""
    return shape.attention is None or model.has_plain_heads(shape.attention)
