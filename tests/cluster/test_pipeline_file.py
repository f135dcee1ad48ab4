"""The pipeline of the scheduled files."""

from __future__ import annotations

from pathlib import Path

import yaml

from distprune.pipeline import load_pipeline

FOLDER = Path(__file__).parents[2] / "cluster"


def test_it_is_a_pipeline_whose_folder_is_on_the_disk_that_the_scheduled_files_mount():
    pipeline = load_pipeline(FOLDER / "pipeline.yaml")
    # A cluster that starts with no GPU would be taken for one of CPUs.
    assert pipeline.prune["device"] == pipeline.evaluate.device == "cuda"
    assert ":" in pipeline.prune["workers"] and ":" in pipeline.evaluate.workers
    for name in ("raycronjob", "cronjob"):
        text = (FOLDER / "kubernetes" / f"{name}.yaml").read_text()
        assert "distprune pipeline /config/pipeline.yaml" in text
        assert list(yaml.safe_load_all(text))
        assert f"mountPath: {pipeline.work.parent}" in text
