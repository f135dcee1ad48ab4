"""A file that is written in pieces has the bytes of one that is written at once."""

from __future__ import annotations

import pytest
import torch

from distprune.checkpoint import ShardWriter, read_tensors
from distprune.checkpoint.infos import DTYPES
from distprune.checkpoint.piecewise import piecewise_file


def of_every_dtype() -> dict[str, torch.Tensor]:
    values = torch.arange(12).reshape(4, 3)
    return {f"{name}.é": values.to(dtype) for name, dtype in DTYPES.items()}


def test_a_file_written_in_pieces_has_the_bytes_of_one_written_at_once(tmp_path):
    tensors, file = of_every_dtype(), tmp_path / "pieces.safetensors"
    expected = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with piecewise_file(file, expected) as pieces:
        for start in (0, 3):
            pieces.write({name: tensor[start : start + 3] for name, tensor in tensors.items()})
    folder = ShardWriter(tmp_path).announce()
    assert file.read_bytes() == (folder.path / folder.write(tensors).name).read_bytes()
    assert file.stat().st_size == pieces.size


def test_pieces_are_cast_to_the_dtype_in_the_file(tmp_path):
    values, file = torch.randn(4, 3), tmp_path / "pieces.safetensors"
    with piecewise_file(file, {"w": torch.empty(4, 3, dtype=torch.bfloat16, device="meta")}) as pieces:
        pieces.write({"w": values})
    assert torch.equal(read_tensors(file)["w"], values.bfloat16())


@pytest.mark.parametrize(("rows", "message"), [([3], "not all"), ([3, 3], "more")])
def test_a_tensor_that_is_not_written_as_a_whole_leaves_nothing(tmp_path, rows, message):
    with (
        pytest.raises(ValueError, match=message),
        piecewise_file(tmp_path / "pieces.safetensors", {"w": torch.empty(4, 3)}) as pieces,
    ):
        for count in rows:
            pieces.write({"w": torch.zeros(count, 3)})
    assert not [*tmp_path.iterdir()]


def test_a_part_joined_of_pieces_has_the_bytes_of_one_put_at_once(tmp_path):
    """Some pieces are files that other processes have written, and some have other parts of the same tensor."""
    tensors = {"norm": torch.randn(3), "experts": torch.randn(6, 2, 3), "expert.5": torch.randn(2).bfloat16()}
    writer = ShardWriter(tmp_path)
    folder = writer.announce()
    around, last = {"norm": tensors["norm"]}, {"experts": tensors["experts"][4:], "expert.5": tensors["expert.5"]}
    first = folder.write({"experts": tensors["experts"][:4]})
    writer.put("whole", tensors)
    writer.join("joined", [around, first, folder.write(last)])
    parts = {name: (folder.path / f"{name}.safetensors").read_bytes() for name in ("whole", "joined")}
    assert parts["joined"] == parts["whole"]
    assert not [*folder.path.glob("*.offered")]
