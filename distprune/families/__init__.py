"""Model families, one file each: the only place that knows what a checkpoint calls its tensors."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from distprune.errors import InputError
from distprune.families import llama, mistral, qwen2, qwen3
from distprune.families.base import Family
from distprune.families.tied import UNTIED, untied_where_different, with_embedding
from distprune.modeling import PrunedConfig

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's configuration.

    Raises:
        InputError: the architecture is not one that distprune knows, or that of a model that it has pruned already.
    """
    family, file = FAMILIES.get(config.model_type), Path(config.name_or_path, "config.json")
    if config.model_type == PrunedConfig.model_type:
        raise InputError(
            f"{file}: is of a model that distprune has pruned already, and a pruned model can't be pruned again. Prune "
            "the original model with a higher --sparsity."
        )
    if family is None:
        raise InputError(
            f"{file}: model_type '{config.model_type}' is not supported. "
            f"Supported families: {', '.join(sorted(FAMILIES))}."
        )
    return family


__all__ = ["FAMILIES", "UNTIED", "Family", "family_of", "untied_where_different", "with_embedding"]
