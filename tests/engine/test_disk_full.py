"""A disk that is full or stalls: the run ends with a message that helps, or waits, and goes on to the same bytes."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.exceptions import OutOfDiskError
from safetensors import SafetensorError
from typer.testing import CliRunner

from distprune import RunFailed, api, cli, status
from distprune.checkpoint import durable, failures_explained, storage_failures
from distprune.engine.run.preflight import folder_size
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.worker.host_tensor import fetch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Every kind of file that the driver writes.
FILES = {
    "work folder": r"pruned\.partial",
    "identity of the run": r"journal/run\.json",
    "copied file": r"checkpoint/tokenizer\.json",
    "hidden states": r"journal/dense-00002\.safetensors",
    "carried moments": r"journal/moments-00002\.safetensors",
    "profile": r"journal/profile-00001\.safetensors",
    "journal entry": r"journal/profile-00001\.json",
    "pruned hidden states": r"journal/pruned-00001\.safetensors",
    "pruned layer": r"parts/pruned-layer-00001\.safetensors",
    "distilled layer": r"parts/distilled-layer-00001\.safetensors",
    "embedding": r"parts/outer-0\.safetensors",
    "configuration": r"checkpoint/config\.json",
    "model class": r"checkpoint/modeling_pruned\.py",
    "plan of the shards": r"parts/assembly\.json",
    "shard": r"model-\d+-of-\d+\.safetensors",
    "index": r"checkpoint/model\.safetensors\.index\.json",
    "record": r"checkpoint/distprune_run\.json",
    "last journal entry": r"journal/publishing\.json",
}


class FullDisk:
    """Has no room from the moment when a file with a certain name is about to be written, until it is freed."""

    def __init__(self):
        self.name, self.full = None, False
        sys.addaudithook(self._audit)  # for good, so one disk serves all tests

    def fill_at(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.name, self.full = re.compile(name), False
        patch.setattr(durable, "save_file", self._save_file)  # neither is seen by Python's audit
        patch.setattr(os, "fsync", lambda _: self._fsync())

    def free(self) -> None:
        self.name, self.full = None, False

    def _has_no_room_for(self, path: object) -> bool:
        self.full = self.full or (self.name is not None and self.name.search(str(path)) is not None)
        return self.full

    def _audit(self, event: str, arguments: tuple) -> None:
        grows = event == "os.mkdir" or (event == "open" and (arguments[2] or 0) & WRITING)
        if self.name and grows and not str(arguments[0]).endswith(".lock") and self._has_no_room_for(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    def _save_file(self, tensors: dict, path: Path, **options) -> None:
        if self._has_no_room_for(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        SAVE_FILE(tensors, path, **options)

    def _fsync(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


SAVE_FILE, PUT = durable.save_file, ray.put
DISK = FullDisk()


@pytest.fixture
def fill_at(monkeypatch):
    yield lambda name: DISK.fill_at(name, monkeypatch)
    DISK.free()


@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
def test_a_run_that_fills_the_disk_says_so_and_goes_on_when_there_is_room(
    prune_here, undisturbed_here, digests, fill_at, tmp_path, name
):
    output = tmp_path / "pruned"
    fill_at(name)
    with pytest.raises(RunFailed) as failure:
        prune_here(output, writes="driver")
    message = (
        rf".*{name}.*: No space left on device\. Free some space there; the same command resumes from what was done\."
    )
    assert re.fullmatch(message, str(failure.value))
    assert not output.exists()
    DISK.free()
    prune_here(output)
    assert os.listdir(tmp_path) == ["pruned"]
    assert digests(output) == undisturbed_here


def test_a_publishing_that_fills_the_disk_goes_on(prune_here, monkeypatch, tmp_path):
    output = tmp_path / "pruned"
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"pruned.*: No space left on device"):
        patch.setattr(os, "rename", full)
        prune_here(output)
    assert not output.exists() and status(output).state == "stopped"
    prune_here(output)
    assert os.listdir(tmp_path) == ["pruned"]


def full(source: Path, _: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))


def test_the_command_line_exits_with_1_and_prints_the_message_alone(prune_here, fill_at, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "prune", lambda **_: prune_here(tmp_path / "pruned"))
    fill_at("pruned-layer-00002")
    result = CliRunner().invoke(cli.app, ["prune", "model", "--output", "pruned"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"distprune: \S+/pruned-layer-00002\.json\.tmp: No space left .* was done\.\n", result.stderr)


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.EDQUOT, "quota"), (errno.EFBIG, "--max-shard-size"), (errno.EIO, "Repair"), (errno.ESTALE, "Mount")],
)
def test_other_failures_of_a_file_system_have_their_own_fix(number, fix):
    with (
        pytest.raises(RunFailed, match=rf"^file: {os.strerror(number)}\. .*{fix}.* same command"),
        failures_explained(Path("file")),
    ):
        raise OSError(number, os.strerror(number))


def test_errors_that_are_no_fault_of_the_file_system_stay_what_they_are():
    with pytest.raises(FileNotFoundError), failures_explained(Path("file")):
        raise FileNotFoundError(errno.ENOENT, "gone", "other")
    with pytest.raises(SafetensorError, match="no such tensor"), failures_explained(Path("file")):
        raise SafetensorError("no such tensor")


def test_an_object_store_without_room_says_so_and_the_run_goes_on(run, digests, monkeypatch, tmp_path):
    """Ray raises this where neither the store nor the disk that it spills to has room."""
    options, puts, fails_at = {"sparsity": 0.3, "propagation": 2}, itertools.count(), None

    def put(value: object) -> ray.ObjectRef:
        if next(puts) == fails_at:
            raise OutOfDiskError("Local disk is full")
        return PUT(value)

    monkeypatch.setattr(ray, "put", put)
    undisturbed = digests(run(**options)[0])
    last = next(puts) - 1
    for fails_at in (0, last // 2, last):
        puts, output = itertools.count(), tmp_path / f"pruned-{fails_at}"
        with pytest.raises(RunFailed, match=r"object store is full.* the same command goes"):
            run(output=output, **options)
        fails_at = None
        assert digests(run(output=output, **options)[0]) == undisturbed


def test_a_worker_that_lacks_room_is_the_same(ray_cluster):
    @ray.remote
    def lacks_room() -> None:
        raise RunFailed("no room")

    with pytest.raises(RunFailed, match=r"^no room$"):
        fetch(lacks_room.remote())


def test_while_a_write_stalls_workers_go_on_and_the_log_tells(run, digests, monkeypatch, caplog):
    """The first pruned layer written while workers run takes seconds; what the workers have begun ends meanwhile."""
    options = {"sparsity": 0.3, "propagation": 1, "workers": 2, "writes": "driver"}
    pools, stalls, ended = [], [], []
    init = WorkerPool.__init__

    def note_and_init(pool: WorkerPool, *arguments) -> None:
        pools.append(pool)
        init(pool, *arguments)

    def stalling(write: Callable) -> Callable:
        def save_file(tensors: dict, path: Path, **given) -> None:
            running = list(pools[0]._in_flight)
            if path.name.startswith("pruned-layer-") and running and not stalls:
                stalls.append(path.name.removesuffix(".tmp"))
                time.sleep(2)
                # A busy machine may need more than the two seconds.
                ended.extend(ray.wait(running, num_returns=len(running), timeout=30)[0])
            write(tensors, path, **given)

        return save_file

    monkeypatch.setattr(WorkerPool, "__init__", note_and_init)
    monkeypatch.setattr(durable, "save_file", stalling(SAVE_FILE))
    monkeypatch.setattr(storage_failures, "PATIENCE", 0.5)
    with caplog.at_level(logging.WARNING, logger="distprune"):
        stalled, _ = run(**options)
    assert ended
    [file] = stalls
    # A busy machine may take long to write the others too.
    told = [record.getMessage() for record in caplog.records if file in record.getMessage()]
    assert told == [
        f"Writing {stalled}.partial/parts/{file} has taken 0 s so far: its file system stalls. The run waits for it."
    ]
    assert digests(stalled) == digests(run(**options)[0])


def test_a_file_that_goes_while_sizes_are_summed_is_left_out(tmp_path, monkeypatch):
    """A worker of an interrupted run may still take its own away."""
    for name in ("gone", "stays"):
        (tmp_path / name).write_bytes(bytes(100))
    is_file = Path.is_file

    def is_file_and_goes(path: Path) -> bool:
        found = is_file(path)
        if path.name == "gone":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", is_file_and_goes)
    assert folder_size(tmp_path) == 100
