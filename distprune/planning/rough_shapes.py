"""Which pruned layers are so alike that the plan of one stands for the others."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from distprune.layers.shapes import LayerShape

#: Parts of a dense layer's sizes, to the nearest of which layers that stand for each other are alike.
STEPS = 8


def rough(shape: LayerShape, dense: LayerShape) -> Hashable:
    """Equal for shapes of which one layer stands for the other: they differ by little of the dense one's."""

    def steps(part: Any, full: Any) -> Hashable:
        if part is None:
            return None
        return tuple(
            round(STEPS * value / getattr(full, name)) if getattr(full, name) not in (None, False, True) else value
            for name, value in vars(part).items()
        )

    return steps(shape.attention, dense.attention), steps(shape.ffn, dense.ffn)
