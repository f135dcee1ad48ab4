"""The dense model: its layers as parts, and their tensors by what the checkpoint calls them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from distprune.checkpoint import Checkpoint, describe, entry_of
from distprune.families.disk_names import DiskNames
from distprune.families.reading import read_tensors
from distprune.layers.architecture import Architecture, Dims, dims_of
from distprune.layers.parts import DecoderLayer, Experts
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

    def stored_dims(self, index: int, shape: LayerShape | None = None) -> dict[str, Dims]:
        """The dimensions of a layer's tensors by their names on disk; of a dense layer, or one of some shape."""
        dims = self._layer_dims(index, shape)
        imagined = {name: torch.empty(each, device="meta") for name, each in dims.items()}
        return dims_of(self.names.to_disk(imagined, self.architecture.layer_config(index, shape)))

    def stored_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """The dtypes of a dense layer's tensors as they are stored, by their names in its module."""
        prefix = self.architecture.layer_prefix(index)
        sources = self.names.sources_of(self._layer_dims(index), self.architecture.layer_config(index))
        return {name.removeprefix(prefix): self._dtype_of(stored) for name, stored in sources.items()}

    @property
    def embedding_dtype(self) -> torch.dtype:
        """The dtype that the embedding is stored in."""
        return self._dtype_of(self._outer_sources()[self.architecture.embedding_name])

    def outer_names(self) -> list[str]:
        """The names on disk of what lies outside the decoder layers, each once, the embedding first."""
        first, sources = self.architecture.embedding_name, self._outer_sources()
        return [*dict.fromkeys(name for stored in (sources[first], *sources.values()) for name in stored)]

    def _outer_sources(self) -> dict[str, tuple[str, ...]]:
        # What is stored of a tied head beside the embedding is copied too.
        outer = [*self.architecture.outer_tensors(), self.architecture.head_name]
        return self.names.sources_of(self._outer_dims(filter(self.names.has, outer)), self.architecture.config)

    def _outer_dims(self, names: Iterable[str]) -> dict[str, Dims]:
        state = self.architecture.model.state_dict()
        return {name: tuple(state[name].shape) for name in names}

    def _layer_dims(self, index: int, shape: LayerShape | None = None) -> dict[str, Dims]:
        """The dimensions of a layer's tensors by their names in the model's state dict."""
        prefix, shape = self.architecture.layer_prefix(index), shape or self.architecture.dense_shape(index)
        return {prefix + name: dims for name, dims in self.architecture.layer_tensors(index, shape).items()}

    def _dtype_of(self, stored: Iterable[str]) -> torch.dtype:
        """The dtype of tensors on disk; of several in different ones, that which holds the numbers of all."""
        return reduce(torch.promote_types, {self.checkpoint.tensors[name].dtype for name in stored})

    # ---------------------------------------------------------------- reading

    def read_state(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors by their names in its module, on the CPU."""
        return self._read_of_layer(index, self._layer_dims(index))

    def read_layer(self, index: int) -> DecoderLayer:
        """A layer, on the CPU."""
        return self.architecture.layer_from_state(index, self.read_state(index))

    def read_frame(self, index: int, is_wanted: Callable[[str], bool] | None = None) -> DecoderLayer:
        """A layer with a mixture, on the CPU, whose experts are elsewhere.

        Args:
            index: the layer.
            is_wanted: tells by its name in the module whether a tensor is; what is not lies on the meta device too.
        """
        prefix, is_of_experts = self.architecture.layer_prefix(index), self.architecture.names(index).is_of_experts
        names = {name: name.removeprefix(prefix) for name in self._layer_dims(index)}
        here = {
            name: self._layer_dims(index)[name]
            for name, own in names.items()
            if not is_of_experts(own) and (is_wanted is None or is_wanted(own))
        }
        dtypes = self.stored_dtypes(index)
        state = self._read_of_layer(index, here) | {
            own: torch.empty(self._layer_dims(index)[name], dtype=dtypes[own], device="meta")
            for name, own in names.items()
            if name not in here
        }
        layer = self.architecture.layer_from_state(index, state)
        assert isinstance(layer.ffn, Experts)
        return replace(layer, ffn=replace(layer.ffn, elsewhere=torch.arange(layer.ffn.shape.count)))

    def read_chosen(self, index: int, numbers: Tensor) -> dict[str, Tensor]:
        """The tensors of a layer's experts of these ascending numbers, (n,), by their names in its module."""
        is_of_experts = self.architecture.names(index).is_of_experts
        dense = self.architecture.dense_shape(index)
        names = [name for name in self.architecture.layer_tensors(index, dense) if is_of_experts(name)]
        found = [self.read_experts(index, names, run) for run in runs(numbers.tolist())]
        return found[0] if len(found) == 1 else {name: torch.cat([each[name] for each in found]) for name in names}

    def read_experts(self, index: int, names: Iterable[str], experts: range) -> dict[str, Tensor]:
        """Some experts' part of tensors that hold one for each expert of a layer along their first dimension.

        No more of the checkpoint is read, be the experts' tensors stored one by one or together.

        Args:
            index: the layer.
            names: of the tensors in its module, such as ``mlp.experts.down_proj``.
            experts: which experts: ``range(start, stop)``.
        """
        prefix, dims = self.architecture.layer_prefix(index), self._layer_dims(index)
        return self._read_of_layer(index, {prefix + name: dims[prefix + name] for name in names}, experts)

    def _read_of_layer(self, index: int, dims: Mapping[str, Dims], experts: range | None = None) -> dict[str, Tensor]:
        prefix, config = self.architecture.layer_prefix(index), self.architecture.layer_config(index)
        found = read_tensors(self.checkpoint, self.names, dims, config, experts)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def read_outer(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors outside the layers by their names in the model's state dict, on the CPU."""
        return read_tensors(self.checkpoint, self.names, self._outer_dims(names), self.architecture.config)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor outside the layers."""
        if self.names.conversions_of([name]):
            return self.read_outer([name])[name][rows]
        return self.checkpoint.read_rows(self.names.on_disk(name), rows)

    def check_layer_finite(self, index: int) -> None:
        """Read a layer's weights; InputError if one is NaN or infinite."""
        self.checkpoint.check_finite(self.stored_dims(index))

    def check_outer_finite(self) -> None:
        """The same for the tensors outside the decoder layers."""
        self.checkpoint.check_finite(self.outer_names())

    # ---------------------------------------------------------------- layers that are done

    def to_disk(self, index: int, layer: DecoderLayer) -> dict[str, Tensor]:
        """A pruned layer's tensors by their names on disk."""
        state = self.architecture.names(index).state_of(layer)
        return self.state_to_disk(index, state, layer.shape)

    def state_to_disk(
        self, index: int, state: Mapping[str, Tensor], shape: LayerShape, first_expert: int = 0
    ) -> dict[str, Tensor]:
        """Tensors of a pruned layer as they are stored, by their names on disk.

        Args:
            index: the layer.
            state: some or all of its tensors, by their names in its module. Those of its experts may be some experts'
                part; where experts are stored together, what these give is to be joined along the first dimension.
            shape: the layer's.
            first_expert: the number in the pruned layer of the first expert in ``state``.
        """
        prefix, config = self.architecture.layer_prefix(index), self.architecture.layer_config(index, shape)
        made = self.names.to_disk({prefix + name: tensor for name, tensor in state.items()}, config, first_expert)
        # What is one tensor in the module has one dtype there, and may have had several on disk.
        stored = self.checkpoint.tensors
        return {name: tensor.to(stored[name].dtype) if name in stored else tensor for name, tensor in made.items()}

    def from_disk(
        self, index: int, tensors: Mapping[str, Tensor], shape: LayerShape, rotary_pairs: Tensor | None
    ) -> DecoderLayer:
        """The inverse of :meth:`to_disk`, for a layer of some shape that has kept these rotary pairs."""
        prefix, config = self.architecture.layer_prefix(index), self.architecture.layer_config(index, shape)
        found = self.names.from_disk(tensors, self._layer_dims(index, shape), config)
        state = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
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


def runs(numbers: list[int]) -> list[range]:
    """Ascending numbers as ranges of neighbours."""
    starts = [place for place, number in enumerate(numbers) if place == 0 or numbers[place - 1] != number - 1]
    ends = [*starts[1:], len(numbers)]
    return [range(numbers[start], numbers[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]


def elements(tensors: Mapping[str, torch.Size | tuple[int, ...]]) -> int:
    """Numbers in tensors of these dimensions."""
    return sum(torch.Size(dims).numel() for dims in tensors.values())
