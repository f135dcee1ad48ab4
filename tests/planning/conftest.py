"""Checkpoints that are headers and nothing else, and plans of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from distprune.config import PruneConfig
from distprune.families import family_of
from distprune.planning import Cluster, RunPlan, plan_run

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


def write_headers(folder: Path, **geometry) -> Path:
    """A Llama in bfloat16, a shard a layer, in whose files there is a hole where the weights would be."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **geometry)
    config.save_pretrained(folder)
    family, shards = family_of(config), {}
    for name, shape in family.tensor_shapes(family.dense_config(config)).items():
        number = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{number}.safetensors", {})[name] = shape
    for file, shapes in shards.items():
        write_shard(folder / file, shapes)
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)


@pytest.fixture(scope="session")
def small_headers(tmp_path_factory) -> Callable[..., Path]:
    """Writes the small Llama with another geometry."""
    return lambda **changes: write_headers(tmp_path_factory.mktemp("small"), **SMALL | changes)


@pytest.fixture(scope="session")
def headers_70b(tmp_path_factory) -> Path:
    return write_headers(tmp_path_factory.mktemp("llama-70b"), **LLAMA_70B)


@pytest.fixture(scope="session")
def small(small_headers) -> Path:
    return small_headers()


@pytest.fixture(scope="session")
def plan(small) -> Callable[..., RunPlan]:
    """Plans a run of the small Llama, on two cores and in bfloat16 unless told otherwise."""

    def make(model: Path = small, cluster: Cluster | None = None, rates=None, hardware=None, **options) -> RunPlan:
        config = PruneConfig(model=str(model), output="pruned", **{"dtype": "bfloat16"} | options)
        return plan_run(config, cluster or Cluster(cpus=2), hardware=hardware, rates=rates)

    return make
