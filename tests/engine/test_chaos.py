"""A short form of what scripts/chaos.py does; the slow one has at least one fault of every kind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.alone
@pytest.mark.parametrize(
    "runs",
    [
        ["--runs", "2", "--settings", "1", "--no-more"],
        pytest.param(["--runs", "4", "--settings", "2"], marks=pytest.mark.slow),
    ],
)
def test_disturbed_runs_give_the_bytes_of_undisturbed_ones(runs):
    command = [sys.executable, SCRIPTS / "chaos.py", *runs, "--seed", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results identical" in done.stdout


@pytest.fixture
def chaos(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import chaos

    return chaos


@pytest.fixture
def judged(chaos, pruned):
    """What the script says of a result, given the digest of the undisturbed run's."""
    trials = object.__new__(chaos.Chaos)
    setting = chaos.SETTINGS[0]
    trials.undisturbed = {setting: chaos.digest(pruned[0])}
    return lambda output: trials.judge(setting, output)


def test_another_byte_or_a_file_left_behind_is_a_failure(judged, pruned, tmp_path):
    output = tmp_path / "pruned"
    shutil.copytree(pruned[0], output)
    assert judged(output) == ""
    for file in ("distprune_run.json", "distprune_log.jsonl"):
        (output / file).write_text("other times")
    assert judged(output) == ""
    (tmp_path / "pruned.partial").mkdir()
    assert judged(output) == "left behind: pruned.partial"
    (tmp_path / "pruned.partial").rmdir()
    shard = next(output.glob("*.safetensors"))
    *first, last = shard.read_bytes()
    shard.write_bytes(bytes([*first, last ^ 1]))
    assert judged(output) == "other bytes than the undisturbed run's"
