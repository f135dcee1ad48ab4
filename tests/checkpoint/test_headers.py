"""Headers and tensors of files that no machine could map whole, and headers that lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distprune import InputError
from distprune.checkpoint.headers import read_header
from distprune.checkpoint.tensors import map_tensor

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(file: Path, header: object, data_bytes: int) -> Path:
    """A safetensors file with a hole where its data would be."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + data_bytes)
    return file


def test_a_file_larger_than_memory_is_read(tmp_path):
    size = 141_000_000_000
    header = {
        "huge": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]},
        "small": {"dtype": "BF16", "shape": [3], "data_offsets": [size, size + 6]},
    }
    file = write(tmp_path / "model.safetensors", header, size + 6)
    with file.open("r+b") as stream:
        stream.seek(-6, 2)
        stream.write(torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
    infos = read_header(file)
    assert infos["huge"].nbytes == size
    assert map_tensor(file, infos["small"]).tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (5,), (2, 3, 4)])
def test_tensors_are_what_safetensors_wrote(tmp_path, dtype, shape):
    torch.manual_seed(0)
    tensors = {"first": torch.ones(3).to(torch.uint8), "x": (torch.randn(shape) * 2).to(dtype), "z": torch.ones(1)}
    save_file(tensors, tmp_path / "t.safetensors")
    infos = read_header(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        found = map_tensor(tmp_path / "t.safetensors", infos[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    ("header", "data_bytes", "words"),
    [
        ({"a": ENTRY}, 23, "23 bytes of data, and the header tells of 24"),
        ({"a": ENTRY}, 25, "25 bytes of data, and the header tells of 24"),
        ({"a": ENTRY, "b": ENTRY}, 24, "tensor b at bytes 0 to 24, where 24 from 24 are its place"),
        ({"a": {**ENTRY, "data_offsets": [4, 28]}}, 28, "tensor a at bytes 4 to 28"),
        ({"a": {**ENTRY, "shape": [2, 4]}}, 24, "tensor a at bytes 0 to 24, where 32 from 0"),
        ({"a": {**ENTRY, "shape": [-2, -3]}}, 24, r"a\.shape\.0: Input should be greater"),
        ({"a": {**ENTRY, "data_offsets": [24, 0]}}, 24, "tensor a at bytes 24 to 0"),
        ({"a": {"dtype": "F32"}}, 24, r"a\.shape: Field required"),
        ([ENTRY], 24, "header: Input should be a valid dictionary"),
        (b"not JSON", 24, "Expecting value"),
        (b"\xff\xfe", 24, "decode"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data_bytes, words):
    file = write(tmp_path / "model.safetensors", header, data_bytes)
    with pytest.raises(InputError, match=rf"model\.safetensors is truncated or is not a safetensors file \(.*{words}"):
        read_header(file)


@pytest.mark.parametrize(
    ("dtype", "fix"), [("F4", "use the model's bf16 or fp16 release"), ("F7", "Write the model anew")]
)
def test_a_dtype_that_is_not_known_is_refused(tmp_path, dtype, fix):
    file = write(tmp_path / "model.safetensors", {"odd": {**ENTRY, "dtype": dtype}}, 24)
    with pytest.raises(
        InputError, match=rf"model\.safetensors: tensor odd is stored as {dtype}, which can't be read.*{fix}"
    ):
        read_header(file)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 100, b"\x00" * 100])
def test_what_has_no_header_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is truncated or is not a safetensors file"):
        read_header(tmp_path / "model.safetensors")


def test_a_file_that_became_shorter_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10_000)}, file)
    info = read_header(file)["a"]
    with file.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(InputError, match=r"model\.safetensors: can't be read"):
        map_tensor(file, info)
