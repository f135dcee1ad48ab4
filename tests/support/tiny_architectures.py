"""Architectures of tiny models, as budgets and methods see them: shapes and names, no weights."""

from __future__ import annotations

from functools import lru_cache

from transformers import AutoConfig

from distprune.layers.architecture import Architecture

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
#: What some families' configurations need besides sizes.
MORE = {
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 16,
    },
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 96, "hidden_size": 32, "word_embed_proj_dim": 32},
    "gpt_neox": {"hidden_size": 32},
}


@lru_cache(maxsize=512)
def tiny(model_type: str = "llama", **changes) -> Architecture:
    """A model of three layers, changed by keyword; its heads are wider together than the hidden size."""
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
    return Architecture(AutoConfig.for_model(model_type, **SIZES | MORE.get(model_type, {}) | listed))
