"""With nothing removed, the pruned decoder computes what transformers' own classes compute."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distprune.modeling import PrunedConfig, PrunedForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}

# Case: model type, what its own config is given beyond the tiny sizes, and the same said to PrunedConfig.
CASES = {
    "llama, grouped queries": ("llama", {}, {}),
    "llama, one KV head per query head": ("llama", {"num_key_value_heads": 4}, {"num_key_value_heads": 4}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}, {"num_key_value_heads": 1}),
    "llama, head width apart from hidden size": ("llama", {"head_dim": 24}, {"head_dim": 24}),
    "llama, attention bias": (
        "llama",
        {"attention_bias": True},
        {"attention_bias": True, "attention_output_bias": True},
    ),
    "llama, feed-forward bias": ("llama", {"mlp_bias": True}, {"mlp_bias": True}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "llama, coarse norm epsilon": ("llama", {"rms_norm_eps": 0.1}, {"rms_norm_eps": 0.1}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}, {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN_ROPE}, {"rope_parameters": YARN_ROPE}),
    "llama, dynamic rope beyond its length": (
        "llama",
        {"rope_parameters": LONG_DYNAMIC_ROPE, "max_position_embeddings": 12},
        {"rope_parameters": LONG_DYNAMIC_ROPE, "max_position_embeddings": 12},
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}, {}),
    "mistral, window shorter than the sequence": ("mistral", {"sliding_window": 5}, {"sliding_window": 5}),
    "qwen2": ("qwen2", {}, {"attention_bias": True}),
    "qwen2, upper layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {
            "attention_bias": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, {"query_key_norm": True}),
    "qwen3, coarse norm epsilon": (
        "qwen3",
        {"head_dim": 16, "rms_norm_eps": 0.1},
        {"query_key_norm": True, "rms_norm_eps": 0.1},
    ),
    "qwen3, attention bias": (
        "qwen3",
        {"head_dim": 16, "attention_bias": True},
        {"query_key_norm": True, "attention_bias": True, "attention_output_bias": True},
    ),
}


@pytest.fixture(params=CASES)
def pair(request, tiny, randomized) -> tuple[torch.nn.Module, PrunedForCausalLM]:
    """transformers' own model and ours with the same weights."""
    model_type, theirs, ours = CASES[request.param]
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(tiny | theirs)))
    randomized(stock)
    pruned = PrunedForCausalLM(PrunedConfig(**(tiny | ours), base_model_type=model_type)).eval()
    pruned.load_state_dict(stock.state_dict(), strict=True)
    return stock, pruned


@torch.no_grad()
def test_logits_and_hidden_states_equal_those_of_the_original_class(pair, tokens):
    expected, actual = (model(tokens, output_hidden_states=True) for model in pair)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_decoding_equals_that_of_the_original_class(pair, tokens):
    expected, actual = (model.generate(tokens, max_new_tokens=12, do_sample=False) for model in pair)
    assert actual.tolist() == expected.tolist()


def test_the_cases_can_tell_their_flags_apart(tiny, randomized, tokens):
    """The sliding window and the rope scaling above are felt at this length."""
    plain, windowed, scaled = (
        randomized(PrunedForCausalLM(PrunedConfig(**tiny, **changes)))(tokens).logits
        for changes in ({}, {"sliding_window": 5}, {"rope_parameters": LLAMA3_ROPE})
    )
    assert (plain - windowed).abs().max() > 0.01
    assert (plain - scaled).abs().max() > 0.01
