"""The pruned decoder: a configuration and a model class, which also travel inside checkpoints."""

from __future__ import annotations

import shutil
from functools import lru_cache, wraps
from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import configuration_distprune, modeling_distprune
from .configuration_distprune import LayerShape, PrunedConfig, is_ours
from .modeling_distprune import (
    CACHE,
    Factorable,
    PrunedAttention,
    PrunedDecoderLayer,
    PrunedFeedForward,
    PrunedForCausalLM,
    PrunedModel,
    PrunedPreTrainedModel,
    RMSNorm,
    RotaryEmbedding,
    causal_masks,
)

# The `auto_map` of config.json: which class of the copied files answers to which Auto class.
AUTO_MAP = {
    "AutoConfig": "configuration_distprune.PrunedConfig",
    "AutoModel": "modeling_distprune.PrunedModel",
    "AutoModelForCausalLM": "modeling_distprune.PrunedForCausalLM",
}


def register_auto_classes() -> None:
    """Let the Auto classes open pruned checkpoints, and `save_pretrained` put the code beside the weights."""
    AutoConfig.register(PrunedConfig.model_type, PrunedConfig, exist_ok=True)
    AutoModel.register(PrunedConfig, PrunedModel, exist_ok=True)
    AutoModelForCausalLM.register(PrunedConfig, PrunedForCausalLM, exist_ok=True)
    _let_auto_config_know()
    PrunedConfig.register_for_auto_class("AutoConfig")
    PrunedModel.register_for_auto_class("AutoModel")
    PrunedForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def _let_auto_config_know() -> None:
    """Let AutoConfig give our configuration for config.json files that our configuration wrote.

    They are of the base model's type, so that tokenizers and tools know them; and a type that transformers has can't be
    registered for such files alone.
    """
    if hasattr(AutoConfig.from_pretrained, "knows_pruned"):
        return
    opened_by_type = AutoConfig.from_pretrained

    @wraps(opened_by_type)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        opened = opened_by_type(pretrained_model_name_or_path, **kwargs)
        config = opened[0] if isinstance(opened, tuple) else opened
        if not is_ours(getattr(config, "hidden_act", None)):
            return opened
        given = {name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "code_revision")}
        given["name_or_path"] = str(pretrained_model_name_or_path)  # as AutoConfig does
        return PrunedConfig.from_pretrained(pretrained_model_name_or_path, **given)

    from_pretrained.knows_pruned = True
    AutoConfig.from_pretrained = classmethod(from_pretrained)


def copy_modeling_files(directory: str | Path) -> list[Path]:
    """Copy the configuration and modeling file into an existing `directory`. Returns the copies' paths."""
    sources = (Path(module.__file__) for module in (configuration_distprune, modeling_distprune))
    return [Path(shutil.copyfile(source, Path(directory) / source.name)) for source in sources]


# The name within a layer of the one tensor that is no parameter: which rotary pairs its KV groups have kept.
ROTARY_PAIRS = "self_attn.rotary_pairs"

# What the tensors of a layer depend on, besides its shape.
SHAPING = ("hidden_size", "head_dim", "attention_bias", "attention_output_bias", "mlp_bias", "query_key_norm")


def layer_tensor_shapes(config: PrunedConfig, index: int, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Names (within the layer) and shapes of the tensors that layer `index` holds when it has `shape`."""
    return dict(_tensor_shapes(shape, *(getattr(config, name) for name in SHAPING)))


@lru_cache(maxsize=2**16)  # budgets ask for the same shapes again and again, and building a module takes a while
def _tensor_shapes(shape: LayerShape, *shaping: int | bool) -> dict[str, tuple[int, ...]]:
    with init_empty_weights():
        layer = PrunedDecoderLayer(_shaping_config(*shaping), 0, shape)
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


@lru_cache
def _shaping_config(*shaping: int | bool) -> PrunedConfig:
    return PrunedConfig(**dict(zip(SHAPING, shaping, strict=True)), num_hidden_layers=1, num_attention_heads=1)


__all__ = [
    "AUTO_MAP",
    "CACHE",
    "ROTARY_PAIRS",
    "Factorable",
    "LayerShape",
    "PrunedAttention",
    "PrunedConfig",
    "PrunedDecoderLayer",
    "PrunedFeedForward",
    "PrunedForCausalLM",
    "PrunedModel",
    "PrunedPreTrainedModel",
    "RMSNorm",
    "RotaryEmbedding",
    "causal_masks",
    "copy_modeling_files",
    "layer_tensor_shapes",
    "register_auto_classes",
]
