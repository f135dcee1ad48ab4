"""A run on a cluster that Ray's own autoscaler resizes: nodes come because workers wait for them, and go with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "elastic.py"


@pytest.mark.slow
def test_the_autoscaler_follows_a_run_from_no_node_to_four_and_back(run, digests, tmp_path):
    command = [sys.executable, str(SCRIPT), "--workers", "1:4", "--layers", "12", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    timeline = json.loads((tmp_path / "timeline.json").read_text())
    nodes, workers = ([moment[name] for moment in timeline] for name in ("nodes", "workers"))
    assert (nodes[0], max(nodes), nodes[-1]) == (0, 4, 0)
    assert workers[0] == 0 and max(workers) >= 1
    # One worker a node: none is up before its node is.
    assert all(up <= there for there, up in zip(nodes, workers, strict=True))
    fixed, _ = run(
        tmp_path / "model",
        calibration=tmp_path / "calibration.arrow",
        sparsity=0.3,
        propagation=1,
        micro_batch=4,
        workers=2,
    )
    assert digests(tmp_path / "pruned") == digests(fixed)
