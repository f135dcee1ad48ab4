"""Tiny random models of every family, as transformers builds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one KV head a query head": ("llama", {"num_key_value_heads": None}),
    "llama, head width apart from hidden size": ("llama", {"head_dim": 12}),
    "llama, gelu and coarse norms": ("llama", {"hidden_act": "gelu", "rms_norm_eps": 0.1}),
    "llama, fast rope": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, upper layers slide": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3, tied, upper layers slide": (
        "qwen3",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
}


@pytest.fixture(params=CASES)
def stock_config(request) -> PreTrainedConfig:
    model_type, changes = CASES[request.param]
    return AutoConfig.for_model(model_type, **TINY | changes)


@pytest.fixture
def stock_model() -> Callable[[PreTrainedConfig], PreTrainedModel]:
    """Builds transformers' own model, its norms and biases random too so that a mistake in any of them shows."""

    def build(config: PreTrainedConfig) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            parameter.data = noise + 1 if "norm" in name else noise
        model.tie_weights()
        return model.eval()

    return build
