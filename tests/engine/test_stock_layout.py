"""At sparsity 0 the result is the model itself, in its own architecture."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}],
    ids=["grouped queries", "tied embeddings", "multi-head"],
)
@torch.no_grad()
def test_nothing_removed_gives_the_stock_architecture_and_bit_equal_logits(run, save_model, changes):
    dense_path = save_model(**changes)
    folder, record = run(dense_path, sparsity=0, workers=2)

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    assert record.layout == "stock"
    assert record.total_parameters_after == record.total_parameters_before

    ids = torch.arange(48).reshape(2, 24)
    pruned, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, dense_path))
    assert type(pruned) is LlamaForCausalLM
    assert torch.equal(pruned(ids).logits, dense(ids).logits)


@torch.no_grad()
def test_a_pruned_stock_layout_opens_as_the_original_architecture(run, save_model):
    dense_path = save_model()
    folder, record = run(dense_path, method="magnitude", sparsity=0.3, layout="stock")
    assert record.layout == "stock" and not list(folder.glob("*.py"))
    pruned, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, dense_path))
    assert type(pruned) is LlamaForCausalLM
    assert pruned.config.intermediate_size < dense.config.intermediate_size
    assert pruned(torch.arange(24)[None]).logits.isfinite().all()
