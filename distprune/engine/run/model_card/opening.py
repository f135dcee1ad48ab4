"""Which programs open a checkpoint, and how: see distprune/modeling/README.md for where that was seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distprune.layers.shapes import LayerShape

#: The models that ``distprune export`` writes for llama.cpp, by layout.
EXPORTED = {"stock": ("llama", "mixtral"), "heterogeneous": ("llama",), "free": ()}
VISION = "ForConditionalGeneration"


@dataclass(frozen=True)
class Opening:
    """How a checkpoint is opened.

    Attributes:
        layout: stock, heterogeneous or free.
        auto_class: transformers' class that opens it.
        pipeline_tag: the task that it is for, in the hub's words.
        is_exported: whether ``distprune export`` writes it for llama.cpp.
        lacks_attention: whether pruning took all attention from a layer, which vLLM refuses.
    """

    layout: str
    auto_class: str
    pipeline_tag: str
    is_exported: bool
    lacks_attention: bool


def opening(config: Mapping[str, Any], layout: str, layers: Iterable[tuple[LayerShape, LayerShape]]) -> Opening:
    """How a checkpoint is opened.

    Args:
        config: what its config.json says.
        layout: that of the checkpoint.
        layers: the shape of each before and after.
    """
    sees = any(name.endswith(VISION) for name in config.get("architectures") or ())
    return Opening(
        layout=layout,
        auto_class="AutoModelForImageTextToText" if sees else "AutoModelForCausalLM",
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        is_exported=config.get("model_type") in EXPORTED[layout],
        lacks_attention=any(dense.attention and not pruned.attention for dense, pruned in layers),
    )
