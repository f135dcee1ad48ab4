"""The loss's gradients layer by layer, against transformers' own backward pass over the whole model."""

from __future__ import annotations

import pytest
import torch
from distprune.backward import ALL_TAPS, GRADIENT_TAPS, backward, gradients_tapped
from distprune.forward import TAPS, LayerRunner
from distprune.loss import LossHead, of_head
from gradients import GRADIENTS, assert_same, by_transformers, layer_by_layer
from transformers import AutoModelForCausalLM

from distprune.families import family_of

CASES = {
    "llama": ("llama", {}),
    "llama, tied, with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral, window shorter than the sequence": ("mistral", {"sliding_window": 5}),
    "qwen2, the upper layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(300, (5, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def llama(save_model):
    return AutoModelForCausalLM.from_pretrained(save_model())


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_the_whole_models_backward_pass(save_model, tokens, case):
    model_type, changes = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(save_model(model_type, **changes))
    expected = by_transformers(model, tokens)
    assert_same(layer_by_layer(model, tokens, micro_batch=2), expected, 1e-4)


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


def test_logits_in_parts_give_what_they_give_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden_states, weight = torch.randn(3, 7, 8, generator=generator), torch.randn(20, 8, generator=generator)
    tokens = torch.randint(20, (3, 7), generator=generator)
    given = hidden_states.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        (given[:, :-1] @ weight.double().mT).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    losses.sum().backward()
    for parts in (1, 4, 100):
        monkeypatch.setattr("distprune.loss.TOKENS_AT_ONCE", parts)
        gradient, of_samples = of_head(hidden_states, weight, tokens)
        torch.testing.assert_close(gradient.double(), given.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_samples, losses.detach().unflatten(0, (3, -1)).sum(dim=1), rtol=1e-5, atol=1e-5)
        assert (gradient[:, -1] == 0).all()


def one_layer(model) -> tuple[LayerRunner, object, torch.Tensor]:
    family = family_of(model.config)
    dense, state = family.dense_config(model.config), model.state_dict()
    tensors = {name: state[name] for name in family.layer_shapes(dense, 0)}
    runner = LayerRunner(dense, torch.device("cpu"), torch.float32, 4)
    hidden_states = torch.randn(6, 12, dense.hidden_size, generator=torch.Generator().manual_seed(1))
    return runner, family.layer_from_checkpoint(tensors, dense, 0), hidden_states


def test_only_what_is_asked_for_is_tapped_and_once_a_micro_batch(llama):
    runner, layer, hidden_states = one_layer(llama)
    asked, seen = {"ffn_input", "gate_gradient", "queries"}, []
    backward(runner, layer, 0, hidden_states, hidden_states, observe=lambda taps: seen.append(taps), taps=asked)
    assert [set(batch) for batch in seen] == [asked] * 2
    assert [len(batch["gate_gradient"]) for batch in seen] == [4 * 12, 2 * 12]
    assert not any(tensor.requires_grad for batch in seen for tensor in batch.values())


def test_observing_does_not_change_the_gradient_and_nothing_else_changes(llama):
    runner, layer, hidden_states = one_layer(llama)
    weight, given = layer.gate.weight.clone(), hidden_states.clone()
    plain = backward(runner, layer, 0, hidden_states, hidden_states)
    watched = backward(runner, layer, 0, hidden_states, hidden_states, observe=lambda taps: None, taps=ALL_TAPS)
    assert torch.equal(plain, watched)
    assert torch.equal(layer.gate.weight, weight) and torch.equal(hidden_states, given)
    assert layer.gate.weight.grad is None and not hidden_states.requires_grad


def test_hidden_states_made_in_inference_mode_are_taken(llama):
    runner, layer, hidden_states = one_layer(llama)
    with torch.inference_mode():
        made = hidden_states.clone()
    assert torch.equal(backward(runner, layer, 0, made, made), backward(runner, layer, 0, hidden_states, hidden_states))


def test_hooks_are_gone_when_the_taps_close(llama):
    runner, layer, _ = one_layer(llama)
    module = runner.build(layer, 0, torch.float32)
    hooks = lambda: sum(len(part._forward_hooks) for part in module.modules())  # noqa: E731
    with gradients_tapped(module, GRADIENT_TAPS):
        assert hooks() == len(GRADIENT_TAPS) == len(GRADIENTS)
    assert hooks() == 0
    assert ALL_TAPS == TAPS + GRADIENT_TAPS


def test_the_head_leaves_its_tensors_as_they_are(llama, tokens):
    runner, _, _ = one_layer(llama)
    norm, weight = llama.model.norm.weight.detach(), llama.lm_head.weight.detach()
    before = norm.clone(), weight.clone()
    states = torch.randn(5, 16, len(norm))
    LossHead(norm, weight, runner).gradient(states, tokens)
    assert torch.equal(norm, before[0]) and torch.equal(weight, before[1])
