"""Small models of random weights, one of every family: of dense ones, and of mixtures of experts."""

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

#: Of a mixture: its experts, the neurons of each, and how many of them a token is sent to.
EXPERTS, EXPERT_NEURONS, CHOSEN = 8, 40, 2
_CHOSEN = {"num_experts_per_tok": CHOSEN}
#: Experts as wide as the configuration says of all feed-forward networks; of some families in every layer.
_SPARSE = _CHOSEN | {"intermediate_size": EXPERT_NEURONS, "num_local_experts": EXPERTS}
_NARROW = _CHOSEN | {"moe_intermediate_size": EXPERT_NEURONS}
#: The first two layers are dense, and shared experts are as wide as the others.
_ROUTED = _NARROW | {"n_routed_experts": EXPERTS, "first_k_dense_replace": 2, "n_shared_experts": 2}
_GROUPED = _ROUTED | {"n_group": 2, "topk_group": 1}
_LATENT = {"kv_lora_rank": 24, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8} | {
    "num_key_value_heads": HEADS,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED = _NARROW | {"num_experts": EXPERTS, "shared_expert_intermediate_size": 48}

#: The same of mixtures of experts. The last layer of each is one.
MIXTURES: dict[str, dict] = {
    "deepseek_v2": _BASE | _GROUPED | _LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _BASE | _GROUPED | _LATENT,
    "dots1": _WITH_HEAD_DIM | _GROUPED,
    "ernie4_5_moe": _BASE
    | {"moe_intermediate_size": EXPERT_NEURONS, "moe_num_experts": EXPERTS, "moe_k": CHOSEN}
    | {"moe_layer_start_index": 1, "moe_num_shared_experts": 2},
    "glm4_moe": _WITH_HEAD_DIM | _ROUTED,
    "gpt_oss": _WITH_HEAD_DIM
    | _SPARSE
    | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "granitemoe": _BASE | _SPARSE | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "minimax_m2": _WITH_HEAD_DIM | _SPARSE | {"rotary_dim": 4},
    "mixtral": _BASE | _SPARSE,
    "olmoe": _BASE | _CHOSEN | {"intermediate_size": EXPERT_NEURONS, "num_experts": EXPERTS},
    "phimoe": _BASE | _SPARSE,
    "qwen2_moe": _BASE | _SHARED | {"mlp_only_layers": [0]},
    "qwen3_5_moe_text": _WITH_HEAD_DIM | _SHARED | _LINEAR,
    "qwen3_moe": _WITH_HEAD_DIM | _NARROW | {"num_experts": EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen3_next": _WITH_HEAD_DIM | _SHARED | _LINEAR,
    "solar_open": _WITH_HEAD_DIM | _NARROW | {"n_routed_experts": EXPERTS, "n_shared_experts": 1},
}

#: The same of mixtures whose experts are no part that is known: they are carried through as they are.
CARRIED: dict[str, dict] = {
    "gemma4_text": _WITH_HEAD_DIM
    | {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": CHOSEN}
    | {"moe_intermediate_size": EXPERT_NEURONS, "global_head_dim": HEAD_DIM, "sliding_window": 16}
    | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "llama4_text": _WITH_HEAD_DIM
    | {"intermediate_size": EXPERT_NEURONS, "intermediate_size_mlp": NEURONS, "num_local_experts": EXPERTS}
    | {"moe_layers": [0, 2], "attention_chunk_size": 16},
}


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """A configuration of a family, some of its fields changed."""
    return AutoConfig.for_model(model_type, **((FAMILIES | MIXTURES | CARRIED)[model_type] | changes))


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of random weights. Norms, biases and what corrects a router's scores are random too, since those that do
    nothing hide mistakes."""
    config = tiny_config(model_type, **changes)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    torch.manual_seed(seed)
    kernel = "sdpa" if model_class._supports_sdpa else "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel).eval()
    corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for parameter in (*model.parameters(), *corrections):
        # Large enough for layers to differ, small enough for nothing to overflow.
        noise = 0.1 * torch.randn_like(parameter)
        parameter.data.add_(noise)
    return model
