"""Small mixtures of random weights: of the families that are pruned, and of more that can be read and written."""

from __future__ import annotations

import tiny_families
import torch
from tiny_families import (
    _BASE,
    _CHOSEN,
    _GROUPED,
    _LATENT,
    _LINEAR,
    _NARROW,
    _ROUTED,
    _SPARSE,
    _WITH_HEAD_DIM,
    EXPERT_NEURONS,
    EXPERTS,
    HEAD_DIM,
    LAYERS,
    NEURONS,
    VOCABULARY,
)
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_APART = _WITH_HEAD_DIM | _NARROW | {"num_experts": EXPERTS}
_TOGETHER = _BASE | _CHOSEN | {"intermediate_size": EXPERT_NEURONS, "num_experts": EXPERTS}

_MORE = {
    "afmoe": _APART | {"num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 16},
    "cohere2_moe": _APART | {"sliding_window": 16},
    "exaone_moe": _APART | {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"] * 2, "n_group": 1},
    "flex_olmo": _TOGETHER,
    "gemma4_text": _APART
    | {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": HEAD_DIM, "sliding_window": 16}
    | {"vocab_size_per_layer_input": VOCABULARY},
    "granitemoeshared": _BASE | _SPARSE | {"shared_intermediate_size": 24},
    "hunyuan_v1_moe": _TOGETHER | {"head_dim": HEAD_DIM, "moe_topk": 2},
    "hy_v3": _APART,
    "jamba": _TOGETHER
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 0}
    | {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "jetmoe": _BASE | _SPARSE | {"kv_channels": 8},
    "lfm2_moe": _APART | {"num_dense_layers": 1, "layer_types": ["full_attention", "conv"] * 2},
    "llama4_text": _WITH_HEAD_DIM
    | _SPARSE
    | {"intermediate_size_mlp": NEURONS, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "longcat_flash": _BASE
    | _GROUPED
    | _LATENT
    | {"num_layers": LAYERS, "ffn_hidden_size": NEURONS, "zero_expert_num": 0},
    "minimax": _WITH_HEAD_DIM | _SPARSE | {"block_size": 16},
    "nemotron_h": _WITH_HEAD_DIM | _ROUTED | {"layers_block_type": ["attention", "moe"] * 2},
    "sarvam_moe": _APART | _LINEAR,
}
#: Those that the installed transformers has.
MIXTURES: dict[str, dict] = tiny_families.MIXTURES | {name: _MORE[name] for name in _MORE if name in CONFIG_MAPPING}
#: What configurations call their numbers of experts.
COUNTS = ("moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts")


def mixture_config(model_type: str, **changes) -> PreTrainedConfig:
    """A configuration of a family, some of its fields changed."""
    return AutoConfig.for_model(model_type, **(MIXTURES[model_type] | changes))


def mixture_model(model_type: str, **changes) -> PreTrainedModel:
    """A model of random weights, its buffers random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(mixture_config(model_type, **changes))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_()
    return model


def with_experts(model_type: str, count: int) -> PreTrainedConfig:
    """A family's configuration with so many experts."""
    [name] = [name for name in COUNTS if name in MIXTURES[model_type]]
    return mixture_config(model_type, **{name: count})
