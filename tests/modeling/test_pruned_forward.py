"""Pruned models against transformers' own classes, whose weights are zeros or products where something is gone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distprune.modeling import CACHE, load

CASES = {
    "llama": ("llama", {}),
    "llama, one KV head per query head": ("llama", {"num_key_value_heads": 8}),
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, all layers slide": ("mistral", {"sliding_window": 6}),
    "qwen2, some layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "phi3, fused projections": ("phi3", {}),
    "granite, multipliers": ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.7}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, pruned):
    """A free checkpoint's model, and its oracle."""
    model_type, changes = CASES[request.param]
    checkpoint = pruned("free", model_type, **changes)
    return load(checkpoint.folder), checkpoint.oracle


def logits(model: PreTrainedModel, tokens: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def greedy(model: PreTrainedModel, tokens: Tensor, **options) -> list[list[int]]:
    """The twelve new tokens of each row."""
    return model.generate(tokens, max_new_tokens=12, do_sample=False, **options)[:, tokens.shape[1] :].tolist()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_the_dense_model_with_zeros(case, tokens, implementation):
    model, oracle = case
    expected = logits(oracle, tokens)
    model.set_attn_implementation(implementation)
    assert_same(logits(model, tokens), expected)
    model.set_attn_implementation("sdpa")


def test_logits_are_the_same_in_every_layout(checkpoint, tokens):
    assert_same(logits(load(checkpoint.folder), tokens), logits(checkpoint.oracle, tokens))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_is_that_of_the_dense_model(case, tokens, options):
    model, oracle = case
    expected = greedy(oracle, tokens, **{name: value for name, value in options.items() if name == "num_beams"})
    assert len({token for row in expected for token in row}) > 4
    assert greedy(model, tokens, **options) == expected


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_left_padding_does_not_change_generation(case, tokens, options):
    model, oracle = case
    short = tokens[:1, :9]
    padded = torch.cat([torch.zeros(1, 15, dtype=torch.long), short], dim=1)
    batch = torch.cat([padded, tokens[1:]])
    together = greedy(model, batch, attention_mask=(batch != 0).long(), **options)
    assert together == greedy(oracle, short) + greedy(oracle, tokens[1:])


def test_a_sequence_read_in_two_halves_gives_the_same_logits(case, tokens):
    model, _ = case
    with torch.no_grad():
        cache = model(tokens[:, :10], use_cache=True)[CACHE]
        continued = model(tokens[:, 10:], **{CACHE: cache}).logits
    assert_same(continued, logits(model, tokens)[:, 10:])


def test_assisted_decoding_gives_the_same_tokens(pruned, tokens):
    checkpoint = pruned("free")
    model, assistant = load(checkpoint.folder), load(checkpoint.folder)
    assert greedy(model, tokens[:1], assistant_model=assistant) == greedy(checkpoint.oracle, tokens[:1])
    assert greedy(checkpoint.oracle, tokens[:1], assistant_model=assistant) == greedy(checkpoint.oracle, tokens[:1])


def test_caches_are_as_wide_as_what_is_left(pruned, tokens):
    with torch.no_grad():
        cache = load(pruned("free").folder)(tokens, use_cache=True)[CACHE]
    widths = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]
    assert widths == [(1, 1, 1), (4, 4, 5), (4, 8, 6), (2, 8, 8), (4, 8, 8), (4, 8, 8)]
    assert cache.get_seq_length() == tokens.shape[1]


def test_a_model_run_in_inference_mode_can_train_later(pruned, tokens):
    model = load(pruned("free").folder)
    with torch.inference_mode():
        model(tokens)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[1].parameters())
