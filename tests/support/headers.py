"""Checkpoints that are headers and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig

from distprune.layers.tree import build_on_meta


def write_headers(folder: Path, config: PreTrainedConfig | None = None, **geometry) -> Path:
    """A model in bfloat16, a Llama of that geometry by default, a shard a layer, in whose files there is a hole where
    the weights would be."""
    config = config or LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **geometry)
    config.save_pretrained(folder)
    model, shards = build_on_meta(config), {}
    head = f"{next(name for name, part in model.named_modules() if part is model.get_output_embeddings())}.weight"
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == head:
            continue
        number = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{number}.safetensors", {})[name] = tuple(tensor.shape)
    for file, shapes in shards.items():
        write_shard(folder / file, shapes)
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A shard in bfloat16 of tensors of those shapes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
