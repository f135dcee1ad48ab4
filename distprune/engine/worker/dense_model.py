"""The dense model: its layers as parts, and their tensors by what the checkpoint calls them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from distprune.checkpoint import Checkpoint, describe, entry_of
from distprune.families.disk_names import DiskNames
from distprune.layers.architecture import Architecture
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.storage import location


@dataclass(frozen=True)
class DenseModel:
    """A language model on disk.

    Attributes:
        architecture: its layers.
        names: what the checkpoint calls its tensors.
        checkpoint: where these are read from.
    """

    architecture: Architecture
    names: DiskNames
    checkpoint: Checkpoint

    # ---------------------------------------------------------------- names

    def layer_names(self, index: int, shape: LayerShape | None = None) -> dict[str, str]:
        """The names on disk of a layer's tensors, by those in its module; of a dense layer, or one of some shape."""
        shape = shape or self.architecture.dense_shape(index)
        prefix = self.architecture.layer_prefix(index)
        return {name: self.names.on_disk(prefix + name) for name in self.architecture.layer_tensors(index, shape)}

    def outer_names(self) -> list[str]:
        """The names on disk of what lies outside the decoder layers, each once, the embedding first."""
        stored = dict(self.names.stored)
        prefix = self.architecture.layers_path + "."
        outer = [name for name in self.architecture.outer_tensors() if name in stored and not name.startswith(prefix)]
        first = self.architecture.embedding_name
        ordered = [first, *(name for name in outer if name != first)]
        # What is stored of a tied head beside the embedding is copied too.
        ordered += [self.architecture.head_name] if self.architecture.head_name in stored else []
        return [*dict.fromkeys(stored[name] for name in ordered)]

    # ---------------------------------------------------------------- reading

    def read_state(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors by their names in its module, on the CPU."""
        names = self.layer_names(index)
        tensors = self.checkpoint.read(dict.fromkeys(names.values()))
        return {name: tensors[stored] for name, stored in names.items()}

    def read_layer(self, index: int) -> DecoderLayer:
        """A layer, on the CPU."""
        return self.architecture.layer_from_state(index, self.read_state(index))

    def read_outer(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors outside the layers by their names in the model's state dict, on the CPU."""
        stored = {name: self.names.on_disk(name) for name in names}
        tensors = self.checkpoint.read(dict.fromkeys(stored.values()))
        return {name: tensors[on_disk] for name, on_disk in stored.items()}

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor outside the layers."""
        return self.checkpoint.read_rows(self.names.on_disk(name), rows)

    def check_layer_finite(self, index: int) -> None:
        """Read a layer's weights; InputError if one is NaN or infinite."""
        self.checkpoint.check_finite(self.layer_names(index).values())

    def check_outer_finite(self) -> None:
        """The same for the tensors outside the decoder layers."""
        self.checkpoint.check_finite(self.outer_names())

    # ---------------------------------------------------------------- layers that are done

    def to_disk(self, index: int, layer: DecoderLayer) -> dict[str, Tensor]:
        """A pruned layer's tensors by their names on disk."""
        prefix = self.architecture.layer_prefix(index)
        state = self.architecture.names(index).state_of(layer)
        return {self.names.on_disk(prefix + name): tensor for name, tensor in state.items()}

    def from_disk(
        self, index: int, tensors: Mapping[str, Tensor], shape: LayerShape, rotary_pairs: Tensor | None
    ) -> DecoderLayer:
        """The inverse of :meth:`to_disk`, for a layer of some shape that has kept these rotary pairs."""
        state = {name: tensors[stored] for name, stored in self.layer_names(index, shape).items()}
        return self.architecture.names(index).layer_from_state(state, shape, rotary_pairs)

    # ---------------------------------------------------------------- as text

    def to_json(self) -> dict[str, Any]:
        """What JSON can say of the model, for :meth:`from_json`."""
        config, tensors = self.architecture.config, self.checkpoint.tensors
        return {
            "config": json.loads(config.to_json_string(use_diff=False)),
            "names": self.names.to_json(),
            "path": str(self.checkpoint.path),
            "tensors": {name: {"file": str(info.file)} | entry_of(info) for name, info in tensors.items()},
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> DenseModel:
        """The model that :meth:`to_json` said, its configuration in transformers' own class."""
        config = type(AutoConfig.for_model(said["config"]["model_type"])).from_dict(said["config"])
        tensors = {
            name: describe(location(entry.pop("file")), name, **entry) for name, entry in said["tensors"].items()
        }
        checkpoint = Checkpoint(Path(said["path"]), config, tensors)
        return cls(Architecture(config), DiskNames.from_json(said["names"]), checkpoint)


def elements(tensors: Mapping[str, torch.Size | tuple[int, ...]]) -> int:
    """Numbers in tensors of these dimensions."""
    return sum(torch.Size(dims).numel() for dims in tensors.values())
