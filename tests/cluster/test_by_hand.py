"""The recipe for two machines: `ray start` on each, and distprune on one of them."""

from __future__ import annotations

import json

import pytest
from ray_nodes import RayNodes

pytestmark = pytest.mark.slow


def test_two_nodes_that_were_started_by_hand_prune_together(run, save_model, calibrate, digests, tmp_path):
    model, output = save_model(num_hidden_layers=8), tmp_path / "pruned"
    calibration = calibrate(model)
    words = ["--output", str(output), "--calibration", str(calibration), "--method", "olica", "--sparsity", "0.3"]
    words += ["--device", "cpu", "--micro-batch", "3", "--propagation", "1"]
    with RayNodes() as nodes:
        nodes.start(cpus=1)
        nodes.start(cpus=1)
        done = nodes.run("distprune", "prune", str(model), *words, "--address", nodes.address)
    assert done.returncode == 0, done.stdout
    assert json.loads((output / "distprune_run.json").read_text())["workers"] == 2
    assert digests(output) == digests(run(model, sparsity=0.3, propagation=1)[0])
