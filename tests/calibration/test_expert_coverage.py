"""Windows chosen for experts that text seldom reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from distprune.calibration import expert_coverage
from distprune.calibration.expert_coverage import choose_covering, covering, mixtures, routed_tokens
from distprune.errors import InputError

SIZES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, vocab_size=64, num_local_experts=6, num_experts_per_tok=2)
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (24, 16)).astype(np.int32)


def test_tokens_are_counted_where_the_router_sends_them(mixture, windows):
    with torch.inference_mode():
        logits = mixture(torch.from_numpy(windows).long(), output_router_logits=True).router_logits
    expected = []
    for of_layer in logits:
        chosen = of_layer.topk(2).indices.unflatten(0, windows.shape).flatten(1).numpy()
        expected.append(np.stack([np.bincount(row, minlength=6) for row in chosen]))
    found = routed_tokens(mixture, mixtures(mixture), windows)
    assert np.array_equal(found, np.concatenate(expected, axis=1))


def test_windows_are_added_for_what_experts_lack():
    tokens = np.array([[150, 0, 200], [0, 10, 0], [0, 90, 0], [0, 60, 0], [500, 0, 500]])
    assert covering(tokens, 1) == [0, 2, 1]
    assert covering(tokens[:, [0, 2]], 1) == [0]


def test_no_windows_are_added_that_help_nobody():
    assert covering(np.array([[5, 0], [0, 0], [0, 0]]), 1) == [0]


def test_chosen_windows_begin_with_those_asked_for(mixture, windows, monkeypatch):
    monkeypatch.setattr(expert_coverage, "ENOUGH", 24)
    chosen, coverage = choose_covering(mixture, windows, 4, batch_size=5)
    assert np.array_equal(chosen[:4], windows[:4])
    assert len(chosen) == 4 + coverage.added > 4
    assert min(tokens.min() for tokens in coverage.tokens.values()) >= 24
    assert "All 12 experts see 24 tokens or more." in str(coverage)


def test_what_no_text_reaches_is_named(mixture, windows, monkeypatch):
    monkeypatch.setattr(expert_coverage, "ENOUGH", 10**6)
    _, coverage = choose_covering(mixture, windows[:6], 4)
    assert "Still fewer than 1000000 tokens reach 12 of 12 experts: 6 in model.layers.0.mlp" in str(coverage)


def test_a_dense_model_has_no_experts_to_cover(windows):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64))
    with pytest.raises(InputError, match="a llama model has no experts that distprune knows"):
        choose_covering(model, windows, 4)
