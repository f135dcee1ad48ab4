"""What a safetensors file says about its tensors, read without its data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from distprune.errors import InputError
from distprune.storage import location

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
QUANTIZED_DTYPES = ("I4", "I8", "U4", "U32", "F4", "F6", "F8")
LENGTH_BYTES = 8  # a file begins with the length of its header
LONGEST_HEADER = 100_000_000  # bytes; the format allows no more

Whole = Annotated[int, Field(ge=0)]


class Entry(TypedDict):
    """A tensor as a header has it. The offsets count from the end of the header."""

    dtype: str
    shape: list[Whole]
    data_offsets: tuple[Whole, Whole]


Header = TypeAdapter(dict[str, Entry])


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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor in a safetensors file, without reading or mapping its data, however large it is.

    InputError: the file is truncated or is not safetensors, or a tensor has a dtype that can't be pruned.
    """
    try:
        raw, data_bytes = _read_raw(file)
        entries = _parse(raw)
    except (OSError, ValueError) as error:
        raise _not_safetensors(file, error) from error
    infos = {name: describe(file, name, **entry) for name, entry in entries.items()}
    if problem := _find_gap(entries, infos, data_bytes):
        raise _not_safetensors(file, problem)
    return infos


def read_byte_ranges(file: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A file's raw header, and where each tensor's bytes begin and end in the file. ValueError: it has none."""
    raw, _ = _read_raw(file)
    start = LENGTH_BYTES + len(raw)
    offsets = {name: entry["data_offsets"] for name, entry in _parse(raw).items()}
    return raw, {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}


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
        raise InputError(f"{file}: tensor {name} is stored as {dtype}, which can't be pruned. {fix}")
    return TensorInfo(file, stored, tuple(shape), math.prod(shape) * stored.itemsize, data_offsets[0])


def entry_of(info: TensorInfo) -> Description:
    """The entry that :func:`describe` reads as this tensor; JSON can hold it."""
    if isinstance(info, ScaledInfo):
        scale = {"file": str(info.scale.file)} | entry_of(info.scale)
        return entry_of(info.numbers) | {"scale": scale, "block": list(info.block)}
    [dtype] = [name for name, dtype in DTYPES.items() if dtype == info.dtype]
    return {"dtype": dtype, "shape": list(info.shape), "data_offsets": (info.begin, info.begin + info.nbytes)}


def _read_raw(file: Path) -> tuple[bytes, int]:
    """The header's bytes, and how many bytes of data follow it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if not 0 < length <= min(LONGEST_HEADER, size - LENGTH_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        return stream.read(length), size - LENGTH_BYTES - length


def _parse(raw: bytes) -> dict[str, Entry]:
    content = json.loads(raw.decode())
    if isinstance(content, dict):
        content.pop("__metadata__", None)
    try:
        return Header.validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc'])) or 'header'}: {problem['msg']}") from None


def _find_gap(entries: dict[str, Entry], infos: dict[str, TensorInfo], data_bytes: int) -> str | None:
    """What is wrong with the tensors' places: they must fill the file's data without overlap or gap."""
    position = 0
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        begin, end = entries[name]["data_offsets"]
        if begin != position or end - begin != infos[name].nbytes:
            return f"tensor {name} at bytes {begin} to {end}, where {infos[name].nbytes} from {position} are its place"
        position = end
    return None if position == data_bytes else f"{data_bytes} bytes of data, and the header tells of {position}"


def _not_safetensors(file: Path, reason: object) -> InputError:
    return InputError(f"{file} is truncated or is not a safetensors file ({reason}). Download it again.")
