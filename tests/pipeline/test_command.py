"""`distprune pipeline`: what it prints, and what it exits with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner, Result

from distprune.cli import app
from distprune.errors import StorageFailed
from distprune.pipeline import running


@pytest.fixture
def command(ray_cluster, settings, pipeline_file):
    def run(changes: dict, *options: str) -> Result:
        file = pipeline_file({**settings, "sparsities": [0.3], **changes})
        return CliRunner().invoke(app, ["pipeline", str(file), *options], prog_name="distprune")

    return run


def test_json_is_all_that_comes_on_standard_output(command, work):
    for states in ("would run", "done", "unchanged"):
        done = command({}, "--json", *(["--dry-run"] if states == "would run" else []))
        assert done.exit_code == 0, done.output
        summary = json.loads(done.stdout)
        assert {step["state"] for step in summary["steps"]} == {states}
    assert summary == json.loads((work / "summary.json").read_text())
    assert "prune-30: unchanged" in done.stderr


def test_people_get_tables(command):
    assert "would run" in command({}, "--dry-run").stdout
    done = command({"gate": {"perplexity": {"at_most_times_dense": 99}}})
    assert done.exit_code == 0, done.output
    for words in ("evaluate-dense", "it was not done before", "30%", "perplexity", "times)", "passes", ": passed"):
        assert words in done.stdout


def test_events_go_to_standard_error_as_json(command):
    done = command({}, "--json", "--log-format", "json")
    assert json.loads(done.stdout)["state"] == "passed"
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    told = [(event["event"], event["step"]) for event in events if "step" in event]
    assert told == [("step done", name) for name in ("calibrate", "evaluate-dense", "prune-30", "evaluate-30")]
    assert "run done" in [event["event"] for event in events]


def test_each_end_has_its_status_and_its_summary(command, tmp_path, monkeypatch):
    gate = {"gate": {"perplexity": {"at_most": 1}}, "publish": {"to": str(tmp_path / "shop")}}
    failed = command(gate, "--json")
    assert failed.exit_code == 3
    assert json.loads(failed.stdout)["state"] == "gate failed"
    assert failed.stderr.splitlines()[-1].startswith(
        "distprune: no result passes the gate, so nothing is published: at 30%"
    )
    assert not (tmp_path / "shop").exists()
    assert "held back" in command(gate).stdout

    refused = command({"model": "./none"}, "--json")
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"].startswith("none does not exist")

    ends = {"failed": (StorageFailed("full"), 1), "interrupted": (KeyboardInterrupt(), 130)}
    for state, (error, status) in ends.items():
        monkeypatch.setattr(running, "plan_pipeline", lambda _, error=error: (_ for _ in ()).throw(error))
        ended = command({}, "--json")
        assert (ended.exit_code, json.loads(ended.stdout)["state"]) == (status, state)


def test_a_file_that_is_no_pipeline_is_refused_in_a_sentence(command):
    refused = command({"prune": {"sparsity": 0.2}})
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "pipeline.yaml: prune: 'sparsity' is not given here, but by sparsities." in refused.stderr


@pytest.fixture(scope="module")
def long_model(save_model) -> Path:
    """So many layers that a signal arrives while they are pruned."""
    return save_model(num_hidden_layers=24)


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_process_that_ends_on_its_way_resumes_and_gives_the_same_bytes(
    run, run_pipeline, long_model, pipeline_file, settings, work, digests, sent
):
    settings |= {"model": str(long_model), "sparsities": [0.3], "address": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "distprune.cli", "pipeline", str(pipeline_file(settings)), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        told = []
        for line in process.stderr:
            if line.startswith("Pruning: 6/24") and line not in told:
                process.send_signal(sent)
            told.append(line)
        said = process.stdout.read()
    assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), "".join(told)
    assert sent == signal.SIGKILL or json.loads(said)["state"] == "interrupted"
    assert (work / "pruned-30.partial").is_dir()

    summary = run_pipeline()
    assert [step.state for step in summary.steps] == ["unchanged", "unchanged", "done", "done"]
    assert "run resumed" in (work / "pruned-30" / "distprune_log.jsonl").read_text()
    folder, _ = run(long_model, sparsity=0.3, calibration=work / "calibration.arrow")
    assert digests(work / "pruned-30") == digests(folder)
