"""What a tied configuration means for what is stored, against what transformers makes of the same folder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distprune.checkpoint import Checkpoint
from distprune.engine.run.preflight import dense_model
from distprune.families import tied
from distprune.families.tied import differ_though_tied, untied

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def store(tmp_path):
    """Saves a tied Llama, changes what it stores, and gives it back opened by us and by transformers."""

    def save(change) -> tuple[Checkpoint, LlamaForCausalLM]:
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, intermediate_size=16, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return Checkpoint.open(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    return save


def settled(checkpoint: Checkpoint) -> Checkpoint:
    model = dense_model(checkpoint)
    differ = differ_though_tied(model.architecture.model, checkpoint, model.names)
    return untied(checkpoint) if differ else checkpoint


def changed_at(row: int, dtype=torch.float32):
    """Stores a head that differs from the embedding in one number of a row."""

    def change(tensors):
        head = tensors[EMBEDDING].clone()
        head[row, 3] += 1
        return tensors | {HEAD: head.to(dtype)}

    return change


CASES = {
    "alone": lambda tensors: tensors,
    "a copy beside it": lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()},
    "a copy in another dtype": lambda tensors: (
        tensors | {EMBEDDING: tensors[EMBEDDING].bfloat16().float(), HEAD: tensors[EMBEDDING].bfloat16()}
    ),
    "a head alone": lambda tensors: {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()},
    "another first row": changed_at(0),
    "another last row": changed_at(49),
    "another row in another dtype": changed_at(20, torch.float64),
}


@pytest.mark.parametrize("rows", [7, 50, 1000])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_embedding_and_head_are_those_that_transformers_uses(store, monkeypatch, case, rows):
    checkpoint, opened = store(CASES[case])
    monkeypatch.setattr(tied, "PIECE", rows * 32 * 4)
    found = settled(checkpoint)
    is_tied = opened.lm_head.weight is opened.model.embed_tokens.weight
    assert found.config.tie_word_embeddings == is_tied == ("another" not in case or "copy" in case)
    model = dense_model(found)
    assert model.architecture.is_tied == is_tied
    for name, expected in ((EMBEDDING, opened.model.embed_tokens.weight), (HEAD, opened.lm_head.weight)):
        assert torch.equal(model.read_outer([name])[name].float(), expected)
    assert checkpoint.config.tie_word_embeddings  # what was opened stays as it was


def test_an_untied_model_is_left_as_it_is_and_nothing_of_it_is_read(store):
    checkpoint, _ = store(CASES["another first row"])
    config = LlamaConfig(**{**checkpoint.config.to_dict(), "tie_word_embeddings": False})
    apart = replace(checkpoint, config=config, source=None)
    assert settled(apart) is apart


def test_heads_that_differ_at_once_are_read_no_further(store, monkeypatch):
    checkpoint, _ = store(CASES["another first row"])
    monkeypatch.setattr(tied, "PIECE", 5 * 32 * 4)
    read = []
    monkeypatch.setattr(
        Checkpoint, "read_rows", lambda self, name, rows: read.extend(rows) or self.read([name])[name][rows]
    )
    assert not settled(checkpoint).config.tie_word_embeddings
    assert read == [*range(5), *range(5)]
