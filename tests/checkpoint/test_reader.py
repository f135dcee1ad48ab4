from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from distprune.checkpoint import Checkpoint, reader
from distprune.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


def edit_tensor(file: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["single_file", "sharded"])
def test_reads_every_tensor_as_the_model_holds_it(layout, tiny_model, request):
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    expected = tiny_model.state_dict()
    found = checkpoint.read(expected)
    assert list(found) == list(expected)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_headers_say_dtype_shape_bytes_and_file(sharded, tiny_model):
    checkpoint = Checkpoint.open(sharded)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    for name, tensor in tiny_model.state_dict().items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (torch.bfloat16, tuple(tensor.shape), tensor.nbytes)
        assert info.file == sharded / weight_map[name]
    assert checkpoint.config.num_hidden_layers == 2


def test_opening_reads_no_data(single_file):
    weights = single_file / "model.safetensors"
    content = bytearray(weights.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    content[header_end:] = b"\xff" * (len(content) - header_end)
    weights.write_bytes(content)
    checkpoint = Checkpoint.open(single_file)
    assert checkpoint.read(["model.norm.weight"])["model.norm.weight"].isnan().all()


def test_a_single_file_of_another_name_is_read(single_file, tiny_model):
    (single_file / "model.safetensors").rename(single_file / "weights.safetensors")
    assert set(Checkpoint.open(single_file).tensors) == set(tiny_model.state_dict())


def test_a_read_tensor_carries_no_more_than_its_own_bytes(single_file):
    name = "model.norm.weight"
    tensor = Checkpoint.open(single_file).read([name])[name]
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert len(pickle.dumps(tensor)) < 4 * tensor.nbytes + 1000


def test_changing_a_read_tensor_leaves_the_file_alone(single_file):
    name = "model.norm.weight"
    checkpoint = Checkpoint.open(single_file)
    before = checkpoint.read([name])[name].clone()
    checkpoint.read([name])[name].zero_()
    assert torch.equal(checkpoint.read([name])[name], before)
    assert before.any()


def test_rows_come_in_the_order_and_shape_asked_for(sharded, tiny_model):
    name = "model.embed_tokens.weight"
    rows = torch.tensor([[5, 0, 5], [127, 1, 2]])
    found = Checkpoint.open(sharded).read_rows(name, rows)
    assert torch.equal(found, tiny_model.get_input_embeddings()(rows))


def test_reading_an_unknown_tensor_names_it(single_file):
    with pytest.raises(InputError, match=r"single holds no tensor model\.layers\.9"):
        Checkpoint.open(single_file).read(["model.layers.9"])


# What is wrong with a folder


def test_no_config_is_refused(single_file):
    (single_file / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        Checkpoint.open(single_file)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_pickled_weights_alone_are_refused_with_the_way_to_convert(single_file):
    (single_file / "model.safetensors").rename(single_file / "pytorch_model.bin")
    with pytest.raises(InputError, match="save_pretrained"):
        Checkpoint.open(single_file)


def test_gguf_weights_alone_are_refused_with_the_file_to_give(single_file):
    (single_file / "model.safetensors").rename(single_file / "model.Q4_0.gguf")
    with pytest.raises(InputError, match=r"give the file: .*model\.Q4_0\.gguf"):
        Checkpoint.open(single_file)


def test_no_weights_at_all_are_refused(single_file):
    (single_file / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no \*\.safetensors weights"):
        Checkpoint.open(single_file)


def test_several_files_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(InputError, match=f"no {INDEX}"):
        Checkpoint.open(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=rf"{INDEX} names 1 shard\(s\) that are not there: {shard.name}"):
        Checkpoint.open(sharded)


def test_a_tensor_the_shard_does_not_hold_is_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shard = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.ghost"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"{INDEX} names 1 tensor.*model\.ghost in {shard}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", ["{", '{"metadata": {}}', "[]", '{"weight_map": {"a": 1}}', "\xff"])
def test_a_broken_index_is_named(sharded, content):
    (sharded / INDEX).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=INDEX):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "zork"}', '{"model_type": "llama", "hidden'])
def test_a_broken_or_unknown_config_is_named(single_file, content):
    (single_file / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint.open(single_file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"not safetensors" * 100,
    ],
    ids=["truncated data", "truncated header", "empty", "another format"],
)
def test_a_damaged_weight_file_is_named(sharded, damage):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(InputError, match=rf"{shard.name} is truncated or is not a safetensors file"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "by gptq, .*Use the bf16 or fp16 release"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "by awq, .*Use the bf16 or fp16 release"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"by bitsandbytes, .*dequantize\(\)"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "by modelopt, .*Use the bf16"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "by fbgemm_fp8, .*Use the bf16"),
        ({"quantization_config": {"bits": 4}}, "by a method that it does not name, .*Use the bf16"),
        ({"quantization_config": "gptq"}, "by a quantization_config that is no JSON object, .*Use the bf16"),
        ({"compression_config": {"format": "int-quantized"}}, r"by compressed-tensors \(no config_groups\)"),
    ],
)
def test_a_quantized_configuration_is_refused_with_the_way_out(single_file, where, words):
    edit_json(single_file / "config.json", **where)
    with pytest.raises(InputError, match=rf"config\.json describes a checkpoint quantized {words}"):
        Checkpoint.open(single_file)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint32])
def test_quantized_weights_are_refused(single_file, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensor(single_file / "model.safetensors", name, torch.zeros(96, 64).to(dtype))
    with pytest.raises(InputError, match=rf"model\.safetensors: tensor {name} .*dequantized first"):
        Checkpoint.open(single_file)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.bool, torch.float64, torch.float32, torch.float16, torch.complex64),
    ],
)
def test_buffers_of_any_dtype_are_read(single_file, dtype):
    stored = torch.tensor([0, 1, 1]).to(dtype)
    edit_tensor(single_file / "model.safetensors", "buffer", stored)
    checkpoint = Checkpoint.open(single_file)
    assert checkpoint.tensors["buffer"].dtype == dtype
    assert torch.equal(checkpoint.read(["buffer"])["buffer"], stored)


def test_remote_code_runs_only_when_trusted(single_file):
    (single_file / "configuration_zork.py").write_text(
        "from transformers import PretrainedConfig\n\n\nclass ZorkConfig(PretrainedConfig):\n    model_type = 'zork'\n"
    )
    edit_json(
        single_file / "config.json",
        model_type="zork",
        auto_map={"AutoConfig": "configuration_zork.ZorkConfig"},
    )
    with pytest.raises(InputError, match="trust_remote_code"):
        Checkpoint.open(single_file)
    assert Checkpoint.open(single_file, trust_remote_code=True).config.model_type == "zork"


# Checks of what the tensors are


def test_the_models_own_shapes_pass(sharded, tiny_model):
    Checkpoint.open(sharded).check_shapes({k: tuple(v.shape) for k, v in tiny_model.state_dict().items()})


def test_a_wrong_shape_names_file_tensor_found_and_expected(sharded):
    checkpoint = Checkpoint.open(sharded)
    file = checkpoint.tensors["model.norm.weight"].file.name
    with pytest.raises(InputError, match=rf"model\.norm\.weight in .*{file} has shape \(64,\), expected \(65,\)"):
        checkpoint.check_shapes({"model.norm.weight": (65,)})


def test_missing_tensors_are_counted_and_the_first_are_named(single_file):
    expected = {f"model.layers.{layer}.w": (1,) for layer in range(8)}
    with pytest.raises(InputError, match=r"lacks 8 tensor\(s\).*layers\.0\.w, .*layers\.4\.w, \.\.\."):
        Checkpoint.open(single_file).check_shapes(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_tensor_and_file(single_file, bad):
    name = "model.layers.1.mlp.down_proj.weight"
    file = single_file / "model.safetensors"
    weights = load_file(file)[name].clone()
    weights[3, 5] = bad
    edit_tensor(file, name, weights)
    checkpoint = Checkpoint.open(single_file)
    checkpoint.check_finite(other for other in checkpoint.tensors if other != name)
    with pytest.raises(InputError, match=rf"model\.safetensors: tensor {name} holds NaN or infinite"):
        checkpoint.check_finite(checkpoint.tensors)


def test_a_large_tensor_is_looked_at_some_rows_at_a_time(single_file, monkeypatch):
    name, file = "model.layers.1.mlp.down_proj.weight", single_file / "model.safetensors"
    weights = load_file(file)[name].clone()
    weights[-1, -1] = float("nan")
    edit_tensor(file, name, weights)
    checkpoint, row = Checkpoint.open(single_file), weights[0].nbytes
    monkeypatch.setattr(reader, "PART_BYTES", 3 * row)
    parts = [*reader.in_parts(checkpoint, name)]
    assert max(part.nbytes for part in parts) == 3 * row
    torch.testing.assert_close(torch.cat(parts), weights, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(InputError, match="NaN"):
        checkpoint.check_finite([name])


def test_integers_flags_and_empty_tensors_are_finite(single_file):
    for name, tensor in {"i": torch.ones(2).long(), "b": torch.ones(2).bool(), "e": torch.ones(0)}.items():
        edit_tensor(single_file / "model.safetensors", name, tensor)
    Checkpoint.open(single_file).check_finite("ibe")


# The fingerprint


@pytest.mark.parametrize("layout", ["single_file", "sharded"])
def test_a_copy_elsewhere_has_the_same_fingerprint(layout, request, tmp_path):
    folder = request.getfixturevalue(layout)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    fingerprint = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(copy).fingerprint() == fingerprint
    assert len(fingerprint) == 64
    assert int(fingerprint, 16)


def test_a_file_that_is_no_part_of_the_model_leaves_the_fingerprint(sharded):
    before = Checkpoint.open(sharded).fingerprint()
    (sharded / "README.md").write_text("hello")
    assert Checkpoint.open(sharded).fingerprint() == before


def test_a_changed_config_changes_the_fingerprint(single_file):
    before = Checkpoint.open(single_file).fingerprint()
    edit_json(single_file / "config.json", rms_norm_eps=1e-3)
    assert Checkpoint.open(single_file).fingerprint() != before


@pytest.mark.parametrize("end", [0, -1])
def test_a_change_at_either_end_of_any_tensor_changes_the_fingerprint(single_file, end):
    file = single_file / "model.safetensors"
    original = file.read_bytes()
    seen = {Checkpoint.open(single_file).fingerprint()}
    tensors = load_file(file)
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[end] += 1
        edit_tensor(file, name, changed)
        seen.add(Checkpoint.open(single_file).fingerprint())
        file.write_bytes(original)
    assert len(seen) == 1 + len(tensors)


def test_another_dtype_or_sharding_changes_the_fingerprint(single_file, sharded, tiny_model, tmp_path):
    tiny_model.to(torch.float16).save_pretrained(tmp_path / "half")
    tiny_model.to(torch.bfloat16)
    shutil.copyfile(single_file / "config.json", tmp_path / "half" / "config.json")
    found = {Checkpoint.open(folder).fingerprint() for folder in (single_file, sharded, tmp_path / "half")}
    assert len(found) == 3


# ---------------------------------------------------------------- which files transformers would open


@pytest.fixture
def both(single_file, sharded) -> Path:
    """Shards with their index, and beside them a model.safetensors with other numbers."""
    tensors = {name: tensor + 1 for name, tensor in load_file(single_file / WEIGHTS).items()}
    save_file(tensors, sharded / WEIGHTS, metadata={"format": "pt"})
    return sharded


def assert_as_transformers_opens_it(folder: Path) -> None:
    opened, checkpoint = LlamaForCausalLM.from_pretrained(folder).state_dict(), Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(opened)
    for name, tensor in checkpoint.read(opened).items():
        assert torch.equal(tensor, opened[name])


def test_a_single_file_comes_before_an_index(both):
    assert_as_transformers_opens_it(both)
    assert Checkpoint.open(both).weight_files == [both / WEIGHTS]


def test_a_single_file_needs_no_shards_of_an_index_beside_it(both):
    for shard in both.glob("model-*.safetensors"):
        shard.unlink()
    assert_as_transformers_opens_it(both)


@pytest.mark.parametrize("named", [INDEX, "model-00001-of-00001.safetensors"])
def test_the_file_that_the_configuration_names_comes_first(both, single_file, named):
    if named != INDEX:
        shutil.copyfile(single_file / WEIGHTS, both / named)
    edit_json(both / "config.json", transformers_weights=named)
    assert_as_transformers_opens_it(both)
    assert both / WEIGHTS not in Checkpoint.open(both).weight_files


@pytest.mark.parametrize("named", ["gone.safetensors", "../single/model.safetensors", 3])
def test_a_named_file_that_is_not_beside_the_configuration_is_refused(both, single_file, named):
    edit_json(both / "config.json", transformers_weights=named)
    with pytest.raises(InputError, match=r"config\.json names .* as its transformers_weights.*Correct the entry"):
        Checkpoint.open(both)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_full_weights_is_refused(sharded, name):
    (sharded / name).write_text("{}")
    with pytest.raises(InputError, match=rf"sharded holds an adapter \({name}\) beside the full.*Merge it.*or move"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_with_nothing_but_an_adapter_is_called_that(single_file, weights, config):
    (single_file / WEIGHTS).unlink()
    for name in ("adapter_config.json", weights):
        (single_file / name).write_text("{}")
    if not config:
        (single_file / "config.json").unlink()
    with pytest.raises(InputError, match=r"single holds nothing but an adapter \(adapter_config\.json, .*merged"):
        Checkpoint.open(single_file)


# ---------------------------------------------------------------- packed weights without a word of it


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", torch.int32),  # GPTQ, AWQ
        ("model.layers.0.self_attn.q_proj.scales", torch.float16),
        ("model.layers.0.self_attn.q_proj.weight_packed", torch.int32),  # compressed-tensors
        ("model.layers.0.self_attn.q_proj.weight", torch.uint8),  # bitsandbytes
    ],
)
@pytest.mark.parametrize("layout", ["single_file", "sharded"])
def test_packed_weights_are_called_quantized_without_a_quantization_config(request, layout, name, dtype):
    folder = request.getfixturevalue(layout)
    file = min(folder.glob("*.safetensors"))
    edit_tensor(file, name, torch.zeros(4, 4, dtype=dtype))
    if layout == "sharded":
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=weight_map | {name: file.name})
    with pytest.raises(InputError, match=rf"{file.name}: tensor {name} .*quantized checkpoint.*dequantized first"):
        Checkpoint.open(folder)
