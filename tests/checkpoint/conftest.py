"""Tiny random models on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """A two-layer Llama in bf16 with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def single_file(tiny_model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The tiny model as one model.safetensors."""
    folder = tmp_path / "single"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(tiny_model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The tiny model as several shards with an index."""
    folder = tmp_path / "sharded"
    tiny_model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder
