"""A file that is written in pieces has the bytes of one that is written at once."""

from __future__ import annotations

import pytest
import torch

from distprune.checkpoint import PartFolder, ShardWriter, read_tensors
from distprune.checkpoint.infos import DTYPES
from distprune.checkpoint.part_folder import OFFERED


@pytest.fixture
def folder(tmp_path) -> PartFolder:
    return ShardWriter(tmp_path).announce()


def of_every_dtype() -> dict[str, torch.Tensor]:
    values = torch.arange(12).reshape(4, 3)
    return {f"{name}.é": values.to(dtype) for name, dtype in DTYPES.items()}


def test_a_file_written_in_pieces_has_the_bytes_of_one_written_at_once(folder):
    tensors = of_every_dtype()
    expected = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with folder.piecewise(expected) as (pieces, written):
        for start in (0, 3):
            pieces.write({name: tensor[start : start + 3] for name, tensor in tensors.items()})
    file = folder.path / written.name
    assert file.read_bytes() == (folder.path / folder.write(tensors).name).read_bytes()
    assert file.stat().st_size == written.size


def test_pieces_are_cast_to_the_dtype_in_the_file(folder):
    values = torch.randn(4, 3)
    with folder.piecewise({"w": torch.empty(4, 3, dtype=torch.bfloat16, device="meta")}) as (pieces, written):
        pieces.write({"w": values})
    assert torch.equal(read_tensors(folder.path / written.name)["w"], values.bfloat16())


@pytest.mark.parametrize(("rows", "message"), [([3], "not all"), ([3, 3], "more")])
def test_a_tensor_that_is_not_written_as_a_whole_leaves_nothing(folder, rows, message):
    with pytest.raises(ValueError, match=message), folder.piecewise({"w": torch.empty(4, 3)}) as (pieces, _):
        for count in rows:
            pieces.write({"w": torch.zeros(count, 3)})
    assert not [*folder.path.glob(f"*{OFFERED}*")]
