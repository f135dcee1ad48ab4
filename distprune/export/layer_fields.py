"""What layers' own configurations say: numbers of heads and neurons, under the names that a family has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from distprune.export.said_shapes import Said, shape_of
from distprune.layers.architecture import Architecture

Fields = Mapping[str, Any]
MAY_BE_READ = "allow_global_per_layer_attribute_access"


def fields_by_layer(architecture: Architecture, layers: Sequence[Said]) -> list[Fields]:
    """What each layer's own configuration says of the layer's parts; nothing of parts that it doesn't have or that
    pruning doesn't know."""
    return [own_fields(architecture, index, said) for index, said in enumerate(layers)]


def own_fields(architecture: Architecture, index: int, said: Said) -> Fields:
    family, config = architecture.family, architecture.layer_config(index, shape_of(said))
    names = [family.heads, family.kv_heads, family.head_dim] if said.get("attention") else []
    names += architecture.ffn_fields(index) if said.get("ffn") else []
    fields = {name: getattr(config, name, None) for name in names if name is not None}
    return overrides(architecture.config).get(index, {}) | {
        name: value for name, value in fields.items() if value is not None
    }


def is_even(fields: Sequence[Fields]) -> bool:
    """Whether no two layers say different things of a part that both have."""
    return all(len(values) == 1 for values in by_name(fields).values())


def write_fields(config: PreTrainedConfig, fields: Sequence[Fields], *, is_even: bool) -> None:
    """Let a model's configuration say what each layer's does: as its own where it is even, else layer by layer.

    Raises:
        ValueError: it is not even.
    """
    config.per_layer_config = None
    config.__dict__.pop(MAY_BE_READ, None)
    for name, values in by_name(fields).items():
        # What all layers with heads of their own say of the width of a head, which the model's may have left to be
        # found out from the number of heads.
        if is_even or getattr(config, name, None) is None:
            if len(values) > 1:
                raise ValueError(f"Layers have different {name}, which the layout stock can't say.")
            setattr(config, name, values.pop())
    if others := {index: own for index, each in enumerate(fields) if (own := differing(each, config))}:
        setattr(config, MAY_BE_READ, True)
        config.per_layer_config = others


def by_name(fields: Sequence[Fields]) -> dict[str, set[Any]]:
    """All the values that layers have for each field."""
    return {
        name: {own[name] for own in fields if name in own} for name in dict.fromkeys(n for own in fields for n in own)
    }


def differing(fields: Fields, config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if getattr(config, name, None) != value}


def overrides(config: PreTrainedConfig) -> dict[int, Fields]:
    """What a configuration says of single layers, by their numbers."""
    return {int(index): own for index, own in config.to_dict().get("per_layer_config", {}).items()}
