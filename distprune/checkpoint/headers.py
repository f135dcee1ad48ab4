"""What a safetensors file says about its tensors, read without its data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from distprune.errors import InputError

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
}
QUANTIZED_DTYPES = ("I4", "I8", "U4", "U32", "F4", "F6", "F8")


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor lies and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor in a safetensors file, without reading its data.

    InputError: the file is truncated or is not safetensors, or a tensor has a dtype that can't be pruned.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            return {name: _describe(file, name, found.get_dtype(), found.get_shape()) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or is not a safetensors file ({error}). Download it again.") from error


def read_byte_ranges(file: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A valid file's raw header, and where each tensor's bytes begin and end in the file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    data_start = 8 + length
    ranges = {name: entry["data_offsets"] for name, entry in entries.items()}
    return header, {name: (data_start + begin, data_start + end) for name, (begin, end) in ranges.items()}


def _describe(file: Path, name: str, stored_dtype: str, shape: list[int]) -> TensorInfo:
    dtype = DTYPES.get(stored_dtype)
    if dtype is None:
        mend = (
            "Quantized checkpoints must be dequantized first: use the model's bf16 or fp16 release."
            if stored_dtype.startswith(QUANTIZED_DTYPES)
            else "Write the model anew in bf16, fp16 or fp32."
        )
        raise InputError(f"{file}: tensor {name} is stored as {stored_dtype}, which can't be pruned. {mend}")
    return TensorInfo(file, dtype, tuple(shape), math.prod(shape) * dtype.itemsize)
