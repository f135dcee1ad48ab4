"""Gradients, loss and gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from renamed import enable_checkpointing

EVERY_PARAMETER = {
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "query_key_norm": True,
}


def gradients(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_every_parameter(pruned_model, tokens, tied):
    model = pruned_model(**EVERY_PARAMETER, tie_word_embeddings=tied).train()
    found = gradients(model, tokens)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert [name for name, gradient in found.items() if not gradient.abs().sum() > 0] == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(pruned_model, tokens, reentrant):
    model = pruned_model().train()
    plain = gradients(model, tokens)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    enable_checkpointing(model, {"use_reentrant": reentrant})
    recomputed = gradients(model, tokens)
    assert len(calls) == 2  # once forward, once to recompute
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_the_next_token(pruned_model, tokens):
    labels = tokens.clone()
    labels[:, :5] = -100
    output = pruned_model()(tokens, labels=labels)
    log_probability = output.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(output.loss, -log_probability[:, 4:].mean())


def test_a_training_step_lowers_the_loss(pruned_model, tokens):
    model = pruned_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(tokens, labels=tokens).loss
    before.backward()
    optimizer.step()
    assert model(tokens, labels=tokens).loss < before
