"""The task for SkyPilot, by SkyPilot's own parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from distprune.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sky(monkeypatch, tmp_path):
    """SkyPilot, which writes into the home of whoever imports it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return pytest.importorskip("sky")


def test_skypilot_takes_the_task(sky, monkeypatch):
    monkeypatch.chdir(ROOT)  # where its `workdir` is
    task = sky.Task.from_yaml(str(ROOT / "cluster" / "skypilot.yaml"))
    (resources,) = task.resources
    assert (task.num_nodes, resources.use_spot, resources.accelerators) == (2, True, {"H100": 8})
    assert resources.job_recovery == {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3}
    assert load_config(ROOT / task.envs["RUN"], {}).device == "cuda"


def test_skypilot_does_not_take_a_field_that_it_does_not_know(sky, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "task.yaml").write_text((ROOT / "cluster" / "skypilot.yaml").read_text() + "\nnodes: 3\n")
    with pytest.raises(ValueError, match="nodes"):
        sky.Task.from_yaml(str(tmp_path / "task.yaml"))
