"""Tensors from the files they lie in, each mapped into memory by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distprune.checkpoint.fp8 import dequantized, dequantized_rows
from distprune.checkpoint.headers import LENGTH_BYTES
from distprune.checkpoint.infos import PackedInfo, ScaledInfo, TensorInfo
from distprune.checkpoint.mxfp4 import unpacked
from distprune.checkpoint.objects import read_objects
from distprune.errors import Unreachable
from distprune.storage import is_remote


class TensorSource(Protocol):
    """Where a checkpoint's tensors come from; :class:`TensorFiles` unless its files are on another machine."""

    def read(self, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        """Tensors in the dtypes that their infos say, on the CPU, private to the caller."""

    def read_rows(self, name: str, info: TensorInfo, rows: Tensor) -> Tensor:
        """Some rows of one tensor; ``rows`` holds int64 indices of any shape."""


class TensorFiles:
    """Reads from the files that the headers were read from, or from where ``locate`` finds them."""

    def locate(self, file: Path) -> Path:
        return file

    def read(self, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
        stored = self._read_stored(infos)
        return {name: _as_read(info, stored[name]) for name, info in infos.items()}

    def read_rows(self, name: str, info: TensorInfo, rows: Tensor) -> Tensor:
        first, last = torch.aminmax(rows) if rows.numel() else (torch.tensor(0), torch.tensor(-1))
        part, begin = info.around(int(first), int(last) + 1)
        stored, rows = self._read_stored({name: part})[name], rows - begin
        if isinstance(part, ScaledInfo):
            return dequantized_rows(*stored, part.block, rows)
        chosen = _as_read(part, [tensor[rows.flatten()] for tensor in stored])
        return chosen.reshape(*rows.shape, *part.shape[1:])

    def _read_stored(self, infos: Mapping[str, TensorInfo]) -> dict[str, list[Tensor]]:
        parts = {(name, part): part for name, info in infos.items() for part in info.stored}
        remote = read_objects({key: part for key, part in parts.items() if is_remote(part.file)})
        found = {key: remote[key] if key in remote else self.map(part) for key, part in parts.items()}
        return {name: [found[name, part] for part in info.stored] for name, info in infos.items()}

    def map(self, info: TensorInfo) -> Tensor:
        try:
            return map_tensor(self.locate(info.file), info)
        except FileNotFoundError as error:
            raise Unreachable(f"{info.file}: is gone. Leave a model where it is while it is pruned.") from error


def _as_read(info: TensorInfo, stored: list[Tensor]) -> Tensor:
    """What is stored as several tensors in files, as one."""
    if isinstance(info, ScaledInfo):
        return dequantized(*stored, info.block)
    return unpacked(*stored) if isinstance(info, PackedInfo) else stored[0]


def map_tensor(file: Path, info: TensorInfo) -> Tensor:
    """A tensor as a private mapping of its own bytes: its pages are read when they are first touched.

    safetensors maps the whole file, which a machine refuses for one that is larger than its memory.

    Raises:
        FileNotFoundError: there is no such file.
        Unreachable: it can't be read, or is shorter than its header said.
    """
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    try:
        with file.open("rb") as stream:
            start = LENGTH_BYTES + int.from_bytes(stream.read(LENGTH_BYTES), "little") + info.begin
            content = np.memmap(stream, dtype=np.uint8, mode="c", offset=start, shape=(info.nbytes,))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"{file}: can't be read any more ({error}). Do not change a model while it is pruned."
        ) from error
    return torch.from_numpy(content).view(info.dtype).reshape(info.shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether all of its numbers are."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # NaN and infinity both reach the extremes, which are found ten times as fast as isfinite is done.
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))
