from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from distprune.checkpoint import check_free_space
from distprune.errors import InputError


def with_free(monkeypatch, free_bytes):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=free_bytes)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return asked


def test_enough_space_passes_to_the_last_byte(tmp_path, monkeypatch):
    with_free(monkeypatch, 1000)
    check_free_space(tmp_path, 1000)
    with pytest.raises(InputError):
        check_free_space(tmp_path, 1001)


def test_too_little_space_names_file_system_free_and_needed(tmp_path, monkeypatch):
    with_free(monkeypatch, 1_500_000_000)
    with pytest.raises(InputError, match=r"needs 140\.00 GB.*file system (\S+) has 1\.50 GB free") as info:
        check_free_space(tmp_path, 140_000_000_000)
    mount = str(info.value).split("file system ")[1].split()[0]
    assert os.path.ismount(mount)
    assert str(tmp_path).startswith(mount)


def test_a_path_that_is_not_there_yet_is_measured_where_it_will_be(tmp_path, monkeypatch):
    asked = with_free(monkeypatch, 10)
    check_free_space(tmp_path / "a" / "b", 10)
    assert asked == [tmp_path]


def test_the_real_disk_is_asked(tmp_path):
    check_free_space(tmp_path, 1)
    with pytest.raises(InputError):
        check_free_space(tmp_path, 10**18)
