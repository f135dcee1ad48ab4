"""Models on the hub, by the hub's own client against a stand-in of the hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from local_hub import REPOSITORY, files_of, join, path_in, serving
from safetensors.torch import load_file, save_file

from distprune import InputError
from distprune.checkpoint import Checkpoint, HubModel, copy_side_files, disk, find_on_hub, open_on_hub, resolve_model


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch):
    with serving(sharded) as hub:
        join(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Lets the client keep its files in another cache from then on, as that of another machine."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another cache"))


def file_of(folder: Path, tensor: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def cached_weights(model: HubModel) -> set[str]:
    return {file.name for file in model.folder.glob("*.safetensors")}


def test_opening_fetches_headers_alone_and_tells_what_the_folder_would(hub, sharded):
    found, local = open_on_hub(find_on_hub(REPOSITORY)), Checkpoint.open(sharded)
    assert hub.weights_sent() == set()
    assert set(hub.peeked_at) == {file.name for file in local.weight_files}
    told = [
        {name: (info.file.name, info.dtype, info.shape, info.nbytes, info.begin) for name, info in c.tensors.items()}
        for c in (found, local)
    ]
    assert told[0] == told[1]
    assert found.config.to_dict() | {"_name_or_path": None} == local.config.to_dict() | {"_name_or_path": None}


def test_reading_fetches_the_one_file_that_holds_the_tensor_and_never_again(hub, sharded, tiny_model):
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint = open_on_hub(find_on_hub(REPOSITORY))
    for _ in range(2):
        assert torch.equal(checkpoint.read([name])[name], tiny_model.state_dict()[name])
    rows = torch.tensor([3, 1, 3])
    assert torch.equal(open_on_hub(find_on_hub(REPOSITORY)).read_rows(name, rows), tiny_model.state_dict()[name][rows])
    assert [sent for sent in hub.sent if sent.endswith(".safetensors")] == [file_of(sharded, name)]


def test_a_machine_with_a_cache_of_its_own_fetches_into_it(hub, sharded, tiny_model, elsewhere, tmp_path):
    checkpoint = open_on_hub(find_on_hub(REPOSITORY))
    elsewhere()
    assert torch.equal(checkpoint.read(["model.norm.weight"])["model.norm.weight"], tiny_model.model.norm.weight)
    files = [file.name for file in (tmp_path / "another cache").rglob("*.safetensors")]
    assert files == [file_of(sharded, "model.norm.weight")]


def test_what_the_finding_machine_has_in_a_shared_cache_is_read_there(hub, elsewhere, tiny_model):
    model = find_on_hub(REPOSITORY)
    checkpoint = open_on_hub(model)
    model.fetch_all()
    before = list(hub.sent)
    elsewhere()
    assert set(checkpoint.read(tiny_model.state_dict())) == set(tiny_model.state_dict())
    assert hub.sent == before


def test_a_whole_snapshot_needs_no_hub(hub, tiny_model, monkeypatch):
    find_on_hub(REPOSITORY).fetch_all()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.closed = True
    checkpoint = open_on_hub(find_on_hub(REPOSITORY))
    assert set(checkpoint.read(tiny_model.state_dict())) == set(tiny_model.state_dict())


def test_a_disk_without_room_loses_what_was_fetched_the_longest_unused_first(hub, sharded, tiny_model, monkeypatch):
    model = find_on_hub(REPOSITORY)
    checkpoint = open_on_hub(model)
    names = {info.file.name: name for name, info in checkpoint.tensors.items()}  # one tensor of each file
    first, second, third = sorted(names)
    checkpoint.read([names[first], names[second]])
    mapped = checkpoint.read([names[first]])[names[first]]
    assert cached_weights(model) == {first, second}

    def room_for_two(_):
        return namedtuple("Usage", "free")(0 if len(cached_weights(model)) > 1 else 10**12)

    monkeypatch.setattr(disk.shutil, "disk_usage", room_for_two)
    checkpoint.read([names[third]])
    assert cached_weights(model) == {first, third}
    blobs = model.folder.parent.parent / "blobs"
    assert {(model.folder / name).resolve() for name in (first, third)} <= set(blobs.iterdir())
    assert len([blob for blob in blobs.iterdir() if blob.stat().st_size > 10_000]) == 2
    assert torch.equal(mapped, tiny_model.state_dict()[names[first]])
    assert torch.equal(checkpoint.read([names[second]])[names[second]], tiny_model.state_dict()[names[second]])


def test_files_that_others_fetched_are_never_dropped(hub, monkeypatch, tiny_model):
    model = find_on_hub(REPOSITORY)
    names = sorted(hub.folder.glob("*.safetensors"))
    model.fetch(names[0].name)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(0))
    with pytest.raises(InputError, match=r"cache needs .* GB, but the file system .* has 0\.00 GB free"):
        open_on_hub(model).read(tiny_model.state_dict())
    assert cached_weights(model) == {names[0].name}


def test_a_file_that_vanishes_between_finding_and_opening_is_fetched_again(hub, tiny_model, monkeypatch):
    model = find_on_hub(REPOSITORY)
    checkpoint = open_on_hub(model)
    locate, vanished = type(checkpoint.source).locate, []

    def locate_and_lose(source, file):
        found = locate(source, file)
        if not vanished:
            vanished.append(found)
            found.unlink()
        return found

    monkeypatch.setattr(type(checkpoint.source), "locate", locate_and_lose)
    assert torch.equal(checkpoint.read(["model.norm.weight"])["model.norm.weight"], tiny_model.model.norm.weight)
    assert vanished


def test_a_hub_that_refuses_is_named_with_the_file(hub):
    checkpoint = open_on_hub(find_on_hub(REPOSITORY))
    hub.closed = True
    file = checkpoint.tensors["model.norm.weight"].file.name
    with pytest.raises(InputError, match=rf"node \S+: {file} of {REPOSITORY} could not be fetched.*network"):
        checkpoint.read(["model.norm.weight"])


def test_a_repository_without_safetensors_is_refused_by_its_name(hub, sharded):
    for file in sharded.glob("*.safetensors*"):
        file.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(InputError, match=f"{REPOSITORY} holds no safetensors weights"):
        open_on_hub(find_on_hub(REPOSITORY))


def test_an_unknown_repository_is_refused_by_its_name(hub):
    with pytest.raises(InputError, match="org/other at revision v2 could not be fetched"):
        find_on_hub("org/other", "v2")


def test_weights_of_a_quantized_dtype_are_refused_from_their_header(hub, sharded):
    file = min(sharded.glob("*.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(InputError, match=rf"{file.name}: tensor {name} \(float8_e4m3fn\) .*dequantized first"):
        open_on_hub(find_on_hub(REPOSITORY))
    assert hub.weights_sent() == set()


def test_a_quantized_model_is_refused_from_its_configuration(hub, sharded):
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="describes a checkpoint quantized by gptq"):
        open_on_hub(find_on_hub(REPOSITORY))
    assert hub.weights_sent() == set()


def test_resolving_fetches_the_whole_model_and_nothing_else(hub, sharded, tiny_model):
    shutil.copyfile(sharded / "config.json", sharded / "pytorch_model.bin")
    folder = resolve_model(REPOSITORY)
    assert set(Checkpoint.open(folder).read(tiny_model.state_dict())) == set(tiny_model.state_dict())
    assert "pytorch_model.bin" not in hub.sent


def test_a_single_file_comes_before_an_index_as_it_does_in_a_folder(hub, sharded, single_file):
    tensors = {name: tensor + 1 for name, tensor in load_file(single_file / "model.safetensors").items()}
    save_file(tensors, sharded / "model.safetensors")
    checkpoint = open_on_hub(find_on_hub(REPOSITORY))
    assert {file.name for file in checkpoint.weight_files} == {"model.safetensors"}
    name = "model.norm.weight"
    assert torch.equal(checkpoint.read([name])[name], tensors[name])
    assert hub.weights_sent() == {"model.safetensors"}


def test_a_hub_that_tells_nothing_of_a_single_file_is_an_error_while_shards_are_missing(hub):
    model = find_on_hub(REPOSITORY)
    hub.closed = True
    with pytest.raises(InputError, match=f"model.safetensors of {REPOSITORY} could not be fetched"):
        open_on_hub(model)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused_before_any_weight_is_fetched(hub, sharded, alone):
    (sharded / "adapter_config.json").write_text("{}")
    if alone:
        for file in (*sharded.glob("model*"), sharded / "config.json"):
            file.unlink()
    with pytest.raises(InputError, match="nothing but an adapter" if alone else "an adapter .* beside the full"):
        open_on_hub(find_on_hub(REPOSITORY))
    assert hub.weights_sent() == set()


def test_side_files_are_fetched_as_they_are_copied_from_a_folder(hub, sharded, tmp_path):
    wanted = {"LICENSE.md", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja", "tokenizer.model"}
    for name in (*wanted, "optimizer.pt", "checkpoint-5/tokenizer.json", "original/params.json", "README.md"):
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text(name)
    copies = [tmp_path / "of hub", tmp_path / "of folder"]
    for copy, folder in zip(copies, (find_on_hub(REPOSITORY).folder, sharded), strict=True):
        copy.mkdir()
        copy_side_files(folder, copy)
    of_hub, of_folder = ({path_in(copy, file): file.read_text() for file in files_of(copy)} for copy in copies)
    assert of_hub == of_folder
    assert of_hub.pop("ORIGINAL_README.md") == "README.md"
    assert wanted <= set(of_hub) <= wanted | {"generation_config.json"}
    assert not {"optimizer.pt", "params.json"} & set(hub.sent)
