"""Models of which distprune prunes a part: the rest goes to the result bit by bit under its own name, and is told of."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from distprune import load


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def vision_language_model(tmp_path_factory, tokenizer):
    """A random Gemma 3 of two layers that sees."""
    path = tmp_path_factory.mktemp("gemma3")
    text = {
        "model_type": "gemma3_text",
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "sliding_window": 8,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_language_model_is_pruned_and_the_rest_carried_through(
    vision_language_model, prune_here, calibrate, tmp_path
):
    output = tmp_path / "pruned"
    record = prune_here(output, vision_language_model, method="wanda-sp", sparsity=0.3, distill=None)
    before, after = stored(vision_language_model), stored(output)
    assert before.keys() == after.keys()
    seeing = [name for name in before if "language_model" not in name]
    assert seeing and all(torch.equal(before[name], after[name]) for name in seeing)
    assert record.decoder_sparsity == pytest.approx(0.3, abs=0.02)
    assert record.left_alone_share == pytest.approx(
        sum(before[name].numel() for name in seeing if "lm_head" not in name) / sum(map(torch.numel, before.values()))
    )
    [note] = [note for note in record.notes if note.startswith("Left alone")]
    assert "vision_tower" in note
    model = load(output, dtype=torch.float32)
    assert type(model).__name__.removeprefix("Pruned") == "Gemma3ForConditionalGeneration"
    ids = torch.arange(3, 15)[None]
    assert model(ids).logits.isfinite().all()


def test_extra_tensors_are_carried_through(save_model, prune_here, tmp_path):
    model = save_model(num_hidden_layers=3)
    file = model / "model.safetensors"
    extra = {"model.mtp.proj.weight": torch.randn(8, 4), "model.layers.1.self_attn.extra": torch.arange(5)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    record = prune_here(tmp_path / "pruned", model, distill=None, method="flap")
    after = stored(tmp_path / "pruned")
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())
    assert sum(record.left_alone.values()) == 37


@pytest.mark.parametrize("distill", [None, {"batch": 2}, {"batch": 2, "train": "lora"}])
def test_a_mixer_that_is_not_known_is_left_alone_and_told_of(save_model, prune_here, tmp_path, distill):
    mixer = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    mixer |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    model = save_model("qwen3_5_text", head_dim=16, **mixer)
    record = prune_here(tmp_path / "pruned", model, method="flap", sparsity=0.1, distill=distill)
    before, after = stored(model), stored(tmp_path / "pruned")
    mixers = [name for name in before if "linear_attn" in name]
    assert mixers and all(torch.equal(before[name], after[name]) for name in mixers)
    assert [*record.left_alone] == ["linear_attn of 3 layers"]
    assert record.left_alone_share > 0.1
