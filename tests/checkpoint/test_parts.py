from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from distprune.checkpoint import PartFolder, ShardWriter, WrittenFile, writer
from distprune.checkpoint.part_folder import OFFERED
from distprune.errors import StorageFailed


def test_what_another_process_wrote_is_the_part_that_the_assembling_one_would_have_written(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": base.T, "slice": base[1:], "half": torch.ones(2).half()}
    here, there = ShardWriter(tmp_path / "here"), ShardWriter(tmp_path / "there")
    here.put("p", tensors)
    there.accept("p", there.announce().write(tensors))
    files = [tmp_path / place / "parts" / "p.safetensors" for place in ("here", "there")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert there.done() == {"p"}


def test_a_file_is_no_part_until_it_is_accepted_and_goes_with_the_next_writer(tmp_path):
    first = ShardWriter(tmp_path)
    first.announce().write({"a": torch.zeros(2)})
    assert first.done() == set()
    ShardWriter(tmp_path)
    assert not list((tmp_path / "parts").glob(f"*{OFFERED}*"))


def test_one_that_was_given_up_changes_nothing_that_was_accepted(tmp_path):
    assembling = ShardWriter(tmp_path)
    folder = assembling.announce()
    assembling.accept("p", folder.write({"a": torch.ones(2)}))
    folder.write({"a": torch.zeros(2)})
    assert assembling.read("p")["a"].tolist() == [1, 1]
    assembling.assemble(["p"], tmp_path / "out")
    assert not list((tmp_path / "parts").glob(f"*{OFFERED}*"))


def test_shards_that_others_merged_are_those_that_the_assembling_process_would_have_built(tmp_path):
    outs = []
    for others_merge in (False, True):
        assembling = ShardWriter(tmp_path / f"work-{others_merge}")
        for number in range(5):
            assembling.put(f"p{number}", {f"t{number}": torch.full((100,), float(number))})
        outs.append(out := tmp_path / f"out-{others_merge}")
        folder = assembling.announce()
        for shard, parts in assembling.begin_assembly([f"p{number}" for number in range(5)], out, 1200).items():
            if others_merge:
                assembling.accept_shard(shard, folder.merge(parts))
            else:
                assembling.build(shard)
        assembling.finish_assembly()
    contents = [{file.name: file.read_bytes() for file in out.iterdir()} for out in outs]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


def test_a_merge_of_parts_that_are_gone_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        ShardWriter(tmp_path).announce().merge(["p"])


@pytest.mark.parametrize("other", ["another folder under the same path", "no folder", "read only"])
def test_a_process_that_does_not_see_the_folder_knows_it(tmp_path, other, monkeypatch):
    folder = ShardWriter(tmp_path / "work").announce()
    assert folder.is_seen()
    if other == "another folder under the same path":
        (folder.path / "token").write_text("what an earlier run announced")
    elif other == "no folder":
        shutil.rmtree(tmp_path / "work")
    else:
        monkeypatch.setattr(type(folder.path), "write_text", refuse)
    assert not PartFolder(folder.path, folder.token).is_seen()


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_file_that_never_becomes_visible_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "VISIBLE_WITHIN", 0.3)
    assembling = ShardWriter(tmp_path)
    (tmp_path / "parts" / f"x{OFFERED}").write_bytes(b"half")
    with pytest.raises(StorageFailed, match=r"can't be seen here with its 100 bytes.*--writes driver"):
        assembling.accept("p", WrittenFile(f"x{OFFERED}", 100))


def test_a_file_that_becomes_visible_late_is_waited_for(tmp_path, monkeypatch):
    assembling = ShardWriter(tmp_path)
    written = assembling.announce().write({"a": torch.ones(2)})
    file = tmp_path / "parts" / written.name
    hidden = file.rename(tmp_path / "hidden")
    monkeypatch.setattr(writer.time, "sleep", lambda _: hidden.exists() and hidden.rename(file))
    assembling.accept("p", written)
    assert load_file(tmp_path / "parts" / "p.safetensors")["a"].tolist() == [1, 1]
