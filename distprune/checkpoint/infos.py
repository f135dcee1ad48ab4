"""What is known of a stored tensor before it is read, and how that travels as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    """A header's entry; of a tensor that is stored with scales, also these, and the shape that one of them covers."""

    scale: ScaleEntry
    block: list[int]


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


def describe(
    file: Path,
    name: str,
    dtype: str,
    shape: list[int],
    data_offsets: tuple[int, int],
    scale: ScaleEntry | None = None,
    block: list[int] | None = None,
) -> TensorInfo:
    """What a header's entry, or :func:`entry_of`, says. InputError: its dtype can't be read."""
    numbers = _describe_plain(file, name, dtype, shape, data_offsets)
    if scale is None:
        return numbers
    entry = dict(scale)
    return with_scale(numbers, _describe_plain(location(entry.pop("file")), name, **entry), tuple(block))


def with_scale(numbers: TensorInfo, scale: TensorInfo, block: tuple[int, ...]) -> ScaledInfo:
    """A tensor that is read in bfloat16 as the product of numbers and their scales, one for each ``block`` of them."""
    dtype = torch.bfloat16
    nbytes = math.prod(numbers.shape) * dtype.itemsize
    return ScaledInfo(numbers.file, dtype, numbers.shape, nbytes, numbers.begin, numbers, scale, block)


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
    [dtype] = [name for name, dtype in DTYPES.items() if dtype == info.dtype]
    return {"dtype": dtype, "shape": list(info.shape), "data_offsets": (info.begin, info.begin + info.nbytes)}
