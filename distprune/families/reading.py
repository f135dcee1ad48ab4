"""Tensors of the module tree, read from a checkpoint whatever they are on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from distprune.families.conversion import NUMBER, Conversion, Dims
from distprune.families.disk_names import DiskNames

#: Numbers that are converted at once, so that a layer's experts don't lie in memory twice.
PIECE = 2**28


class Stored(Protocol):
    """Where tensors are read from, by their names on disk: a ``Checkpoint``."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def read_rows(self, name: str, rows: Tensor) -> Tensor: ...


def read_tensors(
    stored: Stored,
    names: DiskNames,
    dims: Mapping[str, Dims],
    config: PreTrainedConfig,
    experts: range | None = None,
) -> dict[str, Tensor]:
    """Tensors of the dense model by their names in the module tree, on the CPU.

    Args:
        stored: where from.
        names: what they are called there.
        dims: their dimensions, by their names in the module tree.
        config: of the model, or of the layer that they are of.
        experts: where given, every tensor's first dimension counts experts, and no others than these are read.
    """
    made: dict[str, Tensor] = {}
    for conversion in names.conversions_of(dims):
        made |= _read_converted(stored, conversion, dims, config, experts)
    on_disk = {name: names.on_disk(name) for name in dims if name not in made}
    if experts is None:
        found = stored.read(dict.fromkeys(on_disk.values()))
    else:
        found = {name: stored.read_rows(name, _rows(experts)) for name in on_disk.values()}
    return {name: made[name] if name in made else found[on_disk[name]] for name in dims}


def _read_converted(
    stored: Stored,
    conversion: Conversion,
    dims: Mapping[str, Dims],
    config: PreTrainedConfig,
    experts: range | None,
) -> dict[str, Tensor]:
    if not conversion.keeps_experts_apart:
        whole = conversion.from_disk(stored.read(conversion.names_on_disk(dims, config)), dims, config)
        return whole if experts is None else {name: part[experts.start : experts.stop] for name, part in whole.items()}
    [target] = conversion.targets
    count, *each = dims[target]
    experts = range(count) if experts is None else experts

    def convert(piece: range) -> Tensor:
        tensors = _read_experts(stored, conversion, piece)
        return conversion.from_disk(tensors, {target: (len(piece), *each)}, config, piece.start)[target]

    return {target: _joined(map(convert, _split(experts, max(1, PIECE // math.prod(each)))), len(experts))}


def _read_experts(stored: Stored, conversion: Conversion, experts: range) -> dict[str, Tensor]:
    """What some experts are made of, by the names on disk."""
    fused = [source for source in conversion.sources if NUMBER not in source]
    apart = [source.replace(NUMBER, str(i)) for source in conversion.sources if NUMBER in source for i in experts]
    return stored.read(apart) | {name: stored.read_rows(name, _rows(experts)) for name in fused}


def _joined(pieces: Iterator[Tensor], count: int) -> Tensor:
    """Pieces along the first dimension as one tensor, each copied into it before the next is made."""
    first = next(pieces)
    if len(first) == count:
        return first
    result, begin = first.new_empty((count, *first.shape[1:])), len(first)
    result[:begin] = first
    del first
    for piece in pieces:
        result[begin : begin + len(piece)] = piece
        begin += len(piece)
    return result


def _rows(experts: range) -> Tensor:
    return torch.arange(experts.start, experts.stop)


def _split(experts: range, size: int) -> Iterator[range]:
    return (experts[begin : begin + size] for begin in range(0, len(experts), size))
