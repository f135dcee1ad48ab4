"""Checkpoints in fp8, read in bfloat16."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from local_hub import REPOSITORY, join, serving
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from distprune.checkpoint import Checkpoint, describe, entry_of, find_on_hub, fp8, open_on_hub, resolve_model
from distprune.errors import InputError
from distprune.storage import copy, location

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"
BY_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}


def compressed(strategy: str, **changes) -> dict:
    """A quantization_config as llm-compressor writes it."""
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights | changes, "input_activations": {"num_bits": 8, "type": "float"}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def quantize(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in fp8 and the scales of its blocks, (rows of blocks, columns of blocks) in float32."""
    grid = [math.ceil(size / most) for size, most in zip(weight.shape, block, strict=True)]
    numbers, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            there = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scales[row, column] = weight[there].float().abs().max() / 448
            numbers[there] = (weight[there].float() / scales[row, column]).to(torch.float8_e4m3fn)
    return numbers, scales


def write_fp8(folder: Path, quantization: dict, block: tuple[int, int] | None, ending: str = "_scale_inv") -> None:
    """Quantize the linear layers of a folder's only weight file."""
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        tensors[name] = tensor
        if "_proj." in name:
            tensors[name], tensors[name + ending] = quantize(tensor, block or tuple(tensor.shape))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, quantization_config=quantization)


def edit_config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def by_numpy(numbers: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """The product in float64, rounded once to bfloat16."""
    factors = scale.double().numpy()
    for axis, size in enumerate(block):
        factors = np.repeat(factors, size, axis)
    product = numbers.double().numpy() * factors[tuple(slice(0, size) for size in numbers.shape)]
    return torch.from_numpy(product).to(torch.bfloat16)


@pytest.fixture
def blocks(single_file) -> Path:
    """The tiny model as DeepSeek's and Qwen's are stored."""
    write_fp8(single_file, BY_BLOCKS, (32, 16))
    return single_file


@pytest.fixture
def in_shards(blocks) -> Path:
    """The same, with all scales in a file of their own."""
    tensors = load_file(blocks / WEIGHTS)
    (blocks / WEIGHTS).unlink()
    weight_map = {name: f"model-0000{1 + ('scale' in name)}-of-00002.safetensors" for name in tensors}
    for file in {*weight_map.values()}:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, blocks / file)
    (blocks / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return blocks


# ---------------------------------------------------------------- what is read


def test_a_model_in_blocks_is_what_transformers_dequantizes_it_to(blocks):
    stored, checkpoint = load_file(blocks / WEIGHTS), Checkpoint.open(blocks)
    weights = [name for name in stored if f"{name}_scale_inv" in stored]
    assert len(weights) == 2 * 7
    for name in weights:
        parts = {"proj": [stored[name]], "proj_scale_inv": [stored[f"{name}_scale_inv"]]}
        [expected] = Fp8Dequantize(None).convert(parts)["proj"]
        assert torch.equal(checkpoint.read([name])[name], expected.to(torch.bfloat16)), name


def test_a_model_in_blocks_opens_as_the_one_that_is_not_quantized(blocks, tiny_model):
    checkpoint = Checkpoint.open(blocks)
    checkpoint.check_shapes({name: tuple(tensor.shape) for name, tensor in tiny_model.state_dict().items()})
    assert set(checkpoint.tensors) == set(tiny_model.state_dict())


def test_infos_say_bfloat16_and_the_size_that_is_read(blocks):
    info = Checkpoint.open(blocks).tensors[NAME]
    assert (info.dtype, info.shape, info.nbytes) == (torch.bfloat16, (96, 64), 96 * 64 * 2)
    read = Checkpoint.open(blocks).read([NAME])[NAME]
    assert (read.dtype, tuple(read.shape), read.nbytes) == (info.dtype, info.shape, info.nbytes)


def test_what_is_not_in_fp8_is_read_as_stored(blocks, tiny_model):
    checkpoint, stored = Checkpoint.open(blocks), tiny_model.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.read([name])[name], stored[name])


@pytest.mark.parametrize(
    ("shape", "scales", "block", "quantization"),
    [
        ((70, 50), (3, 4), (32, 16), BY_BLOCKS),  # the last blocks are cut off
        ((70, 50), (3, 4), (32, 16), compressed("block", block_structure=[32, 16])),
        ((70, 50), (3, 4), (32, 16), compressed("block", block_structure="32x16")),
        ((70, 50), (70, 1), (1, 50), compressed("channel")),
        ((70, 50), (70,), (1, 50), compressed("channel")),
        ((70, 50), (1,), (70, 50), compressed("tensor")),
        ((70, 50), (), (70, 50), {"quant_method": "fp8", "activation_scheme": "static"}),
        ((3, 70, 50), (3, 3, 4), (1, 32, 16), BY_BLOCKS),  # experts in one tensor
        ((3, 70, 50), (3, 1, 1), (1, 70, 50), {"quant_method": "fp8"}),
    ],
)
@pytest.mark.parametrize("ending", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_form_is_the_product_of_numbers_and_scales(
    single_file, monkeypatch, shape, scales, block, quantization, ending, dtype
):
    monkeypatch.setattr(fp8, "PIECE", 7 * 50)
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(shape, generator=generator) * 100).to(dtype)
    scale = (torch.rand(scales, generator=generator) + 0.5).to(torch.bfloat16)
    save_file({NAME: numbers, NAME + ending: scale}, single_file / WEIGHTS)
    edit_config(single_file, quantization_config=quantization)
    checkpoint = Checkpoint.open(single_file)
    grid = [math.ceil(size / covered) for size, covered in zip(shape, block, strict=True)]
    expected = by_numpy(numbers, scale.reshape(grid), block)
    assert torch.equal(checkpoint.read([NAME])[NAME], expected)
    rows = torch.tensor([[2, 0, 2], [1, 1, 0]])
    assert torch.equal(checkpoint.read_rows(NAME, rows), expected[rows])


@pytest.mark.parametrize("scale", ["scale", "qscale_weight"])
def test_other_names_that_scales_have_are_known(single_file, scale):
    module = NAME.removesuffix("weight")
    stored = {NAME: torch.ones(8, 4).to(torch.float8_e4m3fn), module + scale: torch.tensor(3.0)}
    save_file(stored | {f"{module}qscale_act": torch.ones(())}, single_file / WEIGHTS)
    edit_config(single_file, quantization_config={"quant_method": "fp8"})
    checkpoint = Checkpoint.open(single_file)
    assert list(checkpoint.tensors) == [NAME]
    assert torch.equal(checkpoint.read([NAME])[NAME], torch.full((8, 4), 3, dtype=torch.bfloat16))


def test_experts_in_one_tensor_have_scales_after_its_name(single_file):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {name: torch.ones(2, 8, 4).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.tensor([2.0, 3])}
    save_file(stored | {f"{name}_activation_scale": torch.ones(2)}, single_file / WEIGHTS)
    edit_config(single_file, quantization_config={"quant_method": "fp8"})
    checkpoint = Checkpoint.open(single_file)
    assert list(checkpoint.tensors) == [name]
    assert checkpoint.read([name])[name][:, 7, 3].tolist() == [2, 3]


def test_scales_that_are_powers_of_two_in_a_byte_are_read(single_file):
    """The form that quantization_config calls scale_fmt ue8m0, in its own dtype, float8_e8m0fnu."""
    numbers = torch.randn(64, 32).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25, 2], [1, 8.0]]).to(torch.float8_e8m0fnu)
    save_file({NAME: numbers, f"{NAME}_scale_inv": scale}, single_file / WEIGHTS)
    edit_config(single_file, quantization_config=BY_BLOCKS)
    expected = by_numpy(numbers, scale.float(), (32, 16))
    assert torch.equal(Checkpoint.open(single_file).read([NAME])[NAME], expected)


def test_scales_of_activations_and_of_a_cache_go_with_the_fp8_that_they_were_for(single_file):
    scheme = compressed("tensor") | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    write_fp8(single_file, scheme, None, "_scale")
    tensors = load_file(single_file / WEIGHTS)
    plain = {name for name in tensors if not name.endswith("_scale")}
    one = torch.ones(1)
    tensors |= {
        f"model.layers.0.self_attn.{name}": one.clone() for name in ("k_scale", "v_scale", "q_proj.input_scale")
    }
    tensors |= {"model.layers.0.indexer.input_scale": one.clone()}  # of a module that is not quantized: its own
    save_file(tensors, single_file / WEIGHTS)
    assert set(Checkpoint.open(single_file).tensors) == plain | {"model.layers.0.indexer.input_scale"}
    edit_config(single_file, quantization_config=compressed("tensor"))
    assert "model.layers.0.self_attn.k_scale" in Checkpoint.open(single_file).tensors


def test_the_configuration_says_nothing_of_fp8_and_the_notes_do(blocks, tiny_model):
    edit_config(blocks, dtype="float8_e4m3fn")
    checkpoint = Checkpoint.open(blocks)
    assert "quantization" not in checkpoint.config.to_json_string()
    assert checkpoint.config.dtype == torch.bfloat16
    assert [note for note in checkpoint.notes if "dequantized to bfloat16 on reading" in note] == [*checkpoint.notes]
    assert len(checkpoint.notes) == 1


def test_a_model_that_is_not_quantized_has_no_notes(single_file):
    assert Checkpoint.open(single_file).notes == ()


# ---------------------------------------------------------------- wherever it lies


def assert_the_same(checkpoint: Checkpoint, other: Checkpoint) -> None:
    assert set(checkpoint.tensors) == set(other.tensors)
    found, expected = checkpoint.read(other.tensors), other.read(other.tensors)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(checkpoint.read_rows(NAME, rows), expected[NAME][rows])


def test_a_scale_may_lie_in_another_shard(in_shards, tiny_model):
    checkpoint = Checkpoint.open(in_shards)
    assert [file.name for file in checkpoint.weight_files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    stored = {name: tensor for file in in_shards.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = by_numpy(stored[NAME], stored[f"{NAME}_scale_inv"], (32, 16))
    assert torch.equal(checkpoint.read([NAME])[NAME], expected)


def test_a_changed_scale_changes_the_fingerprint(in_shards):
    before, file = Checkpoint.open(in_shards).fingerprint(), in_shards / "model-00002-of-00002.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    assert Checkpoint.open(in_shards).fingerprint() != before


def test_what_is_known_of_its_tensors_travels_as_json(in_shards):
    checkpoint = Checkpoint.open(in_shards)
    said = json.dumps({name: {"file": str(i.file)} | entry_of(i) for name, i in checkpoint.tensors.items()})
    told = {name: describe(location(entry.pop("file")), name, **entry) for name, entry in json.loads(said).items()}
    assert told == checkpoint.tensors
    assert_the_same(Checkpoint(in_shards, checkpoint.config, told), checkpoint)


def test_on_the_hub_its_headers_suffice_and_reading_fetches_both_files(in_shards, tmp_path, monkeypatch):
    with serving(in_shards) as hub:
        join(hub, tmp_path / "cache", monkeypatch)
        found, local = open_on_hub(find_on_hub(REPOSITORY)), Checkpoint.open(in_shards)
        assert hub.weights_sent() == set()
        assert found.notes == local.notes != ()
        assert found.config.to_dict() | {"_name_or_path": None} == local.config.to_dict() | {"_name_or_path": None}
        assert_the_same(found, local)


def test_in_an_object_store_it_is_read_as_in_a_folder(in_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").store.clear()
    for file in in_shards.iterdir():
        copy(file, location("memory://bucket/model") / file.name)
    assert_the_same(Checkpoint.open(location("memory://bucket/model")), Checkpoint.open(in_shards))


def test_a_folder_in_fp8_is_a_model_that_can_be_resolved(blocks):
    assert resolve_model(str(blocks)) == blocks


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (compressed("tensor", type="int"), "type int, num_bits 8, strategy tensor"),
        (compressed("tensor", num_bits=4), "type float, num_bits 4"),
        (compressed("group"), "strategy group"),
        (compressed("tensor", symmetric=False), "type float"),
        (compressed("block", block_structure=[0, 4]), "blocks of 0 x 4"),
        (compressed("tensor") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not read"),
        (compressed("tensor") | {"transform_config": {"config_groups": {"r1": {}}}}, "transform_config is not read"),
        ({"quant_method": "compressed-tensors", "config_groups": 3}, r"compressed-tensors \("),
        ({"quant_method": "fp8", "weight_block_size": "all"}, r"fp8 \("),
    ],
)
def test_another_form_is_refused_with_what_it_is(single_file, quantization, words):
    edit_config(single_file, quantization_config=quantization)
    with pytest.raises(InputError, match=rf"config\.json describes a checkpoint quantized by .*{words}.*Use the bf16"):
        Checkpoint.open(single_file)


def test_a_weight_without_a_scale_is_named(blocks):
    tensors = load_file(blocks / WEIGHTS)
    del tensors[f"{NAME}_scale_inv"]
    save_file(tensors, blocks / WEIGHTS)
    with pytest.raises(
        InputError, match=rf"tensor {NAME} \(float8_e4m3fn\).*describes it otherwise.*dequantized first"
    ):
        Checkpoint.open(blocks)


def test_a_scale_without_its_weight_is_named(blocks):
    tensors = load_file(blocks / WEIGHTS)
    del tensors[NAME]
    save_file(tensors, blocks / WEIGHTS)
    with pytest.raises(InputError, match=rf"tensor {NAME}_scale_inv .*dequantized first"):
        Checkpoint.open(blocks)


@pytest.mark.parametrize("scale", [torch.ones(5, 4), torch.ones(4, 3), torch.ones(96, 2), torch.ones(3, 4).int()])
def test_a_scale_that_fits_no_form_is_named_with_its_shape(blocks, scale):
    save_file(load_file(blocks / WEIGHTS) | {f"{NAME}_scale_inv": scale}, blocks / WEIGHTS)
    shape = rf"\({', '.join(map(str, scale.shape))}\)"
    with pytest.raises(InputError, match=rf"{WEIGHTS}: the scale of tensor {NAME} has shape {shape} and dtype.*bf16"):
        Checkpoint.open(blocks)


def test_a_number_that_is_none_is_found_after_dequantization(blocks):
    numbers = load_file(blocks / WEIGHTS)
    numbers[NAME].view(torch.uint8)[3, 4] = 0x7F
    save_file(numbers, blocks / WEIGHTS)
    with pytest.raises(InputError, match=f"tensor {NAME} holds NaN or infinite"):
        Checkpoint.open(blocks).check_finite([NAME])
