"""What is known of a stored tensor before it is read, and how that travels as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from typing_extensions import TypedDict

from distprune.errors import InputError
from distprune.storage import location

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
QUANTIZED_DTYPES = ("I4", "U4", "F4", "F6", "F8")

Whole = Annotated[int, Field(ge=0)]


class Entry(TypedDict):
    """A tensor as a header has it. The offsets count from the end of the header."""

    dtype: str
    shape: list[Whole]
    data_offsets: tuple[Whole, Whole]


class ScaleEntry(Entry):
    """A tensor of scales, which may lie in another file than what they scale."""

    file: str


class Description(Entry, total=False):
    """A header's entry; of a tensor that is stored with scales, also these, and the shape that one of them covers where
    that is not mxfp4's."""

    scale: ScaleEntry
    block: list[int]
    mxfp4_scales: ScaleEntry


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor lies and what it is; ``begin`` is its first byte after the file's header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    begin: int

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors in files that it is read from."""
        return (self,)

    def around(self, start: int, stop: int) -> tuple[TensorInfo, int]:
        """The smallest part of the tensor that holds its rows (first dimension) from start to stop and can be read by
        itself, and its first row."""
        return self._rows(start, stop), start

    def _rows(self, start: int, stop: int) -> TensorInfo:
        count, *each = self.shape
        size = self.nbytes // count if count else 0
        return replace(self, shape=(stop - start, *each), nbytes=(stop - start) * size, begin=self.begin + start * size)


@dataclass(frozen=True)
class ScaledInfo(TensorInfo):
    """A tensor that is stored as ``numbers`` and ``scale``, and read as their product.

    ``dtype`` and ``nbytes`` are those of the product. One scale covers a ``block`` of numbers, as many dimensions as
    the tensor has; blocks at the ends may be cut off.
    """

    numbers: TensorInfo
    scale: TensorInfo
    block: tuple[int, ...]

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.numbers, self.scale

    def around(self, start: int, stop: int) -> tuple[TensorInfo, int]:
        high, rows = self.block[0], self.shape[0]
        first = start // high
        last = max(first + 1, math.ceil(stop / high))
        if (first, last) == (0, math.ceil(rows / high)):
            return self, 0
        numbers = self.numbers._rows(first * high, min(last * high, rows))
        return with_scale(numbers, self.scale._rows(first, last), self.block), first * high


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """Experts' tensor that is stored in mxfp4, as ``blocks`` (E, rows, G, 16) and ``scales`` (E, rows, G).

    ``dtype``, ``shape`` (E, 32 G, rows) and ``nbytes`` are those of what is read.
    """

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.blocks, self.scales

    def around(self, start: int, stop: int) -> tuple[TensorInfo, int]:
        return unpacked_info(self.blocks._rows(start, stop), self.scales._rows(start, stop)), start


def describe(
    file: Path,
    name: str,
    dtype: str,
    shape: list[int],
    data_offsets: tuple[int, int],
    scale: ScaleEntry | None = None,
    block: list[int] | None = None,
    mxfp4_scales: ScaleEntry | None = None,
) -> TensorInfo:
    """What a header's entry, or :func:`entry_of`, says. InputError: its dtype can't be read."""
    numbers = _describe_plain(file, name, dtype, shape, data_offsets)
    if scale is not None:
        return with_scale(numbers, _describe_scales(name, scale), tuple(block))
    return numbers if mxfp4_scales is None else unpacked_info(numbers, _describe_scales(name, mxfp4_scales))


def with_scale(numbers: TensorInfo, scale: TensorInfo, block: tuple[int, ...]) -> ScaledInfo:
    """A tensor that is read in bfloat16 as the product of numbers and their scales, one for each ``block`` of them."""
    dtype = torch.bfloat16
    nbytes = math.prod(numbers.shape) * dtype.itemsize
    return ScaledInfo(numbers.file, dtype, numbers.shape, nbytes, numbers.begin, numbers, scale, block)


def unpacked_info(blocks: TensorInfo, scales: TensorInfo) -> PackedInfo:
    """A tensor that is read in bfloat16 as what blocks of mxfp4 and their scales mean."""
    experts, rows, groups, size = blocks.shape
    dtype, shape = torch.bfloat16, (experts, 2 * size * groups, rows)
    return PackedInfo(blocks.file, dtype, shape, math.prod(shape) * dtype.itemsize, blocks.begin, blocks, scales)


def _describe_scales(name: str, scales: ScaleEntry) -> TensorInfo:
    entry = dict(scales)
    return _describe_plain(location(entry.pop("file")), name, **entry)


def _describe_plain(file: Path, name: str, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> TensorInfo:
    stored = DTYPES.get(dtype)
    if stored is None:
        fix = (
            "Quantized checkpoints must be dequantized first: use the model's bf16 or fp16 release."
            if dtype.startswith(QUANTIZED_DTYPES)
            else "Write the model anew in bf16, fp16 or fp32."
        )
        raise InputError(f"{file}: tensor {name} is stored as {dtype}, which can't be read. {fix}")
    return TensorInfo(file, stored, tuple(shape), math.prod(shape) * stored.itemsize, data_offsets[0])


def entry_of(info: TensorInfo) -> Description:
    """The entry that :func:`describe` reads as this tensor; JSON can hold it."""
    if isinstance(info, ScaledInfo):
        scale = {"file": str(info.scale.file)} | entry_of(info.scale)
        return entry_of(info.numbers) | {"scale": scale, "block": list(info.block)}
    if isinstance(info, PackedInfo):
        return entry_of(info.blocks) | {"mxfp4_scales": {"file": str(info.scales.file)} | entry_of(info.scales)}
    [dtype] = [name for name, dtype in DTYPES.items() if dtype == info.dtype]
    return {"dtype": dtype, "shape": list(info.shape), "data_offsets": (info.begin, info.begin + info.nbytes)}
