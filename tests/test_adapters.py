"""Adapters of PEFT on a pruned model, by the names that its users know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distprune.modeling import PrunedForCausalLM

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def pruned_path(run) -> Path:
    return run(method="curvature", sparsity=0.5)[0]


@pytest.fixture
def model(pruned_path) -> PrunedForCausalLM:
    """What the default method leaves: dense and factored projections, with linear branches beside the FFNs."""
    model = AutoModelForCausalLM.from_pretrained(pruned_path)
    factored = {name for layer in model.model.layers for name in layer.self_attn.right}
    assert factored >= {"q_proj", "k_proj", "o_proj"}
    assert all("calibration" in layer.mlp.right for layer in model.model.layers)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(1))


def with_adapters(model: PrunedForCausalLM, targets: list[str] | str) -> peft.PeftModel:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=targets)
    return peft.get_peft_model(model, config)


def train(model: peft.PeftModel, tokens: Tensor) -> list[float]:
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
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("targets", [USUAL, "all-linear"], ids=["usual names", "all-linear"])
def test_adapters_train_merge_and_are_saved_with_the_model(model, tokens, tmp_path, targets):
    before = logits(model, tokens)
    linears = {name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    if targets == USUAL:
        linears = {name for name in linears if not name.endswith(".calibration")}
    adapted = with_adapters(model, targets)
    torch.testing.assert_close(logits(adapted, tokens), before)
    assert {name.removeprefix("model.") for name in adapted.base_model.targeted_module_names} == linears

    losses = train(adapted, tokens)
    assert losses == sorted(losses, reverse=True)
    trained = logits(adapted, tokens)
    assert (trained - before).abs().max() > 0.1

    adapted.merge_and_unload().save_pretrained(tmp_path)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
    torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)


def test_adapters_are_saved_alone_and_loaded_onto_the_model(model, pruned_path, tokens, tmp_path):
    adapted = with_adapters(model, USUAL)
    train(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned_path), tmp_path)
    torch.testing.assert_close(logits(loaded, tokens), logits(adapted, tokens))
