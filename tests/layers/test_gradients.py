"""The loss's gradients layer by layer, against transformers' own backward pass over the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_same, by_transformers, layer_by_layer
from tiny_families import VOCABULARY, tiny_model

from distprune.layers.architecture import Architecture
from distprune.layers.loss import LossHead
from distprune.layers.runner import LayerRunner

CASES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, window shorter than the sequence": ("mistral", {"sliding_window": 5}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_the_whole_models_backward_pass(tokens, case):
    model_type, changes = CASES[case]
    model = tiny_model(model_type, **changes)
    assert_same(layer_by_layer(model, tokens, micro_batch=2), by_transformers(model, tokens), 1e-4)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_the_micro_batch_does_not_change_what_is_computed(llama, tokens, micro_batch):
    assert_same(layer_by_layer(llama, tokens, micro_batch), layer_by_layer(llama, tokens, 2), 1e-4)


def test_float16_gradients_are_those_of_float32_though_tiny(llama, tokens):
    exact = layer_by_layer(llama, tokens, 2)
    coarse = layer_by_layer(llama, tokens, 2, dtype=torch.float16)
    assert all(gradient.dtype == torch.float32 for gradient in coarse.inputs.values())
    assert_same(coarse, exact, 0.05)


def test_bfloat16_gradients_stay_bfloat16(llama, tokens):
    exact = layer_by_layer(llama, tokens, 2)
    coarse = layer_by_layer(llama, tokens, 2, dtype=torch.bfloat16)
    assert all(gradient.dtype == torch.bfloat16 for gradient in coarse.inputs.values())
    for index, gradient in exact.inputs.items():
        cosine = torch.cosine_similarity(coarse.inputs[index].float().flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.98


# ---------------------------------------------------------------- the model's end


def head_of(model) -> LossHead:
    architecture, state = Architecture(model.config), model.state_dict()
    runner = LayerRunner(architecture, torch.device("cpu"), torch.float32, 2)
    runner.shell.fill({name: state[name] for name in (*architecture.outer_tensors(), architecture.head_name)})
    return LossHead(runner)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_logits_in_parts_give_what_they_give_at_once(llama, tokens, monkeypatch, at_once):
    states = torch.randn(*tokens.shape, llama.config.hidden_size, generator=torch.Generator().manual_seed(3))
    given = states.clone().requires_grad_()
    logits = llama.lm_head(llama.model.norm(given))
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses.sum().backward()
    monkeypatch.setattr("distprune.layers.loss.TOKENS_AT_ONCE", at_once)
    gradient, of_samples = head_of(llama).gradient(states, tokens)
    torch.testing.assert_close(gradient, given.grad, rtol=1e-4, atol=1e-5)
    expected = losses.detach().unflatten(0, (len(tokens), -1)).sum(dim=1).double()
    torch.testing.assert_close(of_samples, expected, rtol=1e-5, atol=1e-5)
    assert (gradient[:, -1] == 0).all()


def test_divergence_is_that_of_the_predictions(llama, tokens):
    generator = torch.Generator().manual_seed(4)
    pruned, dense = (torch.randn(*tokens.shape, llama.config.hidden_size, generator=generator) for _ in range(2))
    given = pruned.clone().requires_grad_()
    predicted, wanted = (llama.lm_head(llama.model.norm(states)).log_softmax(-1) for states in (given, dense))
    divergences = F.kl_div(predicted, wanted.detach(), reduction="none", log_target=True).sum(dim=(1, 2))
    divergences.sum().backward()
    gradient, found = head_of(llama).divergence(pruned, dense)
    torch.testing.assert_close(found, divergences.detach().double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, given.grad, rtol=1e-3, atol=1e-5)


def test_tokens_drawn_from_the_dense_models_predictions_have_the_divergences_gradient_on_average(llama, tokens):
    generator = torch.Generator().manual_seed(5)
    pruned, dense = (torch.randn(2, 3, llama.config.hidden_size, generator=generator) for _ in range(2))
    head = head_of(llama)
    expected, divergences = head.divergence(pruned, dense)
    draws = [head.sampled(pruned, dense, first=2 * number) for number in range(1500)]
    assert all(torch.equal(found, draws[0][1]) for _, found in draws)
    torch.testing.assert_close(draws[0][1], divergences, rtol=1e-5, atol=1e-5)
    mean = torch.stack([gradient for gradient, _ in draws]).mean(dim=0)
    spread = torch.stack([gradient for gradient, _ in draws]).std(dim=0) / len(draws) ** 0.5
    assert ((mean - expected).abs() <= 5 * spread + 1e-6).all() and spread.max() < 0.2 * expected.abs().max()


def test_a_sample_draws_the_same_tokens_whichever_come_with_it(llama, tokens):
    generator = torch.Generator().manual_seed(6)
    pruned, dense = (torch.randn(4, 3, llama.config.hidden_size, generator=generator) for _ in range(2))
    head = head_of(llama)
    together, _ = head.sampled(pruned, dense, first=3)
    apart = torch.cat([head.sampled(pruned[n : n + 1], dense[n : n + 1], first=3 + n)[0] for n in range(4)])
    assert torch.equal(together, apart)
