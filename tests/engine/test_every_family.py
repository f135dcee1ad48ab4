"""Whole runs over a random model of every family: what pruning doesn't touch is on disk as it was, under its name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from distprune.layers.architecture import Architecture

GROUPED = {"head_dim": 16}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": GROUPED,
    "qwen2": {},
    "qwen3": GROUPED,
    "phi3": {"pad_token_id": 0},
    "gemma": GROUPED,
    "gemma2": GROUPED | {"sliding_window": 8},
    "gemma3_text": GROUPED | {"sliding_window": 8},
    "glm": GROUPED | {"pad_token_id": 0},
    "glm4": GROUPED | {"pad_token_id": 0},
    "olmo2": {"pad_token_id": 0},
    "olmo3": {"pad_token_id": 0},
    "granite": {},
    "starcoder2": {},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "smollm3": {"pad_token_id": 0},
    "exaone4": {},
    "ernie4_5": GROUPED,
    "seed_oss": GROUPED,
    "nemotron": {},
    "arcee": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 64},
    "qwen3_5_text": GROUPED,
}


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(params=FAMILIES)
def model(request, save_model):
    return save_model(request.param, num_hidden_layers=4, **FAMILIES[request.param])


def test_at_sparsity_0_every_tensor_is_as_it_was(model, prune_here, tmp_path):
    record = prune_here(tmp_path / "pruned", model, method="magnitude", sparsity=0, distill=None)
    before, after = stored(model), stored(tmp_path / "pruned")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record.layout == "stock"


def test_what_pruning_does_not_know_is_as_it_was(model, prune_here, tmp_path):
    record = prune_here(tmp_path / "pruned", model, method="llm-pruner", sparsity=0.1, distill=None)
    assert record.decoder_sparsity == pytest.approx(0.1, abs=0.04)
    before, after = stored(model), stored(tmp_path / "pruned")
    assert before.keys() == after.keys()
    architecture = Architecture(AutoConfig.from_pretrained(model))
    untouched = {*architecture.outer_tensors()}
    for index in range(architecture.num_layers):
        untouched |= {architecture.layer_prefix(index) + name for name in architecture.rest_tensors(index)}
    assert all(torch.equal(before[name], after[name]) for name in untouched & before.keys())


@pytest.mark.parametrize("objective", ["layers", "logits"])
def test_it_is_distilled(model, prune_here, tmp_path, objective):
    distill = {"objective": objective, "batch": 2, "learning_rate": 1e-4}
    record = prune_here(tmp_path / "pruned", model, method="wanda-sp", sparsity=0.1, distill=distill)
    assert any(layer.distillation.kept for layer in record.layers)
