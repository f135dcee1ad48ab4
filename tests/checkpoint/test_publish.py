from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from distprune.checkpoint import hold_lock, partial_directory, prepare_output, publish
from distprune.errors import InputError


def make_checkpoint(folder: Path, mark: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(mark)
    return folder


def mark(folder: Path) -> str:
    return (folder / "config.json").read_text()


def test_the_working_folder_lies_beside_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert partial_directory(Path("out/model/")) == tmp_path / "out" / "model.partial"
    assert partial_directory(Path("model-1.5")) == tmp_path / "model-1.5.partial"
    assert partial_directory(Path(".")) == tmp_path.with_name(tmp_path.name + ".partial")


# Where an output may go


def test_a_new_output_is_accepted_and_its_parents_are_made(tmp_path):
    prepare_output(tmp_path / "a" / "b" / "out", overwrite=False)
    assert os.listdir(tmp_path / "a" / "b") == []


def test_an_existing_output_is_refused_unless_overwriting_is_allowed(tmp_path):
    out = make_checkpoint(tmp_path / "out", "old")
    with pytest.raises(InputError, match="out exists"):
        prepare_output(out, overwrite=False)
    prepare_output(out, overwrite=True)
    assert mark(out) == "old"


def test_an_empty_folder_may_be_overwritten(tmp_path):
    prepare_output(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_file_or_a_link_is_refused(tmp_path, overwrite):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(make_checkpoint(tmp_path / "real", "real"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(InputError, match=f"{name} exists and is not a folder"):
            prepare_output(tmp_path / name, overwrite)


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"no config\.json, so it is not a checkpoint"):
        prepare_output(tmp_path, overwrite=True)


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file can't be made"):
        prepare_output(tmp_path / "file" / "out", overwrite=False)


def test_a_parent_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="can't be written to"):
        prepare_output(tmp_path / "out", overwrite=False)


# Publishing


def test_the_finished_folder_becomes_the_output(tmp_path):
    partial = make_checkpoint(tmp_path / "out.partial", "new")
    inode = partial.stat().st_ino
    publish(partial, tmp_path / "out", overwrite=False)
    assert os.listdir(tmp_path) == ["out"]
    assert mark(tmp_path / "out") == "new"
    assert (tmp_path / "out").stat().st_ino == inode


def test_overwriting_leaves_nothing_of_the_old_output(tmp_path):
    partial, out = make_checkpoint(tmp_path / "out.partial", "new"), make_checkpoint(tmp_path / "out", "old")
    (out / "extra.safetensors").touch()
    publish(partial, out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["config.json"]
    assert mark(out) == "new"


def test_an_output_that_appeared_meanwhile_is_not_replaced_unasked(tmp_path):
    partial, out = make_checkpoint(tmp_path / "out.partial", "new"), make_checkpoint(tmp_path / "out", "old")
    with pytest.raises(InputError, match="out exists"):
        publish(partial, out, overwrite=False)
    assert (mark(out), mark(partial)) == ("old", "new")


def test_the_old_output_is_put_back_when_the_rename_fails(tmp_path, monkeypatch):
    partial, out = make_checkpoint(tmp_path / "out.partial", "new"), make_checkpoint(tmp_path / "out", "old")
    rename = os.rename

    def fails_for_the_new_one(source, target):
        if source == partial:
            raise OSError("disk on fire")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="disk on fire"):
        publish(partial, out, overwrite=True)
    assert (mark(out), mark(partial)) == ("old", "new")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial"]


# The lock


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    partial = tmp_path / "out.partial"
    with (
        hold_lock(partial),
        pytest.raises(InputError, match=r"another run is writing to .*out\.partial"),
        hold_lock(partial),
    ):
        pass


def try_to_lock(partial: Path, replies) -> None:
    try:
        with hold_lock(partial):
            replies.put("locked")
    except InputError:
        replies.put("refused")


def test_another_process_is_refused_until_the_first_lets_go(tmp_path):
    partial = tmp_path / "out.partial"
    context = multiprocessing.get_context("fork")
    replies = context.Queue()

    def reply_of_another_process():
        process = context.Process(target=try_to_lock, args=(partial, replies))
        process.start()
        process.join(20)
        return replies.get(timeout=5)

    with hold_lock(partial):
        assert reply_of_another_process() == "refused"
    assert reply_of_another_process() == "locked"


def test_a_glance_at_the_lock_is_no_run(tmp_path):
    partial = partial_directory(tmp_path / "pruned")
    glance = FileLock(f"{partial}.lock", thread_local=False)
    glance.acquire()
    threading.Timer(0.2, glance.release).start()
    with hold_lock(partial):
        pass


def test_the_lock_is_gone_after_the_run_also_when_it_fails(tmp_path):
    partial = tmp_path / "deep" / "out.partial"
    with pytest.raises(KeyError), hold_lock(partial):
        raise KeyError
    assert os.listdir(tmp_path / "deep") == []
    with hold_lock(partial):
        pass
