"""A tiny pipeline on the tests' own Ray: two sparsities of a random Llama of four layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distprune import api
from distprune.pipeline import PipelineSummary

TEXT = "The river runs down to the sea, and a pruner mends what is left of the model. " * 12


@pytest.fixture
def text_path(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def settings(dense_path, text_path, tmp_path) -> dict:
    """A pipeline's options, to change: nothing is gated and nothing published."""
    return {
        "model": str(dense_path),
        "work": str(tmp_path / "work"),
        "calibration": {"text": str(text_path), "samples": 4, "sequence_length": 16},
        "prune": {"method": "olica", "device": "cpu", "workers": 1, "micro_batch": 3},
        "sparsities": [0.2, 0.3],
        "evaluate": {"text": str(text_path), "sequence_length": 16},
    }


@pytest.fixture
def work(settings) -> Path:
    return Path(settings["work"])


@pytest.fixture
def pipeline_file(tmp_path) -> Callable[[dict], Path]:
    def write(settings: dict) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture
def run_pipeline(ray_cluster, settings, pipeline_file) -> Callable[..., PipelineSummary]:
    """Runs the pipeline with some options changed."""

    def run(changes: dict | None = None, **how) -> PipelineSummary:
        return api.pipeline(pipeline_file({**settings, **(changes or {})}), **how)

    return run
