"""Where a worker writes a layer piece by piece: to the folder of parts, or for the driver to write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from distprune.checkpoint import PartFolder, WrittenFile
from distprune.checkpoint.piecewise import PiecewiseFile


class PiecewiseTarget(Protocol):
    """What takes a layer's tensors by their names on disk."""

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, or what follows of them along their first dimension."""

    def written(self) -> Mapping[str, Tensor] | WrittenFile:
        """What has become of all of them."""


class FileTarget:
    """A file of the folder of parts."""

    def __init__(self, pieces: PiecewiseFile, file: WrittenFile):
        self._file, self.write = file, pieces.write

    def written(self) -> WrittenFile:
        return self._file


class MemoryTarget:
    """Memory, where this node doesn't see the folder."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Tensor]] = defaultdict(list)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._pieces[name].append(tensor)

    def written(self) -> dict[str, Tensor]:
        return {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in self._pieces.items()}


@contextmanager
def target_of(parts: PartFolder | None, expected: Mapping[str, Tensor]) -> Iterator[PiecewiseTarget]:
    """What takes these tensors, of which only names, dtypes and dimensions are known."""
    if parts is None:
        yield MemoryTarget()
        return
    with parts.piecewise(expected) as (pieces, file):
        yield FileTarget(pieces, file)
