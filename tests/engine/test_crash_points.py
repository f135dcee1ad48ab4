"""A driver that dies at any change of a file, every single one, goes on to the same bytes when it is started again.

The whole engine runs here but Ray: one worker's calls are made in this process, so that hundreds of runs take seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from distprune.checkpoint import durable
from distprune.engine import driver

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}


class Killed(BaseException):
    """Nothing runs after it, as after kill -9: once it was raised, every change of a file fails."""


class Disk:
    """Counts the changes of files below a folder, and dies at the one it is told to.

    Opening a file to write, renaming, removing and the like are seen by Python's audit; flushing (which is left out
    here) and writing safetensors are not. A written file is left torn: half of it is there.
    """

    def __init__(self, folder: Path):
        self.folder, self.watching = str(folder), False
        sys.addaudithook(self._audit)  # for good, so one disk serves all runs

    def watch(self, run: Callable[[], None], dies_at: float = float("inf")) -> int:
        """Run, until the change with that number. Returns how many changes were made."""
        self.changes, self.dies_at, self.watching = 0, dies_at, True
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", lambda _: self._count())
                patch.setattr(durable, "save_file", self._torn(durable.save_file, lambda args: args[1]))
                patch.setattr(Path, "write_text", self._torn(Path.write_text, lambda args: args[0]))
                run()
        finally:
            self.watching = False
        return self.changes

    def _audit(self, event: str, arguments: tuple) -> None:
        if self.watching and (event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITING)):
            path = str(arguments[0])
            if (path.startswith(self.folder) and not path.endswith(".lock")) or not os.path.isabs(path):
                self._count()

    def _count(self) -> None:
        self.changes += 1
        if self.changes >= self.dies_at:
            raise Killed

    def _torn(self, write: Callable, path_of: Callable) -> Callable:
        def torn(*args, **kwargs):
            self.changes += 1
            if self.changes < self.dies_at:
                return write(*args, **kwargs)
            if self.changes == self.dies_at:
                self.watching = False
                write(*args, **kwargs)
                path = path_of(args)
                os.truncate(path, os.path.getsize(path) // 2)
                self.watching = True
            raise Killed

        return torn


LOGITS = {"objective": "logits", "batch": 2, "epochs": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "olica"},
        pytest.param({"method": "llm-pruner"}, marks=pytest.mark.slow),
        pytest.param({"method": "olica", "distill": LOGITS}, marks=pytest.mark.slow),
    ],
    ids=["olica", "gradients", "end to end"],
)
def test_a_driver_killed_at_any_change_of_a_file_goes_on_to_the_same_bytes(prune_here, digests, tmp_path, changes):
    prune_here, disk = partial(prune_here, **changes), Disk(tmp_path)
    changes = disk.watch(lambda: prune_here(tmp_path / "undisturbed"))
    undisturbed = digests(tmp_path / "undisturbed")
    assert changes > 200
    for point in range(1, changes + 1):
        output = tmp_path / f"killed-{point}"
        with pytest.raises(Killed):
            disk.watch(lambda: prune_here(output), point)  # noqa: B023
        assert not output.exists() or digests(output) == undisturbed, point
        prune_here(output)
        assert digests(output) == undisturbed, point
        assert [name for name in os.listdir(tmp_path) if name.startswith(output.name)] == [output.name], point
        shutil.rmtree(output)


def test_a_run_interrupted_while_it_leaves_ray_goes_on(prune_here, monkeypatch, tmp_path):
    @contextmanager
    def interrupted_at_the_end(_):
        yield
        raise KeyboardInterrupt

    output = tmp_path / "pruned"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(driver, "connected", interrupted_at_the_end)
        prune_here(output)
    prune_here(output)
    assert os.listdir(tmp_path) == ["pruned"]
