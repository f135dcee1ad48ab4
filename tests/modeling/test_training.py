"""Gradients, checkpointing of activations, adapters, and transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from renamed import enable_checkpointing
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from distprune.modeling import load

USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def unused(name: str) -> bool:
    """Norms before parts that are not there."""
    return name.endswith(("layers.0.input_layernorm.weight", "layers.4.post_attention_layernorm.weight"))


def test_gradients_reach_every_parameter(checkpoint, tokens):
    model = load(checkpoint.folder).train()
    found = gradients(model, tokens)
    without = [name for name, _ in model.named_parameters() if not (name in found and found[name].abs().sum() > 0)]
    assert [name for name in without if not (checkpoint.layout == "free" and unused(name))] == []


def test_loss_is_that_of_the_dense_model(checkpoint, tokens):
    found, expected = (model(tokens, labels=tokens).loss for model in (load(checkpoint.folder), checkpoint.oracle))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_activations_gives_the_same_gradients(checkpoint, tokens, reentrant):
    model = load(checkpoint.folder).train()
    plain, calls = gradients(model, tokens), []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    enable_checkpointing(model, {"use_reentrant": reentrant})
    recomputed = gradients(model, tokens)
    assert len(calls) == 2  # once forward, once to recompute
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_trainer_trains_and_saves(checkpoint, tokens, tmp_path):
    model = load(checkpoint.folder)
    before = model(tokens, labels=tokens).loss.item()
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    trained = load(tmp_path / "saved")
    assert trained(tokens, labels=tokens).loss.item() < before
    torch.testing.assert_close(trained(tokens).logits, model.eval()(tokens).logits)


# ---------------------------------------------------------------- adapters


peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")


def with_adapters(model: nn.Module, targets: list[str] | str) -> peft.PeftModel:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=targets)
    return peft.get_peft_model(model, config)


def train_adapters(model: peft.PeftModel, tokens: Tensor) -> list[float]:
    """The losses of three steps, whose gradients must reach every adapter."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert unreached == []
    return losses


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("targets", [USUAL, "all-linear"], ids=["usual names", "all-linear"])
def test_adapters_train_merge_and_are_saved_with_the_model(checkpoint, tokens, tmp_path, targets):
    model = load(checkpoint.folder)
    before = logits(model, tokens)
    linears = {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    if targets == USUAL:
        linears = {name for name in linears if not name.endswith(".branch")}
    adapted = with_adapters(model, targets)
    torch.testing.assert_close(logits(adapted, tokens), before)
    assert {name.removeprefix("model.") for name in adapted.base_model.targeted_module_names} == linears
    losses = train_adapters(adapted, tokens)
    assert losses == sorted(losses, reverse=True)
    trained = logits(adapted, tokens)
    assert (trained - before).abs().max() > 0.1
    adapted.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path), tokens), trained, atol=2e-4, rtol=2e-4)


def test_adapters_are_saved_alone_and_loaded_onto_the_model(checkpoint, tokens, tmp_path):
    adapted = with_adapters(load(checkpoint.folder), USUAL)
    train_adapters(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(checkpoint.folder), tmp_path)
    torch.testing.assert_close(logits(loaded, tokens), logits(adapted, tokens))
