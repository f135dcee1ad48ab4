from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distprune.checkpoint import Checkpoint, ShardWriter, durable

INDEX = "model.safetensors.index.json"
ORDER = ["embeddings", "layer-0", "layer-1", "head"]


def split_into_parts(model) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in ORDER}
    for name, tensor in model.state_dict().items():
        if ".layers." in name:
            parts[f"layer-{name.split('.')[2]}"][name] = tensor
        else:
            parts["embeddings" if "embed" in name else "head"][name] = tensor
    return parts


def written(model, work_dir: Path, parts=ORDER) -> ShardWriter:
    writer = ShardWriter(work_dir)
    for part in parts:
        writer.put(part, split_into_parts(model)[part])
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


class Crash(BaseException):
    """Stands for the death of the process: no handler for ordinary errors sees it."""


def test_a_part_is_a_safetensors_file_of_its_tensors(tmp_path):
    ShardWriter(tmp_path).put("layer-0", {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2).bfloat16()})
    file = tmp_path / "parts" / "layer-0.safetensors"
    found = load_file(file)
    assert torch.equal(found["b"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["a"], torch.ones(2).bfloat16())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_parts_done_are_known_to_the_next_writer(tmp_path):
    writer = ShardWriter(tmp_path)
    assert writer.done() == set()
    writer.put("layer-0", {"a": torch.ones(2)})
    writer.put("layer-1.5", {"b": torch.ones(2)})
    assert ShardWriter(tmp_path).done() == {"layer-0", "layer-1.5"}


def test_views_shared_and_transposed_tensors_are_stored_in_full(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "tied": base, "transposed": base.T, "slice": base[1:], "column": base[:, 1]}
    tensors["parameter"] = torch.nn.Parameter(base)
    ShardWriter(tmp_path).put("part", tensors)
    found = load_file(tmp_path / "parts" / "part.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_part_written_again_replaces_the_first(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.put("part", {"a": torch.zeros(2)})
    writer.put("part", {"a": torch.ones(2)})
    assert load_file(tmp_path / "parts" / "part.safetensors")["a"].tolist() == [1, 1]


def test_the_order_of_the_dictionary_does_not_change_the_bytes(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.put("x", {"a": torch.zeros(3), "b": torch.ones(2).half()})
    writer.put("y", {"b": torch.ones(2).half(), "a": torch.zeros(3)})
    files = contents(tmp_path / "parts")
    assert files["x.safetensors"] == files["y.safetensors"]


def test_files_get_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    ShardWriter(tmp_path).put("part", {"a": torch.zeros(2)})
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "plain", *tmp_path.glob("parts/*"))}
    assert len(modes) == 1


@pytest.mark.parametrize("moment", ["during the save", "before the rename"])
def test_an_interrupted_put_leaves_no_part_and_can_be_repeated(tmp_path, monkeypatch, moment):
    def dies_halfway(tensors, filename, metadata):
        Path(filename).write_bytes(b"\x00" * 10)
        raise Crash

    def dies(*_):
        raise Crash

    writer = ShardWriter(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        if moment == "during the save":
            patch.setattr(durable, "save_file", dies_halfway)
        else:
            patch.setattr(durable.os, "replace", dies)
        writer.put("layer-0", {"a": torch.zeros(2)})
    assert ShardWriter(tmp_path).done() == set()
    assert contents(tmp_path / "parts") == {}
    writer.put("layer-0", {"a": torch.zeros(2)})
    assert writer.done() == {"layer-0"}


def test_a_killed_process_leaves_only_whole_parts(tmp_path):
    program = f"""
import torch
from distprune.checkpoint import ShardWriter
writer = ShardWriter({str(tmp_path)!r})
for number in range(10_000):
    writer.put(f"p{{number}}", {{f"t{{number}}": torch.full((1_000_000,), float(number))}})
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    done = ShardWriter(tmp_path).done()
    assert {f"p{number}" for number in range(5)} <= done
    for part in done:
        values = load_file(tmp_path / "parts" / f"{part}.safetensors")[f"t{part[1:]}"]
        assert values.unique().tolist() == [float(part[1:])]


def test_what_a_killed_process_left_behind_is_no_part_and_is_removed(tmp_path):
    ShardWriter(tmp_path).put("layer-0", {"a": torch.zeros(2)})
    for name in ("layer-1.safetensors.tmp", ".tmpXyZ"):
        (tmp_path / "parts" / name).write_bytes(b"half")
    assert ShardWriter(tmp_path).done() == {"layer-0"}
    assert set(contents(tmp_path / "parts")) == {"layer-0.safetensors"}


def test_file_then_folder_are_flushed_around_the_rename(tmp_path, monkeypatch):
    events = []
    replace = os.replace
    monkeypatch.setattr(durable, "sync", lambda path: events.append(("sync", path.name)))
    monkeypatch.setattr(durable.os, "replace", lambda a, b: (events.append(("rename", Path(b).name)), replace(a, b)))
    ShardWriter(tmp_path).put("p", {"a": torch.zeros(2)})
    assert events == [("sync", "p.safetensors.tmp"), ("rename", "p.safetensors"), ("sync", "parts")]


# Assembly


@pytest.mark.parametrize(("limit", "shards"), [(1, 4), (60_000, 4), (90_000, 2), (5_000_000, 1)])
def test_the_assembled_model_is_the_one_put_in(tiny_model, tmp_path, limit, shards):
    out = tmp_path / "out"
    written(tiny_model, tmp_path / "work").assemble(ORDER, out, max_shard_bytes=limit)
    tiny_model.config.save_pretrained(out)
    assert len(list(out.glob("*.safetensors"))) == shards
    loaded, report = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert set(Checkpoint.open(out).read(tiny_model.state_dict())) == set(tiny_model.state_dict())


def test_one_shard_has_no_index_and_the_plain_name(tiny_model, tmp_path):
    written(tiny_model, tmp_path / "work").assemble(ORDER, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"model.safetensors"}


def test_the_index_counts_and_maps_what_the_shards_hold(tiny_model, tmp_path):
    out = tmp_path / "out"
    written(tiny_model, tmp_path / "work").assemble(ORDER, out, max_shard_bytes=1)
    index = json.loads((out / INDEX).read_text())
    state = tiny_model.state_dict()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in state.values())
    shards = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    for shard, part in zip(shards, ORDER, strict=True):
        names = {name for name, file in index["weight_map"].items() if file == shard}
        assert names == set(load_file(out / shard)) == set(split_into_parts(tiny_model)[part])


def test_shards_stay_within_the_size_unless_one_part_is_larger(tmp_path):
    writer = ShardWriter(tmp_path / "work")
    sizes = [100, 100, 900, 100, 300]
    for number, size in enumerate(sizes):
        writer.put(f"p{number}", {f"t{number}": torch.zeros(size)})
    writer.assemble([f"p{number}" for number in range(5)], tmp_path / "out", max_shard_bytes=2000)
    grouped = [sorted(load_file(file)) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert grouped == [["t0", "t1"], ["t2"], ["t3", "t4"]]


@pytest.mark.parametrize("limit", [1, 90_000, 5_000_000])
def test_two_runs_give_the_same_bytes_whatever_the_order_of_arrival(tiny_model, tmp_path, limit):
    written(tiny_model, tmp_path / "a").assemble(ORDER, tmp_path / "out-a", max_shard_bytes=limit)
    written(tiny_model, tmp_path / "b", ORDER[::-1]).assemble(ORDER, tmp_path / "out-b", max_shard_bytes=limit)
    assert contents(tmp_path / "out-a") == contents(tmp_path / "out-b")


def test_a_shard_of_one_part_is_moved_not_copied(tmp_path):
    writer = ShardWriter(tmp_path / "work")
    writer.put("p", {"a": torch.zeros(2)})
    inode = (tmp_path / "work" / "parts" / "p.safetensors").stat().st_ino
    writer.assemble(["p"], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == inode


def test_another_file_system_gets_a_copy(tmp_path, monkeypatch):
    replace = os.replace

    def only_within_a_folder(source, target):
        if Path(source).parent != Path(target).parent:
            raise OSError(durable.errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(durable.os, "replace", only_within_a_folder)
    writer = ShardWriter(tmp_path / "work")
    for part in "pqr":
        writer.put(part, {part: torch.full((300,), float(ord(part)))})
    writer.assemble("pqr", tmp_path / "out", max_shard_bytes=3000)
    assert set(contents(tmp_path / "out")) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    }
    assert load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")["r"].unique().tolist() == [ord("r")]
    assert not list((tmp_path / "work" / "parts").glob("*.safetensors"))


@pytest.mark.parametrize("limit", [1, 90_000])
def test_an_assembly_that_dies_at_any_step_loses_nothing_and_goes_on(tiny_model, tmp_path, monkeypatch, limit):
    written(tiny_model, tmp_path / "whole").assemble(ORDER, tmp_path / "expected", max_shard_bytes=limit)
    deaths = 0
    for step in range(20):
        work, out = tmp_path / f"work-{step}", tmp_path / f"out-{step}"
        writer = written(tiny_model, work)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(durable.os, "replace", dying_after(step, os.replace))
                writer.assemble(ORDER, out, max_shard_bytes=limit)
        except Crash:
            deaths += 1
        again = ShardWriter(work)
        assert again.done() == set(ORDER)
        again.assemble(ORDER, out, max_shard_bytes=limit)
        assert contents(out) == contents(tmp_path / "expected")
    assert 4 <= deaths < 20


def dying_after(steps: int, action):
    def act(*arguments):
        nonlocal steps
        if steps == 0:
            raise Crash
        steps -= 1
        return action(*arguments)

    return act


def test_parts_left_by_a_death_between_merge_and_clean_up_are_removed(tmp_path):
    writer = ShardWriter(tmp_path / "work")
    for part in "pq":
        writer.put(part, {part: torch.zeros(3)})
    left = (tmp_path / "work" / "parts" / "p.safetensors").read_bytes()
    writer.assemble("pq", tmp_path / "out")
    (tmp_path / "work" / "parts" / "p.safetensors").write_bytes(left)
    writer.assemble("pq", tmp_path / "out")
    assert set(contents(tmp_path / "work" / "parts")) == {"assembly.json"}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"p", "q"}


def test_a_resumed_assembly_must_be_the_same(tmp_path):
    writer = ShardWriter(tmp_path / "work")
    for part in "pq":
        writer.put(part, {part: torch.zeros(3)})
    writer.assemble("pq", tmp_path / "out", max_shard_bytes=1)
    for order, destination, limit in [("qp", "out", 1), ("pq", "else", 1), ("pq", "out", 2)]:
        with pytest.raises(ValueError, match="begun with another"):
            writer.assemble(order, tmp_path / destination, max_shard_bytes=limit)


@pytest.mark.parametrize("order", ["p", "pqr", "ppq"])
def test_the_order_must_name_each_part_once(tmp_path, order):
    writer = ShardWriter(tmp_path / "work")
    for part in "pq":
        writer.put(part, {part: torch.zeros(3)})
    with pytest.raises(ValueError, match="name each part"):
        writer.assemble(order, tmp_path / "out")


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "work")
    for part in "pq":
        writer.put(part, {"same": torch.zeros(3)})
    with pytest.raises(ValueError, match="tensor same is both in part p and in part q"):
        writer.assemble("pq", tmp_path / "out")


def test_other_weights_at_the_destination_are_never_taken_for_ours(tmp_path):
    writer = ShardWriter(tmp_path / "work")
    writer.put("p", {"a": torch.zeros(3)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    with pytest.raises(ValueError, match="something else"):
        writer.assemble("p", tmp_path / "out")


def test_discard_leaves_the_assembled_checkpoint_alone(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.put("p", {"a": torch.zeros(3)})
    writer.assemble("p", tmp_path)
    writer.discard()
    assert set(os.listdir(tmp_path)) == {"model.safetensors"}
