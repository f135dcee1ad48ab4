"""Models of random weights, such as in the shapes of large ones, and calibration sets for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from distprune.calibration import CalibrationMetadata, tokenizer_fingerprint, write_calibration
from distprune.checkpoint import ShardWriter
from distprune.export.output_config import output_config, plainest_layout
from distprune.layers.architecture import Architecture
from distprune.layers.module import say_shape
from distprune.layers.shapes import LayerShape
from distprune.layers.tree import build_on_meta
from distprune.modeling.loading import class_of

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


@torch.no_grad()
def make_model(
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    gain: float = 0.5,
) -> None:
    """Write a sharded checkpoint of random weights, drawn on ``device`` with a layer in memory at a time.

    A linear map makes what it gets ``gain`` times as large, and has a bias of zero; everything else is as transformers
    initializes it.
    """
    architecture = Architecture(config)
    config.architectures, config.dtype = [type(architecture.model).__name__], dtype
    config.save_pretrained(folder)
    make_tokenizer(folder, config.vocab_size)
    torch.manual_seed(0)
    model, writer = build_on_meta(config), ShardWriter(folder)
    parts = {"outer": [*architecture.outer_tensors()]}
    for index in range(architecture.num_layers):
        parts[f"layer-{index}"] = [
            architecture.layer_prefix(index) + name
            for name in architecture.layer_tensors(index, architecture.dense_shape(index))
        ]
    for part, names in parts.items():
        writer.put(part, random_tensors(model, names, dtype, device, gain))
    writer.assemble(list(parts), folder, max_shard_bytes=1)
    writer.discard()


def make_tokenizer(folder: Path, words: int) -> None:
    """Write a tokenizer of so many words."""
    vocabulary = {f"w{number}": number for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def random_tensors(
    model: PreTrainedModel, names: list[str], dtype: torch.dtype, device: str | torch.device, gain: float
) -> dict[str, Tensor]:
    """Values for some tensors of a model on the meta device, which stays there."""
    drawn: dict[str, Tensor] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(path)
        on_meta = dict(module._parameters)
        for name, parameter in on_meta.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
        initialize(model, module, gain)
        state = module.state_dict(prefix=f"{path}." if path else "")
        drawn |= {name: state[name].to(dtype) for name in names if name.rpartition(".")[0] == path}
        module._parameters.update(on_meta)
    return drawn


def initialize(model: PreTrainedModel, module: nn.Module, gain: float) -> None:
    """Give a module's own parameters their values."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        model._init_weights(module)
        return
    module.weight.normal_(std=gain * module.weight.shape[1] ** -0.5)
    if getattr(module, "bias", None) is not None:
        module.bias.zero_()


def random_pruned(
    architecture: Architecture, shapes: Sequence[LayerShape], *, dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    """A pruned model of random weights, in memory, whose layers have ``shapes``; the first rotary pairs are kept."""
    said = [said_of(architecture, index, shape) for index, shape in enumerate(shapes)]
    config = output_config(architecture, architecture.config, said, plainest_layout(architecture, said))
    return random_of(type(architecture.config).from_dict(config), dtype=dtype, device=device)


def said_of(architecture: Architecture, index: int, shape: LayerShape) -> dict[str, Any]:
    """A layer's shape as a configuration says it."""
    pairs = None
    if shape.attention is not None and architecture.names(index).narrows_pairs(shape.attention):
        pairs = torch.arange(shape.attention.query_key_dim // 2).expand(shape.attention.kv_heads, -1)
    return say_shape(architecture.dense_shape(index), shape, pairs)


def random_of(config: PreTrainedConfig, *, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """A model of random weights, in memory, of a configuration that is a plain one or that of a pruned model."""
    with torch.device(device):
        opener = class_of(config)
        build = opener.from_config if opener is AutoModelForCausalLM else opener._from_config
        return build(config, dtype=dtype).eval()


def make_calibration(path: Path, model: Path, windows: int, length: int) -> np.ndarray:
    """Write a calibration set of random tokens. Returns them, int32 (windows, length)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    vocabulary = len(tokenizer)
    tokens = np.random.default_rng(0).integers(vocabulary, size=(windows, length), dtype=np.int32)
    fingerprint = tokenizer_fingerprint(tokenizer)
    write_calibration(path, tokens, CalibrationMetadata(fingerprint, vocabulary, length, ("random",), 0, False))
    return tokens
