"""Small models of random weights, one of every family."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY, HIDDEN, NEURONS, LAYERS, HEADS, GROUPS = 128, 64, 96, 4, 8, 4
HEAD_DIM = HIDDEN // HEADS

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WITH_HEAD_DIM = _BASE | {"head_dim": HEAD_DIM}
_SLIDING = _WITH_HEAD_DIM | {"sliding_window": 16}
_ONE_GROUP_A_HEAD = {name: value for name, value in _BASE.items() if name != "num_key_value_heads"}

#: ``model_type`` -> what its configuration is made with.
FAMILIES: dict[str, dict] = {
    "arcee": _BASE,
    "cohere": _BASE,
    "cohere2": _BASE | {"sliding_window": 16},
    "ernie4_5": _WITH_HEAD_DIM,
    "exaone4": _BASE | {"sliding_window": 16},
    "gemma": _WITH_HEAD_DIM,
    "gemma2": _SLIDING | {"query_pre_attn_scalar": HEAD_DIM},
    "gemma3_text": _SLIDING | {"query_pre_attn_scalar": HEAD_DIM},
    "glm": _WITH_HEAD_DIM,
    "glm4": _WITH_HEAD_DIM,
    "gpt_neox": _ONE_GROUP_A_HEAD,
    "granite": _BASE | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "hunyuan_v1_dense": _WITH_HEAD_DIM,
    "llama": _BASE | {"attention_bias": True, "mlp_bias": True},
    "ministral": _WITH_HEAD_DIM,
    "mistral": _BASE | {"sliding_window": 16},
    "nemotron": _BASE,
    "olmo2": _BASE,
    "olmo3": _BASE | {"sliding_window": 16},
    "opt": {name: value for name, value in _ONE_GROUP_A_HEAD.items() if name != "intermediate_size"}
    | {"ffn_dim": NEURONS, "word_embed_proj_dim": HIDDEN, "do_layer_norm_before": True},
    "phi": _BASE,
    "phi3": _BASE,
    "qwen2": _BASE,
    "qwen3": _WITH_HEAD_DIM,
    "qwen3_5_text": _WITH_HEAD_DIM
    | {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "seed_oss": _WITH_HEAD_DIM,
    "smollm3": _BASE,
    "stablelm": _BASE,
    "starcoder2": _BASE | {"use_bias": True},
}


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """A configuration of a family, some of its fields changed."""
    return AutoConfig.for_model(model_type, **(FAMILIES[model_type] | changes))


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of random weights. Norms and biases are random too, since those that do nothing hide mistakes."""
    config = tiny_config(model_type, **changes)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    torch.manual_seed(seed)
    kernel = "sdpa" if model_class._supports_sdpa else "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel).eval()
    for parameter in model.parameters():
        # Large enough for layers to differ, small enough for nothing to overflow.
        noise = 0.1 * torch.randn_like(parameter)
        parameter.data.add_(noise)
    return model
