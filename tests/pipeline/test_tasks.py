"""A pipeline whose gate looks at lm-eval's tasks, evaluated on a Ray worker; and one whose model is in a store."""

from __future__ import annotations

import json
import subprocess
import sys

import boto3
import pytest

from distprune.errors import GateFailed
from distprune.storage import copy, location

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def evaluate(tmp_path) -> dict:
    """An evaluation on a folder of one task of eight questions."""
    pytest.importorskip("lm_eval")
    (folder := tmp_path / "tasks").mkdir()
    questions = [{"question": f"the river {i}", "choices": ["runs", "is left"], "answer": i % 2} for i in range(8)]
    (data := folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tiny_choice.yaml").write_text(TASK % data)
    return {"tasks": ["tiny_choice"], "include_path": str(folder), "workers": 1, "device": "cpu"}


@pytest.mark.slow
def test_scores_of_tasks_decide_what_is_published(run_pipeline, new_workers, evaluate, tmp_path):
    changes = {"evaluate": evaluate, "sparsities": [0.3], "publish": {"to": [str(tmp_path / "shop")]}}
    passing = {"tasks": {"tiny_choice": {"acc": {"at_least": 0.0}}}}
    failing = {"tasks": {"tiny_choice": {"acc": {"at_least": 1.01}}}}
    with pytest.raises(GateFailed, match=r"at 30%, tiny_choice acc .* is below 1\.01 \(at_least\)") as failure:
        run_pipeline(changes | {"gate": failing})
    assert not (tmp_path / "shop").exists()
    (result,) = failure.value.summary.results
    assert 0 <= result.tasks["tiny_choice"]["acc"].value <= 1
    summary = run_pipeline(changes | {"gate": passing})
    assert summary.state == "passed"
    assert {step.state for step in summary.steps if "publish" not in step.name} == {"unchanged"}
    assert (tmp_path / "shop" / "config.json").is_file()


@pytest.mark.slow
def test_a_model_and_texts_in_an_object_store_are_pruned_and_published_to_it(
    settings, pipeline_file, dense_path, text_path, s3_environment, tmp_path, monkeypatch
):
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))
    boto3.client("s3").create_bucket(Bucket="pipelines")
    bucket = location("s3://pipelines")
    for file in [*dense_path.iterdir(), text_path]:
        copy(file, bucket / "in" / file.name)
    text = str(bucket / "in" / "text.txt")
    changes = {
        "model": str(bucket / "in"),
        "calibration": {"text": text, "samples": 4, "sequence_length": 16},
        "evaluate": {"text": text, "sequence_length": 16},
        "sparsities": [0.3],
        "publish": {"to": [str(bucket / "out")], "overwrite": True},
    }
    command = [sys.executable, "-m", "distprune.cli", "pipeline", str(pipeline_file(settings | changes)), "--json"]

    def states() -> set[str]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return {step["state"] for step in json.loads(done.stdout)["steps"]}

    assert states() == {"done"}
    assert (bucket / "out" / "config.json").is_file()
    assert states() == {"unchanged"}
    (bucket / "in" / "text.txt").write_text(text_path.read_text() * 2)
    assert states() == {"done"}
