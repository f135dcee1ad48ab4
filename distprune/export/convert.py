"""Rewriting a checkpoint of an earlier version as one of today's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from torch import Tensor

from distprune.checkpoint.durable import sync_tree, write_tensors
from distprune.checkpoint.layout import find_entry, find_weight_files, read_json
from distprune.errors import InputError
from distprune.export.earlier_version import PAIRS, base_config, converted_layer, is_earlier, said_shapes
from distprune.export.layouts import modeling_files, output_config, plainest_layout
from distprune.layers.architecture import Architecture

#: Files that are written anew or that belong to the old code.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py")


class Weights:
    """The tensors of a folder's safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path):
        self._files = find_weight_files(folder, find_entry(folder, lambda name: (folder / name).exists()))
        self._open = [safe_open(file, "pt") for file in self._files]
        self._where = {name: file for file in self._open for name in file.keys()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def read(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): self.read(name) for name in self if name.startswith(prefix)}


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
            f"{folder / 'config.json'} is not of a checkpoint that an earlier version has written in its layout per-layer, so "
            "there is nothing to convert. distprune.load opens all others."
        )
    if output.exists():
        raise InputError(f"{output} exists. Give a folder that doesn't, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        work = Path(temporary) / "converted"
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns(*REPLACED, "__pycache__"))
        _write(described, Weights(folder), work)
        sync_tree(work)
        work.rename(output)


def _write(described: dict, weights: Weights, folder: Path) -> None:
    config = base_config(described)
    architecture = Architecture(config)
    prefixes = [architecture.layer_prefix(index) for index in range(architecture.num_layers)]
    pairs = {index: weights.read(p + PAIRS) for index, p in enumerate(prefixes) if p + PAIRS in set(weights)}
    said = said_shapes(described, pairs)
    layout = plainest_layout(architecture, said)
    text = json.dumps(output_config(architecture, config, said, layout), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name, code in modeling_files(layout).items():
        (folder / name).write_text(code, encoding="utf-8")
    outer = {name: weights.read(name) for name in weights if not name.startswith(tuple(prefixes))}
    layers = (
        {prefix + name: tensor for name, tensor in layer.items()}
        for prefix, layer in (
            (prefix, converted_layer(architecture, index, weights.below(prefix), said[index]))
            for index, prefix in enumerate(prefixes)
        )
    )
    write_shards(folder, [outer], layers, len(prefixes) + 1)


def write_shards(folder: Path, first: list[dict[str, Tensor]], others: Iterator[dict[str, Tensor]], count: int) -> None:
    """A file for each of so many groups of tensors, and the index of all."""
    weight_map, size = {}, 0
    for number, tensors in enumerate((group for groups in (first, others) for group in groups), 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        write_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
