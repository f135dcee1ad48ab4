"""A safetensors file whose tensors come in pieces, so that no more than a piece is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from distprune.checkpoint.durable import move, sync
from distprune.checkpoint.headers import LENGTH_BYTES
from distprune.checkpoint.infos import DTYPES
from distprune.checkpoint.storage_failures import failures_explained, stalls_told, store_failures_explained
from distprune.storage import is_remote, upload

#: The order in which safetensors stores tensors of several dtypes, by their names in headers; names come after that.
STORED_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2",
    "I8", "U8", "BOOL",
)  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PiecewiseFile:
    """An open safetensors file, its header written.

    Attributes:
        size: of the file, in bytes.

    Args:
        file: a new one, of this machine.
        expected: the tensors that it is to hold, of which only names, dtypes and dimensions matter.
    """

    def __init__(self, file: Path, expected: Mapping[str, Tensor]):
        self._file, self._dtypes = file, {name: tensor.dtype for name, tensor in expected.items()}
        ordered = sorted(expected.items(), key=lambda item: (STORED_ORDER.index(NAMES[item[1].dtype]), item[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places, self._ends, end = dict[str, int](), dict[str, int](), 0
        for name, tensor in ordered:
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
            self._places[name], self._ends[name] = begin, end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % LENGTH_BYTES)
        self._start = LENGTH_BYTES + len(raw)
        self.size = self._start + end
        with failures_explained(file):
            file.write_bytes(len(raw).to_bytes(LENGTH_BYTES, "little") + raw)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, or what follows of them along their first dimension, cast to their dtypes in the file.

        Raises:
            StorageFailed: there is no room for it, or the file system fails otherwise.
            ValueError: it is more than there is of a tensor.
        """
        with stalls_told(self._file), failures_explained(self._file), self._file.open("r+b") as stream:
            for name, tensor in tensors.items():
                content = tensor.detach().to("cpu", self._dtypes[name]).contiguous().flatten().view(torch.uint8).numpy()
                if self._places[name] + len(content) > self._ends[name]:
                    raise ValueError(f"more is written of tensor {name} than there is of it")
                stream.seek(self._start + self._places[name])
                stream.write(content.data)
                self._places[name] += len(content)

    def check_complete(self) -> None:
        """ValueError: a tensor is not there as a whole."""
        for name, place in self._places.items():
            if place < self._ends[name]:
                raise ValueError(f"not all was written of tensor {name}")


@contextmanager
def piecewise_file(target: Path, expected: Mapping[str, Tensor]) -> Iterator[PiecewiseFile]:
    """Write a safetensors file durably and atomically; it appears at the end of the block, with the bytes that
    :func:`~distprune.checkpoint.durable.write_tensors` would have written.

    Raises:
        StorageFailed: there is no room for it, or the file system fails otherwise.
        ValueError: not all of a tensor was written.
    """
    if is_remote(target):
        with TemporaryDirectory(prefix="distprune-upload-") as folder:
            pieces = PiecewiseFile(Path(folder) / target.name, expected)
            yield pieces
            pieces.check_complete()
            with stalls_told(target), store_failures_explained(target):
                upload(Path(folder) / target.name, target)
        return
    temporary = target.parent / f"{target.name}.tmp"
    try:
        pieces = PiecewiseFile(temporary, expected)
        yield pieces
        pieces.check_complete()
        with stalls_told(target), failures_explained(target):
            sync(temporary)
            move(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
