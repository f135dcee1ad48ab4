"""Lm-eval's own command line, which knows nothing of distprune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def lm_eval_alone(
    model: Path, tasks: Sequence[str], include_path: Path, output: Path, batch_size: int, *options: object
) -> dict[str, dict[str, float]]:
    """The metrics that it finds, by task; filters that are "none" left out of their names."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--output_path", output]
    command += ["--model_args", f"pretrained={model},dtype=float32,trust_remote_code=True"]
    command += ["--tasks", ",".join(tasks), "--include_path", include_path, "--batch_size", batch_size, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True, cwd=output.parent)
    [file] = output.rglob("results_*.json")
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in scores.items()
            if "," in key and isinstance(value, int | float)
        }
        for task, scores in json.loads(file.read_text())["results"].items()
    }
