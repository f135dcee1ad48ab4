"""The script that tells what pruning buys in speed and memory."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[2] / "scripts" / "generation_speed.py"


def test_cache_and_parameters_are_those_of_the_layers_shapes(pruned):
    folder, record = pruned
    script = runpy.run_path(str(SCRIPT))
    script["load"](str(folder), "cpu", "float32", 1)
    found, sizes = script["measure"](batch=2, prompt=5, new=3), script["sizes"]()

    config = AutoModelForCausalLM.from_pretrained(folder).config
    shapes = [config.layer_shape(index) for index in range(config.num_hidden_layers)]
    assert found.cache == 4 * sum(shape.kv_heads * (shape.query_key_dim + shape.value_dim) for shape in shapes)
    assert found.prefill > 0 and found.decode > 0
    assert sizes.parameters == 4 * record.total_parameters_after
    assert sizes.peak > sizes.parameters


@pytest.mark.slow
def test_dense_and_pruned_stand_beside_each_other(dense_path, pruned):
    folder, _ = pruned
    options = ["--batch", "1", "2", "--prompt", "4", "--new", "2", "--rounds", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SCRIPT.parents[1], *sys.path)))}
    output = subprocess.run(
        [sys.executable, str(SCRIPT), str(dense_path), str(folder), *options],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
    for title in ("memory", "batch 1", "batch 2"):
        assert title in output
    rows = [line for line in output.splitlines() if folder.name in line]
    assert len(rows) == 3
