"""A model's module tree on the meta device, and where its decoder layers are in it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distprune.errors import InputError
from distprune.layers.empty import empty_weights


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, its parameters on the meta device. Buffers are real: rotary
    frequencies, scales."""
    with empty_weights():
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention_kernel(config)).eval()


def attention_kernel(config: PreTrainedConfig) -> str:
    """The kernel that layers run with: PyTorch's fused one, where the family's attention is one that it can do."""
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    return "sdpa" if model_class._supports_sdpa else "eager"


def find_layers(model: PreTrainedModel, count: int) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their path in the tree: the first list of so many modules.

    Raises:
        InputError: there is none.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise InputError(
        f"model_type '{model.config.model_type}': found no list of {count} decoder layers in {type(model).__name__}, "
        "so it can't be run one layer at a time. docs/families.md says how to add a family."
    )
