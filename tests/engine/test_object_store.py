"""A model and an output in an object store: the same bytes, whoever is interrupted where."""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import contextmanager

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distprune import InputError, RunFailed, api, inspect, status
from distprune.checkpoint import Checkpoint, lease, resolve_model
from distprune.engine.scheduler import runtime
from distprune.storage import copy, location, objects_in


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty store in this process's memory."""
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").store.clear()
    return location("memory://bucket")


@pytest.fixture
def put_model(bucket):
    def put(folder):
        for file in folder.iterdir():
            copy(file, bucket / "model" / file.name)
        return bucket / "model"

    return put


def digests_in(folder) -> dict[str, str]:
    """As the fixture ``digests`` has them of a local folder."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in objects_in(folder)
        if file.name.endswith((".safetensors", ".index.json")) or file.name == "config.json"
    }


def test_model_and_output_in_an_object_store_give_the_same_bytes_and_leave_nothing_else(
    prune_here, save_model, calibrate, digests, bucket, put_model, tmp_path
):
    model = save_model(num_hidden_layers=3, max_shard_size="60KB")
    calibration = calibrate(model)
    prune_here(tmp_path / "pruned", model)
    prune_here(bucket / "pruned", put_model(model), calibration=calibration)
    assert digests_in(bucket / "pruned") == digests(tmp_path / "pruned")
    names = {file.name for file in objects_in(bucket / "pruned")}
    assert names == {file.name for file in (tmp_path / "pruned").iterdir()}
    assert [file for file in objects_in(bucket) if "partial" in str(file)] == []
    assert inspect(str(bucket / "pruned")).layout == inspect(tmp_path / "pruned").layout
    assert status(str(bucket / "pruned")).state == "finished"


def test_the_driver_may_write_all_parts_to_an_object_store_too(prune_here, undisturbed_here, bucket):
    prune_here(bucket / "pruned", writes="driver")
    assert digests_in(bucket / "pruned") == undisturbed_here


class Killed(BaseException):
    """Stands for the death of the process: no handler for ordinary errors sees it."""


class MortalStore:
    """The store of this process's memory, which from some change on takes no more, as if whoever asks were dead."""

    CHANGES = ("cp_file", "rm_file", "pipe_file", "_open", "put_file")

    def __init__(self, patch):
        self.changes, self.most = 0, None
        for name in self.CHANGES:
            patch.setattr(MemoryFileSystem, name, self._counted(getattr(MemoryFileSystem, name)))

    def _counted(self, change):
        def counted(store, *arguments, **options):
            if change.__name__ != "_open" or (options.get("mode") or arguments[1]) != "rb":
                if self.most is not None and self.changes >= self.most:
                    raise Killed
                self.changes += 1
            return change(store, *arguments, **options)

        return counted


def test_a_driver_killed_at_any_change_of_an_object_store_resumes_to_the_same_bytes(
    prune_here, undisturbed_here, bucket, monkeypatch
):
    monkeypatch.setattr(runtime, "write_behind", at_once)
    monkeypatch.setattr(lease, "EXPIRY", 0.0)
    monkeypatch.setattr(lease.time, "sleep", lambda _: None)
    store = MortalStore(monkeypatch)
    prune_here(bucket / "whole")
    changes = store.changes
    assert changes > 60
    for step in range(0, changes - 1, 5):  # the last one lets go of the lock, when all is done
        output = bucket / f"killed-{step}"
        store.changes, store.most = 0, step
        with pytest.raises(Killed):
            prune_here(output)
        store.most = None
        assert not (output / "config.json").is_file() or digests_in(output) == undisturbed_here, step
        prune_here(output)
        assert digests_in(output) == undisturbed_here, step
        assert [file for file in objects_in(bucket) if "partial" in str(file)] == [], step


@contextmanager
def at_once():
    """Stands in for what writes behind, so that one thread makes all changes."""
    yield lambda write: write()


def test_an_output_that_exists_or_is_no_checkpoint_is_refused_and_overwritten_when_asked(prune_here, bucket):
    output = bucket / "pruned"
    prune_here(output)
    before = digests_in(output)
    with pytest.raises(InputError, match=r"memory://bucket/pruned exists\. Choose another output, or allow"):
        prune_here(output)
    (output / "stale.safetensors").write_bytes(b"stale")
    prune_here(output, overwrite=True, sparsity=0.5)
    after = digests_in(output)
    assert "stale.safetensors" not in after
    assert after != before
    (bucket / "texts" / "a.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds objects but no config\.json"):
        prune_here(bucket / "texts", overwrite=True)
    assert (bucket / "texts" / "a.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output": "memory://bucket"},
            "memory://bucket: is a whole bucket. Give a folder in it, as in memory://bucket/pruned.",
        ),
        ({"output": "nope://bucket/x"}, "nope://bucket/x: Unsupported filesystem"),
        (
            {"model": "memory://bucket/nothing"},
            "memory://bucket/nothing is not a folder. Give a Hugging Face checkpoint folder, or a .gguf file.",
        ),
        ({"model": "memory://bucket/pruned/model"}, "one of these is, holds or lies in the model"),
        ({"model": "memory://bucket/model", "revision": "main"}, "is not on the hub, so it has no revision main"),
        ({"calibration": "memory://bucket/none.arrow"}, "none.arrow: no such calibration set"),
    ],
)
def test_what_is_wrong_with_a_url_is_told_before_any_work(
    prune_here, put_model, save_model, calibrate, bucket, changes, message
):
    model = save_model(num_hidden_layers=3)
    put_model(model)
    given = {"model": model, "calibration": calibrate(model), "output": "memory://bucket/pruned"} | changes
    with pytest.raises(InputError, match=re.escape(message)):
        prune_here(**given)
    assert [file for file in objects_in(bucket) if "pruned" in str(file)] == []


def test_a_calibration_set_and_a_result_are_read_back_from_an_object_store(prune_here, save_model, bucket, put_model):
    model = save_model(num_hidden_layers=3)
    text = bucket / "text.txt"
    text.write_text("A model is pruned layer by layer, and each layer by itself. " * 60)
    calibration = bucket / "calibration.arrow"
    api.calibrate(str(put_model(model)), str(calibration), text=[str(text)], samples=4, sequence_length=16)
    prune_here(bucket / "pruned", model, calibration=str(calibration))
    folder = resolve_model(str(bucket / "pruned"))
    assert {file.name for file in folder.iterdir()} >= {"config.json", "tokenizer.json"}
    assert Checkpoint.open(bucket / "pruned").fingerprint() == Checkpoint.open(bucket / "pruned").fingerprint()
    assert Checkpoint.open(folder).tensors.keys() == Checkpoint.open(bucket / "pruned").tensors.keys()


# ---------------------------------------------------------------- leases


def test_only_one_run_works_where_another_renews_its_lease(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.1)
    with lease.hold_lease(bucket / "lock"):
        assert lease.is_held(bucket / "lock")
        with pytest.raises(lease.Held), lease.hold_lease(bucket / "lock"):
            pass
    assert not lease.is_held(bucket / "lock")
    with lease.hold_lease(bucket / "lock"):
        pass
    assert not (bucket / "lock").exists()


def test_a_lease_that_a_dead_run_left_is_taken_over(bucket, monkeypatch):
    (bucket / "lock").write_text(f"someone {time.time():.0f}")
    monkeypatch.setattr(lease, "EXPIRY", 2.0)
    began = time.monotonic()
    with lease.hold_lease(bucket / "lock"):
        assert time.monotonic() - began > 1


def test_a_store_that_takes_no_more_ends_the_run_with_a_message_and_it_resumes(
    prune_here, undisturbed_here, bucket, monkeypatch
):
    put = MemoryFileSystem.put_file

    def refuse(store, source, target, **options):
        if "offered" in target:
            raise PermissionError("ExpiredToken")
        put(store, source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", refuse)
        with pytest.raises(RunFailed, match=r"offered: can't be written \(ExpiredToken\)\. Check the network"):
            prune_here(bucket / "pruned")
    prune_here(bucket / "pruned")
    assert digests_in(bucket / "pruned") == undisturbed_here
