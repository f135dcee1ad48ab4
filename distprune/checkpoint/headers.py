"""What a safetensors file says about its tensors, read without its data."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from distprune.checkpoint.infos import Entry, TensorInfo, describe
from distprune.errors import InputError

LENGTH_BYTES = 8  # a file begins with the length of its header
LONGEST_HEADER = 100_000_000  # bytes; the format allows no more

Header = TypeAdapter(dict[str, Entry])


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor in a safetensors file, without reading or mapping its data, however large it is.

    InputError: the file is truncated or is not safetensors, or a tensor has a dtype that PyTorch lacks.
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
