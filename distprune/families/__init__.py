"""Model families, one file each: the only place that knows what a checkpoint calls its tensors."""

from __future__ import annotations

from transformers import PreTrainedConfig

from distprune.errors import InputError
from distprune.families import llama, mistral, qwen2, qwen3
from distprune.families.base import Family

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's configuration.

    Raises:
        InputError: the architecture is not one that distprune knows.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            f"config.json: model_type '{config.model_type}' is not supported. "
            f"Supported families: {', '.join(sorted(FAMILIES))}."
        )
    return family


__all__ = ["FAMILIES", "Family", "family_of"]
