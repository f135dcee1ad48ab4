"""Folders that Ray can't work in, as clusters and containers set them: what to set is said, and nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distprune import InputError
from distprune.engine.scheduler.local_ray import LONGEST_SOCKET, check_socket_length, explained

LONG = "/tmp/" + "x" * 80
NO_RAY = "distprune: no Ray can be started on this machine:"


@pytest.fixture
def prune_elsewhere(dense_path, calibration_path, tmp_path):
    """Runs `distprune prune` with a Ray of its own and other variables, and gives the process when it has ended."""

    def prune_one(**variables: str) -> subprocess.CompletedProcess:
        options = (
            f"--calibration {calibration_path} -o {tmp_path / 'pruned'} --method magnitude --workers 1 --device cpu"
        )
        command = [sys.executable, "-m", "distprune.cli", "prune", str(dense_path), *options.split()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment | variables)

    return prune_one


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        pytest.param({"TMPDIR": LONG}, f"distprune: TMPDIR {LONG}: is ", marks=pytest.mark.slow),
        pytest.param({"TMPDIR": "/dev/null"}, f"{NO_RAY} /dev/null/ray can't be made", marks=pytest.mark.slow),
        ({"TMPDIR": "/tmp", "RAY_TMPDIR": "/dev/null"}, f"{NO_RAY} /dev/null/ray can't be made"),
    ],
)
def test_a_temporary_folder_that_ray_cannot_use_is_named_with_the_variable(
    prune_elsewhere, tmp_path, variables, message
):
    ended = prune_elsewhere(**variables)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(message)
    assert ended.stderr.rstrip().endswith("Set RAY_TMPDIR to a short, writable folder such as /tmp.")
    assert "Traceback" not in ended.stderr and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_advice_helps(prune_elsewhere, tmp_path):
    ended = prune_elsewhere(TMPDIR=LONG, RAY_TMPDIR="/tmp")
    assert ended.returncode == 0, ended.stderr
    assert os.listdir(tmp_path) == ["pruned"]


def test_the_length_is_checked_as_ray_counts_it(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "ö" * 60)  # of two bytes each
    with pytest.raises(InputError, match=r"TMPDIR /ö+: is \d+ bytes too long"):
        check_socket_length()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_socket_length()
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * LONGEST_SOCKET)
    with pytest.raises(InputError, match=r"RAY_TMPDIR /x+: is"):
        check_socket_length()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/home/me/.ray"), r"/home/me/\.ray can't be made .*Set HOME to a"),
        (PermissionError(13, "Permission denied", "/scratch/ray"), r"/scratch/ray can't be made .*Set RAY_TMPDIR to a"),
        (RuntimeError("Could not determine home directory."), r"home directory\. Set HOME to a writable folder"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"), r"a path that is not UTF-8\. Start it from another folder"),
        (RuntimeError("the GCS died."), r"^the GCS died\.$"),
    ],
)
def test_other_reasons_are_told_with_the_fix_where_it_is_known(error, message):
    with pytest.raises(InputError, match=message):
        raise InputError(explained(error))
