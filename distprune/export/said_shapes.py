"""The shapes of layers as a checkpoint's code takes them, and which of them a configuration's own fields can't say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from distprune.layers.architecture import Architecture, pruned_layer
from distprune.layers.describing import describe
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape

#: `{"attention": {...} or None, "ffn": {...} or None}`: see :func:`distprune.layers.module.said_shape`.
Said = Mapping[str, Any]
PARTS = ("attention", "ffn")
PAIRS = "rotary_pairs"


def shape_of(said: Said) -> LayerShape:
    """The shape that is said; None for parts that are not named."""
    return LayerShape(*(said.get(part) and part_shape(part, said[part]) for part in PARTS))


def part_shape(part: str, said: Said) -> AttentionShape | FeedForwardShape | ExpertsShape:
    return kind_of(part, said)(**{name: value for name, value in said.items() if name != PAIRS})


def kind_of(part: str, said: Said) -> type[AttentionShape | FeedForwardShape | ExpertsShape]:
    if part == "attention":
        return AttentionShape
    return ExpertsShape if "count" in said else FeedForwardShape


def beyond_configuration(architecture: Architecture, layers: Sequence[Said]) -> dict[str, dict[str, Any]]:
    """By layer the parts that are not as the family's class makes them from the layer's own configuration."""
    shapes = {str(index): changed_parts(architecture, index, said) for index, said in enumerate(layers)}
    return {index: parts for index, parts in shapes.items() if parts}


def changed_parts(architecture: Architecture, index: int, said: Said) -> dict[str, Any]:
    family, layer_class = architecture.family, architecture.layer_class(index)
    made = describe(family, layer_class, architecture.layer_config(index, shape_of(said)), index).shape
    # What an earlier pruning has removed is not named any more, but must be said again.
    whole = {**(pruned_layer(architecture.config, index) or {}), **said}
    return {part: compact(part, each) for part, each in whole.items() if is_changed(part, each, getattr(made, part))}


def is_changed(part: str, said: Said | None, made: AttentionShape | FeedForwardShape | ExpertsShape | None) -> bool:
    if said is None:
        return made is not None
    return part_shape(part, said) != made or said.get(PAIRS) is not None


def compact(part: str, said: Said | None) -> dict[str, Any] | None:
    """A part's shape without what it says by default."""
    if said is None:
        return None
    defaults = {each.name: each.default for each in fields(kind_of(part, said))} | {PAIRS: None}
    return {name: value for name, value in said.items() if defaults[name] is MISSING or value != defaults[name]}
