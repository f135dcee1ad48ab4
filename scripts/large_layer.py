"""Memory and time that pruning one layer of a large model takes, in this process.

    python scripts/large_layer.py 70b --method olica --sparsity 0.3

The layer is a Llama's of that size with random weights in bfloat16, which are written to a temporary folder and read as
any checkpoint is; it is pruned on 64 windows of 128 random hidden states. The peak is of the whole process: Python,
torch and the weights' file, as far as it is mapped into memory, included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from distprune.budgets import ParameterTarget
from distprune.config import PruneConfig
from distprune.engine.memory import peak_memory
from distprune.engine.tasks import LayerTasks
from distprune.families import family_of
from distprune.planning.shapes import expected_shapes

GEOMETRIES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}
GIB = 2**30


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as folder:
        write_model(Path(folder), GEOMETRIES[arguments.size])
        config = PruneConfig(model=folder, output="unused", method=arguments.method, micro_batch=arguments.micro_batch)
        tasks = LayerTasks(config, Path(folder), Path("unused"), torch.device("cpu"))
        target = ParameterTarget(tasks.dense, arguments.sparsity)
        planned = expected_shapes(tasks.method, target, align=8)[0]
        states = torch.randn(64, 128, tasks.dense.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
        profile = {}
        if tasks.method.dense_moments(tasks.dense.layer_shape(0)):
            _, profile = tasks.sweep(0, states)
            print(f"peak after the dense pass: {peak_memory().resident / GIB:.2f} GiB", flush=True)
        result = tasks.prune(0, states, planned, profile, propagate=True)
    print(", ".join(f"{step} {seconds:.1f} s" for step, seconds in result.report.seconds.items()))
    print(f"peak: {peak_memory().resident / GIB:.2f} GiB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=GEOMETRIES)
    parser.add_argument("--method", default="olica")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def write_model(folder: Path, geometry: dict[str, int]) -> None:
    """A model of two layers, of which the first is there."""
    config = LlamaConfig(**geometry, num_hidden_layers=2, vocab_size=8, dtype="bfloat16", tie_word_embeddings=True)
    config.save_pretrained(folder)
    family, generator = family_of(config), torch.Generator().manual_seed(0)
    dense = family.dense_config(config)
    shapes = family.outer_shapes(dense) | family.layer_shapes(dense, 0)
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        save_file({name: weight + 1 if len(shape) == 1 else weight}, folder / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    main()
