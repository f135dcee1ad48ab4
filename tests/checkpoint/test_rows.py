"""Rows of tensors, read without the others: in every form that tensors are stored in, wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from distprune.checkpoint import Checkpoint, TensorFiles, TensorInfo, describe, entry_of
from distprune.errors import InputError
from distprune.storage import copy, location

WEIGHTS = "model.safetensors"
NAME = "model.layers.0.mlp.experts.gate_up_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [2, 3]}
MXFP4 = {"quant_method": "mxfp4"}


def numbers(*dims: int) -> torch.Tensor:
    return torch.randn(*dims, generator=torch.Generator().manual_seed(0))


def in_bytes(*dims: int) -> torch.Tensor:
    return torch.randint(100, 140, dims, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def fp8(scale: torch.Tensor, *dims: int) -> dict[str, torch.Tensor]:
    return {NAME: numbers(*dims).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": scale}


#: What lies on disk, what config.json says of it, the rows that are read together, and the bytes of a row.
FORMS = {
    "plain": ({NAME: numbers(7, 4, 6)}, None, 1, 96),
    "fp8, one scale": (fp8(torch.tensor(3.0), 7, 4, 6), FP8, 7, None),
    "fp8, a scale an expert": (fp8(torch.rand(7), 7, 4, 6), FP8, 1, 24 + 4),
    "fp8, a scale a block": (fp8(torch.rand(7, 2, 2), 7, 4, 6), FP8, 1, 24 + 16),
    "fp8, a scale a block of a matrix": (fp8(torch.rand(4, 2), 7, 6), FP8, 2, None),
    "mxfp4": ({f"{NAME}_blocks": in_bytes(7, 4, 3, 16), f"{NAME}_scales": in_bytes(7, 4, 3)}, MXFP4, 1, 12 * 17),
}


@pytest.fixture(params=FORMS)
def form(request, single_file):
    tensors, said, together, size = FORMS[request.param]
    save_file(tensors, single_file / WEIGHTS)
    write_config(single_file, said)
    return single_file, together, size


def write_config(folder: Path, quantization: dict | None) -> None:
    content = json.loads((folder / "config.json").read_text())
    if quantization:
        content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("rows", [[3], [2, 3, 4], [6, 4, 4], [[1, 2], [2, 1]], [], [0, 6]])
def test_rows_are_those_of_the_whole_tensor(form, rows):
    checkpoint = Checkpoint.open(form[0])
    whole, rows = checkpoint.read([NAME])[NAME], torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(checkpoint.read_rows(NAME, rows), whole[rows])


def test_rows_are_read_without_the_others(form, monkeypatch):
    folder, together, size = form
    sizes, infos = [], []
    map_tensor = TensorFiles.map

    def record(self: TensorFiles, info: TensorInfo) -> torch.Tensor:
        sizes.append(info.nbytes)
        infos.append(info.shape[0] if info.shape else 1)
        return map_tensor(self, info)

    monkeypatch.setattr(TensorFiles, "map", record)
    Checkpoint.open(folder).read_rows(NAME, torch.tensor([2, 3]))
    assert infos[0] == max(together, 2)
    assert size is None or sum(sizes) == 2 * size


def test_rows_of_an_object_are_fetched_without_the_others(form, monkeypatch):
    folder, together, _ = form
    local = Checkpoint.open(folder)
    bucket = location("memory://bucket/model")
    monkeypatch.setattr(type(bucket.fs), "store", {})
    for file in folder.iterdir():
        copy(file, bucket / file.name)
    distant = Checkpoint.open(bucket)
    fetched = []
    cat_ranges = type(bucket.fs).cat_ranges

    def record(self, paths, starts, ends, **options):
        fetched.append(sum(end - start for start, end in zip(starts, ends, strict=True)))
        return cat_ranges(self, paths, starts, ends, **options)

    monkeypatch.setattr(type(bucket.fs), "cat_ranges", record)
    rows = torch.tensor([5, 4])
    assert torch.equal(distant.read_rows(NAME, rows), local.read_rows(NAME, rows))
    whole = sum(part.nbytes for part in local.tensors[NAME].stored)
    assert sum(fetched) == whole if together == 7 else sum(fetched) < whole / 2


# ---------------------------------------------------------------- mxfp4


@pytest.fixture
def packed(single_file) -> Path:
    tensors, said, *_ = FORMS["mxfp4"]
    save_file(tensors, single_file / WEIGHTS)
    write_config(single_file, said)
    return single_file


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(packed):
    checkpoint, tensors = Checkpoint.open(packed), FORMS["mxfp4"][0]
    assert [*checkpoint.tensors] == [NAME]
    info, found = checkpoint.tensors[NAME], checkpoint.read([NAME])[NAME]
    assert (info.dtype, info.shape, info.nbytes) == (found.dtype, tuple(found.shape), found.nbytes)
    assert torch.equal(found, convert_moe_packed_tensors(*(tensors[f"{NAME}_{part}"] for part in ("blocks", "scales"))))
    assert found.shape == (7, 96, 4)


def test_its_numbers_are_exponents_of_two_times_the_sixteen_that_four_bits_can_say(packed):
    blocks, scales = (FORMS["mxfp4"][0][f"{NAME}_{part}"] for part in ("blocks", "scales"))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(3)
    expected = values[halves.long()] * torch.exp2(scales.double() - 127)[..., None]
    assert torch.equal(Checkpoint.open(packed).read([NAME])[NAME].double(), expected.flatten(2).mT)


def test_what_is_known_of_it_travels_as_json(packed):
    checkpoint = Checkpoint.open(packed)
    said = json.loads(json.dumps({name: {"file": str(i.file)} | entry_of(i) for name, i in checkpoint.tensors.items()}))
    assert {name: describe(location(e.pop("file")), name, **e) for name, e in said.items()} == checkpoint.tensors


def test_the_configuration_says_nothing_of_mxfp4_and_the_notes_do(packed):
    checkpoint = Checkpoint.open(packed)
    assert "quantization" not in checkpoint.config.to_json_string()
    [note] = checkpoint.notes
    assert note.startswith("The model is stored in mxfp4: it is dequantized to bfloat16 on reading")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scales": in_bytes(7, 4, 2)}, rf"{NAME}_blocks has shape \(7, 4, 3, 16\), and {NAME}_scales \(7, 4, 2\)"),
        ({"blocks": in_bytes(7, 4, 3, 8)}, r"\(7, 4, 3, 8\), and .*Use the bf16"),
        ({"blocks": in_bytes(4, 3, 16), "scales": in_bytes(4, 3)}, r"\(4, 3, 16\), and .*Use the bf16"),
        ({"scales": torch.ones(7, 4, 3)}, "with a scale each could be read"),
    ],
)
def test_blocks_that_are_not_of_experts_are_named(packed, changes, words):
    tensors = FORMS["mxfp4"][0] | {f"{NAME}_{part}": tensor for part, tensor in changes.items()}
    save_file(tensors, packed / WEIGHTS)
    with pytest.raises(InputError, match=rf"{WEIGHTS}: tensor .*{words}"):
        Checkpoint.open(packed)


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_blocks_without_scales_or_without_the_configuration_are_named(packed, part):
    name = f"{NAME}_{part}"
    save_file({name: FORMS["mxfp4"][0][name]}, packed / WEIGHTS)
    with pytest.raises(InputError, match=rf"{WEIGHTS}: tensor {name} \(uint8\).*describes it otherwise"):
        Checkpoint.open(packed)
    content = json.loads((packed / "config.json").read_text())
    del content["quantization_config"]
    (packed / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{WEIGHTS}: tensor {name} \(uint8\).*has no quantization_config"):
        Checkpoint.open(packed)
