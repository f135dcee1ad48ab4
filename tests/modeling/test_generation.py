"""Generation: caches, padding, beams."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from distprune.modeling import PrunedConfig, PrunedForCausalLM
from distprune.modeling.modeling_distprune import one_token_attention

MIXED_SLIDING = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


@pytest.fixture(params=[{}, MIXED_SLIDING, {"sliding_window": 6}], ids=["full", "mixed", "sliding"])
def model(request, pruned_model) -> PrunedForCausalLM:
    return pruned_model(**request.param)


def greedy(model: PrunedForCausalLM, ids: torch.Tensor, **options) -> torch.Tensor:
    """The twelve greedy new tokens of each row."""
    return model.generate(ids, max_new_tokens=12, do_sample=False, **options)[:, ids.shape[1] :]


def greedy_by_hand(model: PrunedForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The same by whole forward passes, without `generate` and without a cache."""
    prompt = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    return ids[:, prompt:]


@pytest.mark.parametrize(
    "options",
    [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["dynamic cache", "no cache", "static cache"],
)
def test_greedy_generation_equals_repeated_forward_passes(model, tokens, options):
    expected = greedy_by_hand(model, tokens)
    assert len(set(expected.flatten().tolist())) > 4
    assert greedy(model, tokens, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_left_padding_does_not_change_generation(model, tokens, options):
    short = tokens[:1, :9]
    padded = torch.cat([torch.zeros(1, 15, dtype=torch.long), short], dim=1)
    batch = torch.cat([padded, tokens[1:]])
    together = greedy(model, batch, attention_mask=(batch != 0).long(), **options)
    assert together[0].tolist() == greedy_by_hand(model, short)[0].tolist()
    assert together[1].tolist() == greedy_by_hand(model, tokens[1:])[0].tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_left_padding_does_not_change_the_last_logits(model, tokens, implementation):
    model.set_attn_implementation(implementation)
    short = tokens[:1, :9]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(logits, model(short).logits[:, -1], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_cache_keeps_each_layers_own_heads_and_widths(pruned_model, tokens):
    cache = pruned_model()(tokens, use_cache=True).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, heads, 24, 16) for heads in (2, 1, 4)]
    assert [tuple(layer.values.shape) for layer in cache.layers] == [
        (2, 2, 24, 11),
        (2, 1, 24, 16),
        (2, 4, 24, 6),
    ]


@torch.no_grad()
def test_a_sequence_read_in_two_halves_gives_the_same_logits(model, tokens):
    cache = model(tokens[:, :10], use_cache=True).past_key_values
    continued = model(tokens[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(continued, model(tokens).logits[:, 10:], atol=2e-5, rtol=2e-5)


def test_beam_search_does_not_depend_on_the_cache(model, tokens):
    with_cache, without = (
        greedy(model, tokens, num_beams=3, use_cache=use_cache).tolist() for use_cache in (True, False)
    )
    assert with_cache == without


def test_beam_search_equals_that_of_llama(tiny, randomized, tokens):
    llama = randomized(LlamaForCausalLM(LlamaConfig(**tiny)))
    pruned = PrunedForCausalLM(PrunedConfig(**tiny)).eval()
    pruned.load_state_dict(llama.state_dict())
    assert greedy(pruned, tokens, num_beams=3).tolist() == greedy(llama, tokens, num_beams=3).tolist()


def test_sampling_repeats_under_one_seed(pruned_model, tokens):
    model = pruned_model()
    torch.manual_seed(3)
    first = model.generate(tokens, max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    assert model.generate(tokens, max_new_tokens=8, do_sample=True).tolist() == first.tolist()


@pytest.mark.parametrize("mask", [None, "which", "how much"])
def test_attention_of_one_new_token_is_that_of_every_head_by_itself(mask):
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    query, key, value = draw(2, 6, 1, 10), draw(2, 3, 7, 10), draw(2, 3, 7, 10)
    allowed = torch.arange(7) >= torch.tensor([3, 0])[:, None, None, None]
    mask = {None: None, "which": allowed, "how much": draw(2, 1, 1, 7)}[mask]
    expected = F.scaled_dot_product_attention(
        query, key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1), mask, scale=0.3
    )
    torch.testing.assert_close(
        one_token_attention(query, key, value, mask, 0.3), expected.transpose(1, 2), atol=1e-6, rtol=1e-6
    )
