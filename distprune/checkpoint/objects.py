"""Tensors in an object store, of which no more than their own bytes are fetched."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from upath import UPath

from distprune.checkpoint.headers import LENGTH_BYTES
from distprune.checkpoint.infos import TensorInfo
from distprune.errors import Unreachable

# Bytes that are asked for at once. Those of a layer come side by side, since one stream is slower than the network.
PIECE = 32 * 2**20

Key = TypeVar("Key", bound=Hashable)


def read_objects(infos: Mapping[Key, TensorInfo]) -> dict[Key, torch.Tensor]:
    """The tensors, on the CPU and private to the caller.

    Raises:
        FileNotFoundError: there is no such object.
        Unreachable: the store does not give it, or the object is shorter than its header said.
    """
    starts = {file: _data_start(file) for file in {info.file for info in infos.values()}}
    tensors = {}
    for file, start in starts.items():
        here = {name: info for name, info in infos.items() if info.file == file}
        ranges = {name: (start + info.begin, start + info.begin + info.nbytes) for name, info in here.items()}
        for name, content in _read_ranges(file, ranges).items():
            tensors[name] = _tensor(content, here[name])
    return {name: tensors[name] for name in infos}


def _data_start(file: UPath) -> int:
    with _explained(file):
        length = file.fs.cat_file(file.path, start=0, end=LENGTH_BYTES)
    return LENGTH_BYTES + int.from_bytes(length, "little")


def _read_ranges(file: UPath, ranges: Mapping[Key, tuple[int, int]]) -> dict[Key, bytearray]:
    pieces = [
        (name, begin, min(begin + PIECE, end))
        for name, (first, end) in ranges.items()
        for begin in range(first, end, PIECE)
    ]
    contents = {name: bytearray() for name in ranges}
    if not pieces:
        return contents
    names, begins, ends = zip(*pieces, strict=True)
    with _explained(file):
        found = file.fs.cat_ranges([file.path] * len(pieces), list(begins), list(ends), on_error="raise")
    for name, content in zip(names, found, strict=True):
        contents[name] += content
    return contents


def _tensor(content: bytearray, info: TensorInfo) -> torch.Tensor:
    if len(content) != info.nbytes:
        raise Unreachable(f"{info.file}: is shorter than it was. Do not change a model while it is pruned.")
    if not content:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(info.dtype).reshape(info.shape)


@contextmanager
def _explained(file: UPath) -> Iterator[None]:
    """Inside, whatever the store's client raises becomes Unreachable, but that there is no such object."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # the clients of stores share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreachable(f"{file}: can't be read ({reason}). Check the network and your access to it.") from error
