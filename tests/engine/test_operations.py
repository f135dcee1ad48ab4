"""A cluster as an operator has it: a head node with its dashboard, jobs submitted to it, metrics scraped from it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distprune import status

pytest.importorskip("aiohttp_cors", reason="needs ray[default]")

from ray.job_submission import JobDetails, JobSubmissionClient

pytestmark = pytest.mark.slow

MINUTES = 180  # seconds that anything here may take, on a machine that does other work
SAMPLE = re.compile(r"ray_(distprune_\w+)\{(.*)\} (\S+)")


@dataclass(frozen=True)
class Head:
    """The head node: its jobs, and where it serves its metrics."""

    jobs: JobSubmissionClient
    metrics: str

    def submit(self, model: Path, calibration: Path, output: Path, shell: str = "{}", **options: Any) -> str:
        """Submit a pruning job, as a part of what the shell is to do. Returns its id."""
        given = {"output": output, "calibration": calibration, "device": "cpu", "sparsity": 0.3, "micro_batch": 3}
        given["method"] = "olica"  # as in the runs that results are compared with
        words = [sys.executable, "-m", "distprune.cli", "prune", str(model)]
        for name, value in {**given, **options}.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return self.jobs.submit_job(entrypoint=shell.format(shlex.join(words)))

    def ended(self, job: str) -> JobDetails:
        """A job when it has ended."""
        return wait_for(lambda: self.jobs.get_job_info(job), lambda info: info.status.is_terminal())

    def scrape(self) -> dict[tuple[str, str, str], float]:
        """The samples by name, run, and what else they are told apart by."""
        text, found = urllib.request.urlopen(self.metrics, timeout=10).read().decode(), {}
        for name, labels, value in SAMPLE.findall(text):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            apart = next((tags[tag] for tag in ("le", "stage", "call", "worker") if tag in tags), "")
            found[name, tags["run"], apart] = float(value)
        return found


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "distprune_log.jsonl").read_text().splitlines()]


def wait_for(look: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    """What is seen, as soon as something holds of it."""
    deadline, seen = time.monotonic() + MINUTES, None
    while time.monotonic() < deadline:
        if holds(seen := look()):
            return seen
        time.sleep(0.2)
    raise AssertionError(f"still not after {MINUTES} s: {seen}")


def free_ports(count: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(count)]
    for each in with_ports:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in with_ports]
    for each in with_ports:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Four CPUs in Ray's books; metrics are reported twice a second."""
    gcs, dashboard, agent, metrics = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray-")  # a job joins the Ray that was last started in its head's
    command = f"""{sys.executable} -m ray.scripts.scripts start --head --block --num-cpus 4 --disable-usage-stats
        --port {gcs} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent}
        --metrics-export-port {metrics} --include-dashboard true --temp-dir {folder}"""
    options = ["--system-config", json.dumps({"metrics_report_interval_ms": 500})]
    # A job that is stopped is killed after three seconds, unless it is given more; and a node that is, after thirty.
    environment = os.environ | {"RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    environment["RAY_AUTH_MODE"] = "disabled"  # else it asks for a token where the user happens to have one
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen([*command.split(), *options], env=environment, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        client = wait_for(lambda: connect(address), lambda client: client is not None)
        yield Head(client, f"http://127.0.0.1:{metrics}/metrics")
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def connect(address: str) -> JobSubmissionClient | None:
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError):
        return None


def test_two_jobs_at_once_do_not_disturb_each_other_and_can_be_watched(
    head, run, save_model, calibrate, digests, tmp_path
):
    model = save_model(num_hidden_layers=12)
    calibration = calibrate(model)
    outputs = {method: tmp_path / method / "pruned" for method in ("flap", "olica")}
    jobs = [
        head.submit(model, calibration, output, method=method, workers=2, propagation=1)
        for method, output in outputs.items()
    ]
    highest: dict[tuple[str, str, str], float] = {}
    while not all(head.jobs.get_job_info(job).status.is_terminal() for job in jobs):
        for figure, value in head.scrape().items():
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
    ended = head.ended(head.submit(dense_path, calibration_path, tmp_path / "pruned", sparsity=0.99))
    assert (ended.status, ended.driver_exit_code) == ("FAILED", 2)
    assert "distprune: " in ended.message
    assert os.listdir(tmp_path) == []


def test_a_stopped_job_can_be_gone_on_with(head, run, save_model, calibrate, digests, tmp_path):
    model, output = save_model(num_hidden_layers=24), tmp_path / "pruned"
    calibration = calibrate(model)
    # The shell is told to stop as well, and here lives to tell what its child ended with.
    job = head.submit(model, calibration, output, "trap : TERM; {}; echo ended with $?", workers=1, log_format="json")
    logs = wait_for(
        lambda: head.jobs.get_job_logs(job),
        lambda logs: logs.count('"call ended"') > 30 or re.search(r"ended with \d", logs),
    )
    assert "ended with 2" not in logs
    head.jobs.stop_job(job)
    assert head.ended(job).status == "STOPPED"
    assert "ended with 130" in head.jobs.get_job_logs(job)
    assert status(output).state == "stopped"
    assert head.ended(head.submit(model, calibration, output, workers=1)).driver_exit_code == 0
    events = [line["event"] for line in log_of(output)]
    assert events.index("interrupted") < events.index("run resumed")
    assert digests(output) == digests(run(model, sparsity=0.3)[0])
