"""A driver that dies at any change of a file, every single one, resumes to the same bytes when it is started again.

The whole engine runs here but Ray: one worker's calls are made in this process, so that hundreds of runs take seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from distprune.checkpoint import durable
from distprune.engine import driver
from distprune.engine.scheduler import runtime

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}


class Disk:
    """Keeps a copy of a folder before every change of a file in it: what ``kill -9`` at that moment would leave.

    Opening a file to write, renaming, removing and the like are seen by Python's audit; writing safetensors is not. Of
    a file that is written there is also a copy in which it is torn: half of it is there. What would leave the folder as
    it was at the last copy, such as removing what is not there, makes no other.

    Args:
        folder: what is watched.
        copies: a folder elsewhere, which gets one folder a copy.
    """

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies, self._watching, self._last = folder, copies, False, None
        sys.addaudithook(self._audit)  # for good

    def watch(self, run: Callable[[], None]) -> list[Path]:
        """Run. Returns all copies, in their order."""
        self._watching = True
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(durable, "save_file", self._torn(durable.save_file, lambda args: args[1]))
                patch.setattr(Path, "write_text", self._torn(Path.write_text, lambda args: args[0]))
                run()
        finally:
            self._watching = False
        return sorted(self.copies.iterdir())

    def _audit(self, event: str, arguments: tuple) -> None:
        if self._watching and (event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITING)):
            path = str(arguments[0])
            if (path.startswith(str(self.folder)) and not path.endswith(".lock")) or not os.path.isabs(path):
                self._copy()

    def _copy(self) -> Path | None:
        """What the folder is now, unless it is what it was."""
        self._watching = False
        try:
            found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.folder.rglob("*")]
            if found == self._last:
                return None
            self._last = found
            return shutil.copytree(self.folder, self.copies / f"{len(os.listdir(self.copies)):04}")
        finally:
            self._watching = True

    def _torn(self, write: Callable, path_of: Callable) -> Callable:
        def torn(*args, **kwargs):
            result, path = write(*args, **kwargs), Path(path_of(args))
            if path.is_relative_to(self.folder) and (copy := self._copy()):
                os.truncate(copy / path.relative_to(self.folder), path.stat().st_size // 2)
                self._last = None  # the whole file is another state
            return result

        return torn


@contextmanager
def at_once() -> Iterator[Callable]:
    """Stands in for what writes behind, so that no other thread changes what is being copied."""
    yield lambda write: write()


LOGITS = {"objective": "logits", "batch": 2, "epochs": 3}


@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        # Two layers, each a block, have every kind of change; hundreds of runs of three take a minute.
        (2, {"method": "olica", "propagation": 1}),
        pytest.param(3, {"method": "olica"}, marks=pytest.mark.slow),
        pytest.param(3, {"method": "llm-pruner"}, marks=pytest.mark.slow),
        pytest.param(3, {"method": "olica", "distill": LOGITS}, marks=pytest.mark.slow),
        pytest.param(2, {"method": "curvature", "rounds": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"method": "curvature", "sparsity": 0.6, "search": {"samples": 2}}, marks=pytest.mark.slow),
    ],
    ids=["two layers", "three layers", "gradients", "end to end", "rounds", "search"],
)
def test_a_driver_killed_at_any_change_of_a_file_resumes_to_the_same_bytes(
    prune_here, save_model, digests, monkeypatch, tmp_path, layers, changes
):
    monkeypatch.setattr(runtime, "write_behind", at_once)
    prune_here = partial(prune_here, model=save_model(num_hidden_layers=layers), **changes)
    (folder := tmp_path / "watched").mkdir()
    (copies := tmp_path / "copies").mkdir()
    killed = Disk(folder, copies).watch(lambda: prune_here(folder / "pruned"))
    undisturbed = digests(folder / "pruned")
    assert len(killed) > 30 * layers
    for copy in killed:
        output = copy / "pruned"
        assert not output.exists() or digests(output) == undisturbed, copy
        prune_here(output)
        assert digests(output) == undisturbed, copy
        assert os.listdir(copy) == ["pruned"], copy
        shutil.rmtree(copy)


def test_a_run_interrupted_while_it_leaves_ray_resumes(prune_here, monkeypatch, tmp_path):
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
