"""The folder that a run works in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distprune.engine.run.work_folder import PUBLISHING, Outline, WorkFolder

OUTLINE = Outline("model", "olica", 0.3, 4, False)


def test_what_is_left_when_a_removal_was_cut_short_is_not_gone_on_with(tmp_path, monkeypatch):
    work = WorkFolder(tmp_path / "pruned.partial")
    work.begin({"sparsity": 0.3}, OUTLINE)
    work.journal.write("profile-00000")
    work.journal.write(PUBLISHING)

    def killed(*_: Path, **__: bool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        work.remove()
    assert work.folder.is_dir() and not work.is_published()
    assert not work.begin({"sparsity": 0.4}, OUTLINE)
    assert work.journal.count("profile") == 0
