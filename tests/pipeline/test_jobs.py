"""Pipelines as a cluster's scheduler runs them: jobs of Ray, which run again, fail, are stopped, and lose nodes."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("aiohttp_cors", reason="needs ray[default]")

from job_cluster import Head, joining_node, running_head, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head(ray_cluster) -> Iterator[Head]:  # the first Ray of a process settles whether tokens are asked for
    with running_head() as head:
        yield head


@pytest.fixture
def submit(head, pipeline_file):
    """Submits a pipeline as a part of what the shell is to do. Returns the job's id."""

    def submit(settings: dict, shell: str = "{}") -> str:
        words = [sys.executable, "-m", "distprune.cli", "pipeline", str(pipeline_file(settings)), "--json"]
        return head.jobs.submit_job(entrypoint=shell.format(shlex.join(words)))

    return submit


@pytest.fixture
def larger(save_model, settings) -> dict:
    """The settings for a model of enough layers to meet a run on its way."""
    return {**settings, "model": str(save_model(num_hidden_layers=24)), "sparsities": [0.3]}


def summary_of(work: Path) -> dict:
    return json.loads((work / "summary.json").read_text())


def states_of(work: Path) -> set[str]:
    return {step["state"] for step in summary_of(work)["steps"]}


def test_a_job_that_runs_again_skips_what_is_unchanged(head, submit, settings, work, tmp_path):
    shop = tmp_path / "shop"
    settings["publish"] = {"to": f"{shop}/m-{{percent}}", "which": "all"}
    for expected in ("done", "unchanged"):
        job = submit(settings)
        ended = head.ended(job)
        assert (ended.status, ended.driver_exit_code) == ("SUCCEEDED", 0), head.jobs.get_job_logs(job)
        assert states_of(work) == {expected}
        assert sorted(os.listdir(shop)) == ["m-20", "m-30"]
    assert f"\n{(work / 'summary.json').read_text()}" in head.jobs.get_job_logs(job)


def test_a_gate_that_nothing_passes_fails_the_job_with_its_own_status(head, submit, settings, work, tmp_path):
    settings |= {"gate": {"perplexity": {"at_most": 1}}, "publish": {"to": f"{tmp_path}/shop/m"}}
    ended = head.ended(submit(settings))
    assert (ended.status, ended.driver_exit_code) == ("FAILED", 3)
    assert "no result passes the gate" in ended.message
    assert summary_of(work)["state"] == "gate failed"
    assert not list((tmp_path / "shop").glob("*"))


def test_a_stopped_job_resumes_inside_its_run_and_gives_the_same_bytes(head, submit, run, larger, work, digests):
    larger["prune"]["workers"] = 1
    # The shell is told to stop as well, and here lives to tell what its child ended with.
    job = submit(larger, "trap : TERM; {}; echo ended with $?")
    logs = wait_for(
        lambda: head.jobs.get_job_logs(job), lambda logs: "Pruning: 6/24" in logs or re.search(r"ended with \d", logs)
    )
    assert not re.search(r"ended with \d", logs), logs
    head.jobs.stop_job(job)
    assert head.ended(job).status == "STOPPED"
    assert "ended with 130" in head.jobs.get_job_logs(job)
    assert summary_of(work)["state"] == "interrupted"

    job = submit(larger)
    assert head.ended(job).driver_exit_code == 0, head.jobs.get_job_logs(job)
    assert {step["name"]: step["state"] for step in summary_of(work)["steps"]} == {
        "calibrate": "unchanged",
        "evaluate-dense": "unchanged",
        "prune-30": "done",
        "evaluate-30": "done",
    }
    events = [json.loads(line)["event"] for line in (work / "pruned-30" / "distprune_log.jsonl").open()]
    assert events.index("interrupted") < events.index("run resumed")
    folder, _ = run(Path(larger["model"]), sparsity=0.3, calibration=work / "calibration.arrow")
    assert digests(work / "pruned-30") == digests(folder)


def test_a_node_that_is_lost_changes_nothing(head, submit, run, larger, work, digests):
    """Of six workers, two are on a node that vanishes on the way."""
    larger["prune"] |= {"workers": "6:6", "propagation": 1}
    with joining_node(head, cpus=2) as vanish:
        job = submit(larger)
        logs = wait_for(lambda: head.jobs.get_job_logs(job), lambda logs: "Dense pass" in logs or "distprune: " in logs)
        assert "distprune: " not in logs, logs
        vanish()
        ended = head.ended(job)
    assert (ended.status, ended.driver_exit_code) == ("SUCCEEDED", 0), head.jobs.get_job_logs(job)
    events = [json.loads(line)["event"] for line in (work / "pruned-30" / "distprune_log.jsonl").open()]
    assert "worker lost" in events
    folder, _ = run(Path(larger["model"]), sparsity=0.3, calibration=work / "calibration.arrow", propagation=1)
    assert digests(work / "pruned-30") == digests(folder)
