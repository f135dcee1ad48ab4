"""Rewriting a checkpoint of an earlier version as this version writes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from distprune.checkpoint import Checkpoint
from distprune.checkpoint.durable import sync_tree, write_tensors
from distprune.checkpoint.layout import read_json
from distprune.errors import InputError
from distprune.export.earlier_version import PAIRS, base_config, converted_layer, is_earlier, said_shapes
from distprune.export.output_config import modeling_files, output_config, plainest_layout
from distprune.export.said_shapes import Said
from distprune.layers.architecture import Architecture

#: Files that are written anew or that belong to the old code.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py")


def convert(folder: Path, output: Path) -> None:
    """Write the checkpoint of an earlier version in ``folder`` to ``output`` as this version writes it.

    Reads and writes a layer at a time. Side files, tokenizer and the like, are copied. ``output`` appears when all of
    it is written.

    Raises:
        InputError: ``folder`` holds no such checkpoint, or ``output`` exists.
    """
    folder, output = Path(folder), Path(output)
    described = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not is_earlier(described):
        raise InputError(
            f"{folder / 'config.json'} is not of a checkpoint that an earlier version has written in its layout "
            "per-layer, so there is nothing to convert. distprune.load opens all others."
        )
    if output.exists():
        raise InputError(f"{output} exists. Give a folder that doesn't, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        work = Path(temporary) / "converted"
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns(*REPLACED, "__pycache__"))
        _write(described, Checkpoint.open(folder), work)
        sync_tree(work)
        work.rename(output)


def _write(described: dict, checkpoint: Checkpoint, folder: Path) -> None:
    config = base_config(described)
    architecture = Architecture(config)
    prefixes = [architecture.layer_prefix(index) for index in range(architecture.num_layers)]
    pairs = {
        index: checkpoint.read([prefix + PAIRS])[prefix + PAIRS]
        for index, prefix in enumerate(prefixes)
        if prefix + PAIRS in checkpoint.tensors
    }
    said = said_shapes(described, pairs)
    layout = plainest_layout(architecture, said)
    text = json.dumps(output_config(architecture, config, said, layout), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name, code in modeling_files(layout).items():
        (folder / name).write_text(code, encoding="utf-8")
    groups = [[name for name in checkpoint.tensors if name.startswith(prefix)] for prefix in prefixes]
    outer = sorted(checkpoint.tensors.keys() - {name for group in groups for name in group})
    layers = (_converted(checkpoint, group, architecture, index, said[index]) for index, group in enumerate(groups))
    write_shards(folder, chain([checkpoint.read(outer)], layers), len(groups) + 1)


def _converted(
    checkpoint: Checkpoint, names: list[str], architecture: Architecture, index: int, said: Said
) -> dict[str, Tensor]:
    prefix = architecture.layer_prefix(index)
    state = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.read(names).items()}
    return {prefix + name: tensor for name, tensor in converted_layer(architecture, index, state, said).items()}


def write_shards(folder: Path, groups: Iterable[dict[str, Tensor]], count: int) -> None:
    """A file for each of so many groups of tensors, and the index of all."""
    weight_map, size = {}, 0
    for number, tensors in enumerate(groups, 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        write_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
