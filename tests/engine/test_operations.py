"""A cluster as an operator has it: a head node with its dashboard, jobs submitted to it, metrics scraped from it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distprune import status

pytest.importorskip("aiohttp_cors", reason="needs ray[default]")

from job_cluster import Head, running_head, wait_for

pytestmark = pytest.mark.slow

SAMPLE = re.compile(r"ray_(distprune_\w+)\{(.*)\} (\S+)")


def submit(head: Head, model: Path, calibration: Path, output: Path, shell: str = "{}", **options: Any) -> str:
    """Submit a pruning job, as a part of what the shell is to do. Returns its id."""
    given = {"output": output, "calibration": calibration, "device": "cpu", "sparsity": 0.3, "micro_batch": 3}
    given["method"] = "olica"  # as in the runs that results are compared with
    words = [sys.executable, "-m", "distprune.cli", "prune", str(model)]
    for name, value in {**given, **options}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return head.jobs.submit_job(entrypoint=shell.format(shlex.join(words)))


def scrape(head: Head) -> dict[tuple[str, str, str], float]:
    """The samples by name, run, and what else they are told apart by."""
    text, found = urllib.request.urlopen(head.metrics, timeout=10).read().decode(), {}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        apart = next((tags[tag] for tag in ("le", "stage", "call", "worker") if tag in tags), "")
        found[name, tags["run"], apart] = float(value)
    return found


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "distprune_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def head(ray_cluster) -> Iterator[Head]:  # the first Ray of a process settles whether tokens are asked for
    with running_head() as head:
        yield head


def test_two_jobs_at_once_do_not_disturb_each_other_and_can_be_watched(
    head, run, save_model, calibrate, digests, tmp_path
):
    model = save_model(num_hidden_layers=12)
    calibration = calibrate(model)
    outputs = {method: tmp_path / method / "pruned" for method in ("flap", "olica")}
    jobs = [
        submit(head, model, calibration, output, method=method, workers=2, propagation=1)
        for method, output in outputs.items()
    ]
    highest: dict[tuple[str, str, str], float] = {}
    while not all(head.jobs.get_job_info(job).status.is_terminal() for job in jobs):
        for figure, value in scrape(head).items():
            highest[figure] = max(value, highest.get(figure, 0.0))
        time.sleep(0.2)
    for job in jobs:
        ended = head.ended(job)
        assert (ended.status, ended.driver_exit_code) == ("SUCCEEDED", 0), head.jobs.get_job_logs(job)

    times = [[line["time"] for line in log_of(output)] for output in outputs.values()]
    assert max(first for first, *_ in times) < min(last for *_, last in times)
    for method, output in outputs.items():
        assert digests(output) == digests(run(model, sparsity=0.3, method=method, propagation=1)[0])
        seen = {(name, apart): value for (name, told_of, apart), value in highest.items() if told_of == str(output)}
        assert seen["distprune_workers", ""] == 2
        assert seen["distprune_stage_steps", "Checking weights"] == 13
        assert seen["distprune_stage_steps_done", "Dense pass"] == 12
        assert seen["distprune_call_seconds_count", "check_layer"] == 12
        assert seen["distprune_busy_seconds_total", "check_layer"] > 0
        # Hidden states of 8 windows of 16 tokens, 64 wide, in float32, to every layer and from it.
        assert seen["distprune_object_store_bytes_total", ""] > 2 * 12 * (8 * 16 * 64 * 4)
        for worker in "01":
            assert 50 * 2**20 < seen["distprune_worker_resident_bytes", worker] < 2**36


def test_bad_input_fails_a_job_with_its_own_status(head, dense_path, calibration_path, tmp_path):
    ended = head.ended(submit(head, dense_path, calibration_path, tmp_path / "pruned", sparsity=0.99))
    assert (ended.status, ended.driver_exit_code) == ("FAILED", 2)
    assert "distprune: " in ended.message
    assert os.listdir(tmp_path) == []


def test_a_stopped_job_can_be_gone_on_with(head, run, save_model, calibrate, digests, tmp_path):
    model, output = save_model(num_hidden_layers=24), tmp_path / "pruned"
    calibration = calibrate(model)
    # The shell is told to stop as well, and here lives to tell what its child ended with.
    job = submit(head, model, calibration, output, "trap : TERM; {}; echo ended with $?", workers=1, log_format="json")
    logs = wait_for(
        lambda: head.jobs.get_job_logs(job),
        lambda logs: logs.count('"call ended"') > 30 or re.search(r"ended with \d", logs),
    )
    assert "ended with 2" not in logs
    head.jobs.stop_job(job)
    assert head.ended(job).status == "STOPPED"
    assert "ended with 130" in head.jobs.get_job_logs(job)
    assert status(output).state == "stopped"
    assert head.ended(submit(head, model, calibration, output, workers=1)).driver_exit_code == 0
    events = [line["event"] for line in log_of(output)]
    assert events.index("interrupted") < events.index("run resumed")
    assert digests(output) == digests(run(model, sparsity=0.3)[0])
