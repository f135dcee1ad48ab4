"""Checkpoints of random weights in the shapes of large models, and calibration sets for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from distprune.calibration import CalibrationMetadata, tokenizer_fingerprint, write_calibration
from distprune.checkpoint import ShardWriter
from distprune.families import family_of

SHAPES = {
    "tiny": {
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "vocab_size": 512,
    },
    "7b": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "8b": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "vocab_size": 32000,
    },
    "405b": {
        "hidden_size": 16384,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "vocab_size": 32000,
    },
}
CONTEXT = 8192  # tokens


def config_of(shape: str, **changes: object) -> LlamaConfig:
    """A Llama of one of :data:`SHAPES`."""
    return LlamaConfig(max_position_embeddings=CONTEXT, **SHAPES[shape] | changes)


def make_model(
    folder: Path,
    config: LlamaConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    gain: float = 0.5,
) -> None:
    """Write a sharded checkpoint of random weights, drawn on ``device`` with a layer in memory at a time.

    A matrix makes what it multiplies ``gain`` times as large.
    """
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    family = family_of(config)
    dense = family.dense_config(config)
    generator = torch.Generator(device).manual_seed(0)
    parts = {"outer": family.outer_shapes(dense)}
    parts |= {f"layer-{index}": family.layer_shapes(dense, index) for index in range(config.num_hidden_layers)}
    writer = ShardWriter(folder)
    for part, shapes in parts.items():
        writer.put(part, {name: random_tensor(shape, dtype, gain, generator) for name, shape in shapes.items()})
    writer.assemble(list(parts), folder, max_shard_bytes=1)
    writer.discard()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, gain: float, generator: torch.Generator) -> torch.Tensor:
    """Normal entries; ones where there is a single dimension, as norms have."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    empty = torch.empty(shape, dtype=dtype, device=generator.device)
    return empty.normal_(std=gain * shape[1] ** -0.5, generator=generator)


def make_calibration(path: Path, model: Path, windows: int, length: int) -> np.ndarray:
    """Write a calibration set of random tokens. Returns them, int32 (windows, length)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    vocabulary = len(tokenizer)
    tokens = np.random.default_rng(0).integers(vocabulary, size=(windows, length), dtype=np.int32)
    fingerprint = tokenizer_fingerprint(tokenizer)
    write_calibration(path, tokens, CalibrationMetadata(fingerprint, vocabulary, length, ("random",), 0, False))
    return tokens
